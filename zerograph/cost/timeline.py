"""When each node of a step starts and ends on one rank of a described cluster.

The host issues nodes in order. Compute runs them one after another; a collective starts when it is
issued, its inputs are there and those before it on its stream are done; `wait` holds compute until its
collective is done.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from torch import fx

from zerograph import ops
from zerograph.cost.cluster import Cluster
from zerograph.cost.traffic import collective_bytes, name_of
from zerograph.cost.work import work_of
from zerograph.ir import REGIONS, TrainGraph, is_call, region_of
from zerograph.precision import short

Stream = Literal["compute", "communication", "copy"]
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
    """Seconds for which compute stood still for a collective."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return max((span.end for span in self.spans), default=0.0)

    @cached_property
    def busy(self) -> dict[str, float]:
        """Seconds of work on each stream."""
        return {s: sum(x.seconds for x in self.spans if x.stream == s) for s in STREAMS}

    @property
    def hidden(self) -> float:
        """The share of communication behind which compute went on; 1 if there is none."""
        moved = self.busy["communication"]
        return max(0.0, 1 - self.waited / moved) if moved else 1.0


def timeline_of(graph: TrainGraph, cluster: Cluster) -> Timeline:
    """The predicted timeline of `graph` on `cluster`."""
    spans: list[Span] = []
    done: dict[fx.Node, float] = {}
    now = waited = 0.0
    free = dict.fromkeys(STREAMS, 0.0)
    for region in REGIONS:
        for index, node in _numbered(graph, region):
            if is_call(node, ops.wait):
                end = done.get(cast(fx.Node, node.args[0]), now)
                waited += max(0.0, end - now)
                now = max(now, end)
            elif is_call(node, *ops.COLLECTIVES):
                start = max(now, free["communication"])
                took = cluster.collective(name_of(node), collective_bytes(node), graph.world)
                done[node] = free["communication"] = start + took
                spans.append(Span(index, region, "communication", start, start + took))
            else:
                took = _compute(node, cluster)
                if took:
                    spans.append(Span(index, region, "compute", now, now + took))
                now += took
    return Timeline(tuple(spans), waited)


def _numbered(graph: TrainGraph, region: str) -> list[tuple[int, fx.Node]]:
    return [(i, n) for i, n in enumerate(graph.nodes()) if region_of(n) == region]


def _compute(node: fx.Node, cluster: Cluster) -> float:
    """Roofline: the slower of the products and of the memory traffic, and the launch."""
    work, device = work_of(node), cluster.device
    if not work.flops and not work.nbytes:
        return 0.0
    rate = device.flops.get(short(work.dtype), device.flops["f32"])
    return device.launch + max(work.flops / rate, work.nbytes / device.bandwidth)
