"""When collectives are started, are there, and are waited for, while programs run as compiled.

    a channel among a program's inputs     ->  a WatchedChannel on the same group
    a collective of the backend's own      ->  in a copy of the program, a note before it and around its wait

What is not watched runs what it always ran. gloo says of a message that it has come only to the one that
waits for it, and lets one wait: so a thread for each channel waits for the messages in the order of their
exchanges and notes the time, and the program waits for the thread. The time is that at which the thread
got to run: some ten microseconds late, more where a call holds Python's lock. Of the backend's own
collectives the end is seen where the program had to wait for it; otherwise it was some time before the wait.
"""

import copy
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx

from zerograph import collectives
from zerograph.collectives import Channel, Exchange, Gathering, Reducing
from zerograph.passes.lower import Program, starts_collective, waits_for_collective
from zerograph.runtime.clock import Mark, now


@dataclass
class Call:
    """One collective of the run. Moments are those of clock.py."""

    kind: str
    """As the plan names it."""
    bucket: str
    nbytes: int
    """Of the full buffer."""
    region: str
    """In which it was started."""
    began: Mark
    ended: Mark | None = None
    """When it was there; None while it is under way."""
    native: bool = False
    """Whether it is one of the backend's own: `ended` is then the end of its wait."""
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)
    """For which the program stood still."""


@dataclass
class Watch:
    """The calls of one engine's programs on `device`."""

    device: torch.device
    calls: list[Call] = field(default_factory=list)
    program: Program | None = None
    """That runs."""
    _pending: dict[str, deque[Call]] = field(default_factory=lambda: defaultdict(deque))
    """The backend's own collectives under way, by `what`."""
    _threads: dict[str, "_Waiter"] = field(default_factory=dict)
    _copies: dict[fx.GraphModule, fx.GraphModule] = field(default_factory=dict)

    def watched(self, program: Program, inputs: list[Any]) -> fx.GraphModule:
        """What to run now in place of `program.module`; channels among its inputs are replaced."""
        self.program = program
        for index, role in enumerate(program.inputs):
            if role.kind == "channel":
                inputs[index] = self._channel(role.name, inputs[index])
        if program.module not in self._copies:
            self._copies[program.module] = self._noted(program.module)
        return self._copies[program.module]

    def end(self) -> None:
        """Watch nothing new; wait until what is under way on channels is there."""
        for thread in self._threads.values():
            thread.queue.put(None)
        for thread in self._threads.values():
            thread.join()
        self._copies.clear()

    def begin(self, what: str, at: Mark) -> Call:
        """A collective of the running program, named as errors name it, was started `at`."""
        assert self.program is not None
        call = Call(*self.program.starts[what], self.program.region, at)
        self.calls.append(call)
        return call

    def _channel(self, name: str, channel: Channel) -> Channel:
        if name not in self._threads:
            self._threads[name] = _Waiter(f"zerograph profile: {name}", self.device)
            self._threads[name].start()
        shared = channel.group, channel.rank, channel.size, channel._tags
        return WatchedChannel(*shared, watch=self, waiter=self._threads[name])

    # The backend's own

    def _noted(self, module: fx.GraphModule) -> fx.GraphModule:
        """`module`, with notes where it starts and waits for the backend's own collectives."""
        graph: fx.Graph = copy.deepcopy(module.graph)
        own = [n for n in graph.nodes if n.op == "call_function"]
        if not any(starts_collective(n) or waits_for_collective(n) for n in own):
            return module
        for node in filter(starts_collective, own):
            with graph.inserting_before(node):
                graph.call_function(self._start, (node.meta["called"],))
        for node in filter(waits_for_collective, own):
            node.target = self._wait
        return fx.GraphModule(module, graph, class_name=type(module).__name__)

    def _start(self, what: str) -> None:
        call = self.begin(what, now(self.device))
        call.native = True
        self._pending[what].append(call)

    def _wait(self, pending: Tensor, what: str) -> Tensor:
        begin = now(self.device)
        done = collectives.wait(pending, what)
        end = now(self.device)
        if self._pending[what]:  # otherwise it was started before the profile
            call = self._pending[what].popleft()
            call.ended = end
            call.waits.append((begin, end))
        return done


@dataclass
class WatchedChannel(Channel):
    """A channel whose exchanges are noted."""

    watch: Watch = field(kw_only=True)
    waiter: "_Waiter" = field(kw_only=True)

    def gather(self, shard: Tensor, full: Tensor, bucket: str) -> Gathering:
        return cast(Gathering, self._noted(super().gather, shard, full, bucket))

    def reduce_scatter(
        self, buffer: Tensor, bucket: str, mean: bool, factor: float = 1.0
    ) -> Reducing:
        return cast(Reducing, self._noted(super().reduce_scatter, buffer, bucket, mean, factor))

    def _noted(self, start: Callable[..., Exchange], *args: Any) -> Exchange:
        begin = now(self.watch.device)
        exchange = start(*args)
        call = self.watch.begin(exchange.what, begin)
        call.nbytes = self.size * exchange.own.nbytes
        works: list[_Message] = []

        def wrap(work: dist.Work) -> dist.Work:
            works.append(_Message(work, call, self.watch.device))
            return cast(dist.Work, works[-1])

        exchange.through(wrap)
        self.waiter.queue.put((call, works))
        return exchange


class _Message:
    """In place of a message's work: whose program waits for the thread that waits for the work."""

    def __init__(self, work: dist.Work, call: Call, device: torch.device) -> None:
        self.work: dist.Work | None = work
        self.error: RuntimeError | None = None
        self.there = threading.Lock()
        self.there.acquire()
        self._call, self._device = call, device

    def wait(self) -> None:
        if not self.there.acquire(blocking=False):
            begin = now(self._device)
            self.there.acquire()
            self._call.waits.append((begin, now(self._device)))
        if self.error is not None:
            raise self.error


class _Waiter(threading.Thread):
    """Waits for a channel's messages. After one that failed, all have failed."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(name=name, daemon=True)
        self.queue: SimpleQueue[tuple[Call, list[_Message]] | None] = SimpleQueue()
        self._device = device
        self._error: RuntimeError | None = None

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            call, messages = item
            for message in messages:
                self._await(message)
                if message is messages[-1]:
                    call.ended = now(self._device)
                message.there.release()

    def _await(self, message: _Message) -> None:
        assert message.work is not None
        try:
            if self._error is None:
                message.work.wait()
        except RuntimeError as error:
            self._error = error
        message.error, message.work = self._error, None
