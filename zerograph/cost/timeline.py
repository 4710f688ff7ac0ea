"""When each node of a step starts and ends on one rank of a described cluster.

The host issues nodes in order, ahead of an asynchronous device. Compute runs them one after another. The
collectives share one stream and run in the order of their issue, each when its inputs are there; a
`wait` holds compute until its collective is done. So do copies to the host and back, on a stream of their
own that slows nothing; where host and device are one thread, a copy is work as any other. Where compute and
collectives take the same cores (CPU, gloo), a collective and compute that run at once slow each other by
fixed shares. What a step starts for the next one is under way when that begins: the timeline is of a step
among others like it, and such a collective may end after it.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, cast

from torch import fx

from zerograph import ops
from zerograph.cost.cluster import Cluster
from zerograph.cost.traffic import collective_bytes, name_of, nbytes
from zerograph.cost.work import work_of
from zerograph.ir import TrainGraph
from zerograph.nodes import REGIONS, axis_of, bucket_of, is_ahead, is_call, is_view, region_of
from zerograph.precision import short

Stream = Literal["compute", "communication", "copy"]
MOST_STEPS = 5
STREAMS: tuple[Stream, ...] = ("compute", "communication", "copy")


@dataclass(frozen=True)
class Span:
    """One node's time on its stream, in seconds from the start of the step."""

    node: int
    """Index in `graph.nodes()`."""
    region: str
    stream: Stream
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The spans of one step, in node order; nodes that take no time have none."""

    spans: tuple[Span, ...]
    waited: float
    """Seconds for which compute stood still for a collective or a copy."""
    seconds: float
    """Of the whole step: from the end of the one before to its own."""

    @cached_property
    def busy(self) -> dict[str, float]:
        """Seconds of work on each stream."""
        return {s: sum(x.seconds for x in self.spans if x.stream == s) for s in STREAMS}

    @property
    def hidden(self) -> float:
        """The share of communication and copies behind which compute went on; 1 if there is none."""
        moved = self.busy["communication"] + self.busy["copy"]
        return max(0.0, 1 - self.waited / moved) if moved else 1.0


def timeline_of(graph: TrainGraph, cluster: Cluster) -> Timeline:
    """The predicted timeline of `graph` on `cluster`."""
    return _Rank(graph, cluster).run()


@dataclass
class _Pending:
    """A collective under way, or in the queue behind it."""

    node: int
    region: str
    left: float
    """Seconds that it still takes when nothing slows it."""
    begun: float | None = None
    step: int = 0


@dataclass
class _Rank:
    """The clocks of one rank. `now` is the compute stream's, `host` the host's; on a CPU they are one."""

    graph: TrainGraph
    cluster: Cluster
    now: float = 0.0
    host: float = 0.0
    waited: float = 0.0
    queue: deque[_Pending] = field(default_factory=deque)
    spans: list[Span] = field(default_factory=list)
    copies: dict[fx.Node, float] = field(default_factory=dict)
    """When each copy to the host or back is done."""
    step: int = 0
    """Which step this is of those that follow each other."""
    ahead: dict[tuple[str, str], int] = field(default_factory=dict)
    """By operator and bucket, what the step before has started for this one."""

    def run(self) -> Timeline:
        """Steps until one leaves as much under way as the one before it; the timeline is that one's."""
        left = -1.0
        for self.step in range(MOST_STEPS):
            begin, self.waited, self.spans = self.now, 0.0, []
            self._run_step()
            left, before = sum(pending.left for pending in self.queue), left
            if not self.ahead or abs(left - before) <= 1e-9 * (self.now - begin):
                break
        seconds = self.now - begin
        while self.queue:
            self._finish_first()
        spans = (replace(s, start=s.start - begin, end=s.end - begin) for s in self.spans)
        ends = max((span.end for span in self.spans), default=begin) - begin
        return Timeline(
            tuple(sorted(spans, key=lambda span: span.node)),
            self.waited,
            seconds if self.ahead else ends,
        )

    def _run_step(self) -> None:
        started: dict[fx.Node, int] = {}
        for index, node in _numbered(self.graph):
            taken = _taken(node)
            if taken in self.ahead:
                started[node] = self.ahead.pop(taken)
            elif is_call(node, *ops.COPIES) and self.cluster.device.asynchronous:
                self._copy(index, node)
            elif is_call(node, ops.wait) and node.args[0] in self.copies:
                self._await_copy(cast(fx.Node, node.args[0]))
            elif is_call(node, *ops.COLLECTIVES, ops.gather_ahead):
                self._issue(index, node)
                started[node] = index
            if is_call(node, ops.gather_ahead, ops.refresh):
                self.ahead[name_of(node), bucket_of(node)] = index
            elif is_call(node, *ops.BRACKETS):
                self.host = max(self.host, self.now)
            elif is_call(node, ops.refreshed):
                self._await(started.get(node, -1))
            elif is_call(node, ops.wait):
                start = cast(fx.Node, node.args[0])
                self._await(started.get(start, -1))
                self._sum(start)
            elif node not in started:
                self._compute(index, node)

    def _compute(self, index: int, node: fx.Node) -> None:
        device, work = self.cluster.device, work_of(node)
        if is_call(node, *ops.COPIES):
            self._busy(index, node, device.launch, nbytes(node) / device.host_bandwidth)
        elif work.flops or work.nbytes:
            took = device.seconds(work.flops, work.nbytes, short(work.dtype))
            self._busy(index, node, device.launch, took)
        elif is_view(node):
            self._host(device.view)

    def _issue(self, index: int, node: fx.Node) -> None:
        """Start a collective behind what its stream has, once what compute has is done."""
        kind, nbytes, (world, stride) = name_of(node), collective_bytes(node), self._ranks(node)
        if world == 1:
            return
        copied = self.cluster.copied(kind, nbytes, world)
        self._host(self.cluster.device.launch)
        if copied:
            self._advance(self.cluster.device.seconds(0, copied, "f32"))
        took = self.cluster.collective(kind, nbytes, world, stride)
        self.queue.append(_Pending(index, region_of(node), took, step=self.step))
        self._begin_first()

    def _ranks(self, node: fx.Node) -> tuple[int, int]:
        """Among how many ranks a collective is, and how far apart they are."""
        mesh, axis = self.graph.mesh, axis_of(node)
        return mesh.size(axis), mesh.gap(axis)

    def _copy(self, index: int, node: fx.Node) -> None:
        """Start a copy behind those before it, once what compute has is done."""
        device = self.cluster.device
        self._host(device.launch)
        begin = max([self.now, *self.copies.values()])
        self.copies[node] = begin + device.kernel + nbytes(node) / device.host_bandwidth
        self.spans.append(Span(index, region_of(node), "copy", begin, self.copies[node]))

    def _await_copy(self, node: fx.Node) -> None:
        before = self.now
        self._idle_until(max(self.now, self.copies[node]))
        self.waited += self.now - before

    def _await(self, index: int) -> None:
        before = self.now
        while any(pending.node == index for pending in self.queue):
            self._finish_first()
        self.waited += self.now - before
        self._meet()

    def _sum(self, start: fx.Node) -> None:
        """What a wait has the host do with what came: no span of its own, as in a recording."""
        kind, nbytes, (world, _) = name_of(start), collective_bytes(start), self._ranks(start)
        summed = self.cluster.summed(kind, nbytes, world)
        if summed:
            self._advance(self.cluster.device.seconds(0, summed, "f32"))

    def _busy(self, index: int, node: fx.Node, launch: float, took: float) -> None:
        """Start an operator and let it run."""
        if self.cluster.device.asynchronous:
            self._host(launch)
            start = self.now
            self._advance(took)
        else:
            start = self.now
            self._advance(launch + took)
        self.spans.append(Span(index, region_of(node), "compute", start, self.now))

    # Clocks

    def _host(self, seconds: float) -> None:
        """The host works; compute stands still if there is nothing ahead of it."""
        if self.cluster.device.asynchronous:
            self.host += seconds
            self._idle_until(self.host)
        else:
            self._advance(seconds)

    def _meet(self) -> None:
        """A host that is one with compute has waited as well."""
        if not self.cluster.device.asynchronous:
            self.host = self.now

    def _advance(self, work: float) -> None:
        """Compute for `work` seconds of undisturbed time."""
        compute = 1 - self.cluster.slows_compute
        collective = 1 - self.cluster.slowed_by_compute
        while self.queue:
            first = self.queue[0]
            if work / compute < first.left / collective:
                first.left -= work / compute * collective
                work /= compute
                break
            work -= first.left / collective * compute
            self.now += first.left / collective
            self._end_first()
        self.now += work
        self._meet()

    def _idle_until(self, moment: float) -> None:
        """Compute has nothing to do before `moment`; collectives go on."""
        while self.queue and self.now + self.queue[0].left <= moment:
            self._finish_first()
        if self.queue:
            self.queue[0].left -= max(0.0, moment - self.now)
        self.now = max(self.now, moment)

    def _finish_first(self) -> None:
        """Compute stands still until the collective under way is done."""
        self.now += self.queue[0].left
        self._end_first()

    def _end_first(self) -> None:
        done = self.queue.popleft()
        assert done.begun is not None
        if done.step == self.step:
            self.spans.append(Span(done.node, done.region, "communication", done.begun, self.now))
        self._begin_first()

    def _begin_first(self) -> None:
        if self.queue and self.queue[0].begun is None:
            self.queue[0].begun = self.now


def _taken(node: fx.Node) -> tuple[str, str]:
    """What a node takes from the step before, by operator and bucket."""
    if is_ahead(node):
        return "gather_ahead", bucket_of(node)
    return ("refresh", bucket_of(node)) if is_call(node, ops.refreshed) else ("", "")


def _numbered(graph: TrainGraph) -> Iterator[tuple[int, fx.Node]]:
    """Nodes in the order in which they run, with their indices."""
    nodes = list(enumerate(graph.nodes()))
    for region in REGIONS:
        yield from ((index, node) for index, node in nodes if region_of(node) == region)
