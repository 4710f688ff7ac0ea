"""When collectives are started, are there, and are waited for, while programs run as compiled.

    an exchange on a channel               ->  its messages are waited for by a thread, which notes the time
    a collective of the backend's own      ->  in a copy of the program, a note before it and around its wait

What is not watched runs what it always ran. gloo says of a message that it has come only to the one that
waits for it, and lets one wait: so a thread for each channel waits for the messages in the order of their
exchanges, and the program waits for the thread. The time noted is when the thread got to run: some ten
microseconds late, more where a call holds Python's lock. Of the backend's own collectives the end is seen
where the program had to wait for it; otherwise it was some time before the wait.
"""

import copy
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import cast

import torch.distributed as dist
from torch import Tensor, fx

from zerograph import collectives
from zerograph.collectives import Exchange
from zerograph.passes.lower import Program, starts_collective, waits_for_collective
from zerograph.runtime.clock import Mark, now
from zerograph.runtime.world import World


@dataclass
class Call:
    """One collective of the run. Moments are those of clock.py."""

    kind: str
    """As the plan names it."""
    bucket: str
    region: str
    """In which it was started; the forward for a gather that the step before it has started."""
    axis: str
    nbytes: int
    """Of the full buffer."""
    began: Mark
    ended: Mark | None = None
    """When it was there; None while it is under way."""
    native: bool = False
    """Whether it is one of the backend's own: `ended` is then the end of its wait."""
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)
    """For which the program stood still."""


@dataclass
class Watch:
    """The calls of one engine's programs."""

    world: World
    calls: list[Call] = field(default_factory=list)
    program: Program | None = None
    """That runs."""
    _pending: dict[str, deque[Call]] = field(default_factory=lambda: defaultdict(deque))
    """The backend's own collectives under way, by `what`."""
    _threads: dict[str, "_Waiter"] = field(default_factory=dict)
    _copies: dict[fx.GraphModule, fx.GraphModule] = field(default_factory=dict)

    @contextmanager
    def running(self, program: Program) -> Iterator[fx.GraphModule]:
        """Answers what to run in place of `program.module`; watches what is started meanwhile."""
        self.program = program
        if program.module not in self._copies:
            self._copies[program.module] = self._noted(program.module)
        channels = self.world.channels()
        for name, channel in channels.items():
            channel.watch = partial(self._exchange, name)
        try:
            yield self._copies[program.module]
        finally:
            for channel in channels.values():
                channel.watch = None

    def end(self, settled: bool) -> None:
        """Watch nothing new; if `settled`, wait until what is under way on channels is there."""
        for thread in self._threads.values():
            thread.queue.put(None)
        for thread in self._threads.values() if settled else ():
            thread.join()
        self._copies.clear()

    def _exchange(self, channel: str, exchange: Exchange, begin: float) -> None:
        assert self.program is not None
        kind, region = "gather", "forward"  # of what is not the step's own, but started ahead
        if exchange.what in self.program.starts:
            kind, region = self.program.starts[exchange.what].kind, self.program.region
        nbytes = exchange.channel.size * exchange.own.nbytes
        if exchange.seen is None:
            axis = exchange.channel.axis
            exchange.seen = Call(kind, exchange.bucket, region, axis, nbytes, begin)
            self.calls.append(exchange.seen)
        call: Call = exchange.seen  # or the second half of an all-reduce
        works: list[_Message] = []

        def wrap(work: dist.Work) -> dist.Work:
            works.append(_Message(work, call))
            return cast(dist.Work, works[-1])

        exchange.through(wrap)
        if channel not in self._threads:
            self._threads[channel] = _Waiter(f"zerograph profile: {channel}")
            self._threads[channel].start()
        self._threads[channel].queue.put((call, works))

    # The backend's own

    def _noted(self, module: fx.GraphModule) -> fx.GraphModule:
        """`module`, with notes where it starts and waits for the backend's own collectives."""
        if not any(_is_native(node) for node in module.graph.nodes):
            return module
        graph: fx.Graph = copy.deepcopy(module.graph)
        for node in filter(_is_native, list(graph.nodes)):
            if waits_for_collective(node):
                node.target = self._wait
                continue
            with graph.inserting_before(node):
                graph.call_function(self._start, (node.meta["called"],))
        return fx.GraphModule(module, graph, class_name=type(module).__name__)

    def _start(self, what: str) -> None:
        assert self.program is not None
        kind, bucket, axis, nbytes = self.program.starts[what]
        call = (kind, bucket, self.program.region, axis, nbytes, now(self.world.device))
        self.calls.append(Call(*call, native=True))
        self._pending[what].append(self.calls[-1])

    def _wait(self, pending: Tensor, what: str) -> Tensor:
        begin = now(self.world.device)
        done = collectives.wait(pending, what)
        end = now(self.world.device)
        if self._pending[what]:  # otherwise it was started before the profile
            call = self._pending[what].popleft()
            call.ended = end
            call.waits.append((begin, end))
        return done


def _is_native(node: fx.Node) -> bool:
    """Whether a program's node starts or waits for one of the backend's own collectives.

    Those that the model makes itself are none of the plan's, and have no name.
    """
    if node.op != "call_function":
        return False
    named = starts_collective(node) and "called" in node.meta
    return named or waits_for_collective(node)


class _Message:
    """In place of a message's work: whose program waits for the thread that waits for the work."""

    def __init__(self, work: dist.Work, call: Call) -> None:
        self.work: dist.Work | None = work
        self.error: RuntimeError | None = None
        self.there = threading.Lock()
        self.there.acquire()
        self._call = call

    def wait(self) -> None:
        if not self.there.acquire(blocking=False):
            begin = time.perf_counter()
            while not self.there.acquire(timeout=1.0):
                if sys.is_finalizing():  # the thread has gone, and so has who would read what comes
                    return
            self._call.waits.append((begin, time.perf_counter()))
        if self.error is not None:
            raise self.error


class _Waiter(threading.Thread):
    """Waits for a channel's messages. After one that failed, all have failed."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.queue: SimpleQueue[tuple[Call, list[_Message]] | None] = SimpleQueue()
        self._error: RuntimeError | None = None

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            call, messages = item
            for message in messages:
                self._await(message)
                if message is messages[-1]:
                    call.ended = time.perf_counter()
                message.there.release()

    def _await(self, message: _Message) -> None:
        assert message.work is not None
        try:
            if self._error is None:
                message.work.wait()
        except RuntimeError as error:
            self._error = error
        message.error, message.work = self._error, None
