"""schedule: start gathers early and finish reductions late, under the config's bounds.

    before                                     after
      %b0 = zero.gather b0                       %b0 = zero.gather b0
      zero.wait %b0                              %b1 = zero.gather b1
      %0 = aten.embedding(..)                    zero.wait %b0
      %b1 = zero.gather b1                       %0 = aten.embedding(..)
      zero.wait %b1                              zero.wait %b1

A gather starts at an earlier bucket's wait, as far ahead as fewer than `prefetch` elements are then in
flight beside the one that is waited for, and as no more than `max_live` gathered elements are alive. The
wait of a reduction moves behind the start of the next `in_flight - 1` reductions, or to the end.
The order of collectives follows from the graph alone.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from zerograph import ops
from zerograph.errors import PlanError
from zerograph.ir import REGIONS, Region, TrainGraph, is_call


@dataclass(frozen=True)
class Schedule:
    prefetch: int
    """Elements that may be in flight ahead of use; 0 gathers just in time."""
    max_live: int
    """Gathered elements that may be alive at once, a hard bound."""
    in_flight: int = 2
    """Reductions under way at once; each keeps its bucket's gradient buffer."""

    name: ClassVar[str] = "schedule"
    requires: ClassVar[frozenset[str]] = frozenset({"reduced", "updated"})
    provides: ClassVar[frozenset[str]] = frozenset({"scheduled"})

    def apply(self, graph: TrainGraph) -> str:
        _check_bound(graph, self.max_live)
        moved = sum(self._prefetch(graph, region) for region in REGIONS)
        sunk = self._sink(graph)
        return f"{moved} gathers started early, {sunk} reductions finished late"

    def _prefetch(self, graph: TrainGraph, region: Region) -> int:
        """Move gathers of one region earlier, in order, each no further than the one before it.

        A slot is the place of one gather's wait; gathers start at slots only, so the gathered
        elements alive peak at one of them.
        """
        nodes = graph.nodes(region)
        gathers = [n for n in nodes if is_call(n, ops.gather)]
        live = _live_at_slots(nodes)
        slot, moved = 0, 0
        behind: dict[object, int] = {}  # a bucket is not gathered twice at once
        for index, gather in enumerate(gathers):
            floor = min(index, max(slot, behind.get(gather.args[1], 0)))
            slot = self._earliest(gathers, index, floor, live)
            behind[gather.args[1]] = index + 1
            if slot < index:
                _wait_of(gathers[slot]).prepend(gather)
                moved += 1
        return moved

    def _earliest(self, gathers: list[fx.Node], index: int, floor: int, live: list[int]) -> int:
        """The first slot, not before `floor`, at which gather `index` may start; updates `live`."""
        size, in_flight, slot = _numel(gathers[index]), _numel(gathers[index]), index
        while (
            slot > floor and in_flight <= self.prefetch and live[slot - 1] + size <= self.max_live
        ):
            slot -= 1
            live[slot] += size
            in_flight += _numel(gathers[slot])
        return slot

    def _sink(self, graph: TrainGraph) -> int:
        """Move each reduction's wait, and the accumulation behind it, later in the backward."""
        starts = [n for n in graph.nodes("backward") if is_call(n, ops.reduce_scatter)]
        if self.in_flight < 2:
            return 0
        for index, start in enumerate(starts):
            wait = _wait_of(start)
            accumulate = next(iter(wait.users))
            later = index + self.in_flight - 1
            place = starts[later].next if later < len(starts) else graph.end("backward")
            place.prepend(wait)
            place.prepend(accumulate)
        return len(starts)


def _wait_of(start: fx.Node) -> fx.Node:
    return next(user for user in start.users if is_call(user, ops.wait))


def _numel(gather: fx.Node) -> int:
    return int(gather.meta["val"].numel())


def _live_at_slots(nodes: list[fx.Node]) -> list[int]:
    """Gathered elements alive at each gather's wait, all gathers being just in time."""
    alive: int = 0
    at_wait: list[int] = []
    for node in nodes:
        if is_call(node, ops.gather):
            alive += _numel(node)
            at_wait.append(alive)
        elif is_call(node, ops.release):
            alive -= int(node.args[0].meta["val"].numel())  # type: ignore[union-attr]
    return at_wait


def _check_bound(graph: TrainGraph, bound: int) -> None:
    """Gathered just in time, more must not be alive than allowed: nothing can be moved later."""
    nodes = graph.nodes()
    gathers = [n for n in nodes if is_call(n, ops.gather)]
    live = _live_at_slots(nodes)
    total, gather = max(
        zip(live, gathers, strict=True), default=(0, None), key=lambda pair: pair[0]
    )
    if gather is not None and total > bound:
        bucket = graph.layout.buckets[cast(str, gather.args[1])]
        raise PlanError(
            f"zero_optimization.stage3_max_live_parameters is {bound:,}, but {total:,} gathered "
            f"elements are alive when bucket {bucket.name} ({bucket.block}, {bucket.numel:,} "
            f"elements) is used; set it to at least {total:,}"
        )
