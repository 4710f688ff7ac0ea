"""schedule: start gathers early and finish reductions late, under the config's bounds.

    before                                     after
      forward                                    forward
        %b0 = zero.gather b0                       %b0 = zero.gather b0 ahead
        zero.wait %b0                              %b1 = zero.gather b1
        %0 = aten.embedding(..)                    zero.wait %b0
        %b1 = zero.gather b1                       %0 = aten.embedding(..)
        zero.wait %b1                              zero.wait %b1
      step                                       step
        zero.update.adamw %b0.shard, ..            zero.update.adamw %b0.shard, ..
                                                   zero.gather_ahead b0

A step is a ring: what the forward needs first, the step before it starts, behind the update of the
bucket (ahead.py). Forward and backward are one line: a gather of the backward may start in the forward. The
places at which a gather may start are the waits of earlier gathers, and the step. It starts as early as it
pays, that is with at most `reach` gathers behind the one that is waited for, which keeps a link busy; as
no more than `prefetch` elements (with `any_size` also one bucket that has more) are in flight beside that
one; and as no more than `max_live` gathered elements are alive. At the turn from forward to backward, where
activations are at their peak, no more than one gather for the backward is under way: others start where the
backward comes to its first parameters.

The wait of a reduction moves behind the start of the next `in_flight - 1` reductions, or to the end, and
behind one more if the next has fewer elements: it is longer on the link than that takes to compute.
The order of collectives follows from the graph and the layout, and not from the sizes of activations, so that
ranks whose batches differ have the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from torch import fx

from zerograph import ops
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import axis_of, bucket_of, is_call, region_of
from zerograph.passes.ahead import start_gathers, start_refreshes


@dataclass(frozen=True)
class Schedule:
    prefetch: int
    """Elements that may be in flight ahead of use; 0 gathers just in time."""
    max_live: int
    """Gathered elements that may be alive at once, a hard bound."""
    in_flight: int = 2
    """Reductions under way at once; each keeps its bucket's gradient buffer.

    One that is larger than the next has one more beside it. Where the backward updates, what it starts for
    the next step shares the link with them: a plan has 3 then.
    """
    reach: int = 2
    """Gathers that wait in line behind the one that is needed next."""
    across: bool = True
    """Whether a gather may start in the region before its own."""
    any_size: bool = False
    """Whether one gather may be in flight ahead of use though it has more than `prefetch` elements."""

    name: ClassVar[str] = "schedule"
    requires: ClassVar[frozenset[str]] = frozenset({"reduced", "updated"})
    provides: ClassVar[frozenset[str]] = frozenset({"scheduled"})

    def apply(self, graph: TrainGraph) -> str:
        _check_bound(graph, self.max_live)
        line = _Line.of(graph, self)
        moved, ahead = line.prefetch(), line.start_in_the_step()
        start_refreshes(graph)
        sunk = self._sink(graph)
        said = f"{moved} gathers started early"
        said += f" and {ahead} in the step before" if ahead else ""
        return f"{said}, {sunk} reductions finished late"

    def _sink(self, graph: TrainGraph) -> int:
        """Move each reduction's wait, and what is done with its mean, later in the backward."""
        if self.in_flight < 2:
            return 0
        sunk, done = 0, _behind_reductions(graph)
        for starts in _halves(graph):
            for index, start in enumerate(starts):
                later = self._beside(graph, starts[index:]) + index
                place = _wait_of(starts[later]) if later < len(starts) else graph.end("backward")
                for node in _behind(start, done[bucket_of(start)]):
                    if node < place:
                        place.prepend(node)
            sunk += len(starts)
        return sunk

    def _beside(self, graph: TrainGraph, starts: list[fx.Node]) -> int:
        """How many reductions start after the first of these, and before that is waited for."""
        size, *later = (graph.layout.buckets[bucket_of(start)].numel for start in starts[:2])
        return self.in_flight - 1 + any(size > other for other in later)


@dataclass
class _Line:
    """The gathers of a step in order. Slot `i` is the place of gather i's wait; slot -1 is in the step."""

    options: Schedule
    graph: TrainGraph
    gathers: list[fx.Node]
    live: list[int]
    """Gathered elements alive at each slot."""
    released: list[int]
    """The first slot behind each gather's release."""
    slots: list[int]
    """Where each gather starts."""

    @classmethod
    def of(cls, graph: TrainGraph, options: Schedule) -> "_Line":
        nodes = graph.nodes()
        gathers = [n for n in nodes if is_call(n, ops.gather)]
        waits = [_wait_of(gather) for gather in gathers]
        ends = [_release_of(gather) for gather in gathers]
        released = [sum(wait < end for wait in waits) for end in ends]
        slots = list(range(len(gathers)))
        return cls(options, graph, gathers, _live_at_slots(graph), released, slots)

    @property
    def room(self) -> int:
        """Elements that may be in flight beside the gather that is waited for."""
        largest = max(map(_numel, self.gathers), default=0) if self.options.any_size else 0
        return max(self.options.prefetch, largest)

    def prefetch(self) -> int:
        """Move gathers earlier, in order, none further than the one before it; answers how many."""
        behind: dict[str, int] = {}  # a bucket is not gathered twice at once
        slot = 0
        for index, gather in enumerate(self.gathers):
            floor = max(slot, behind.get(bucket_of(gather), 0), self._first_slot(index))
            slot = self.slots[index] = self._earliest(index, min(index, floor))
            behind[bucket_of(gather)] = self.released[index]
            if slot < index:
                self._move(gather, self._place(gather, slot))
        return sum(slot < index for index, slot in enumerate(self.slots))

    def start_in_the_step(self) -> int:
        """Start the first gathers of the forward in the step before; answers how many."""
        updated = any(is_call(node, ops.update) for node in self.graph.nodes())
        if not updated or not self.options.across:
            return 0
        count = self._count_ahead()
        start_gathers(self.graph, self.gathers[:count])
        return count

    def _count_ahead(self) -> int:
        """How many gathers the step may start: what is then alive lasts into the forward's first slot.

        Where the backward updates, the forward may take more, if all others are kept for the backward: that
        holds them all in any case, and activations beside.
        """
        forward = [g for g in self.gathers if region_of(_wait_of(g)) == "forward"]
        others = forward[self.options.reach + 1 :]
        further = self.graph.updates_in_backward and all(map(_is_kept, others))
        buckets = [bucket_of(gather) for gather in forward]
        count = 0
        for index, total in enumerate(accumulate(map(_numel, forward))):
            alive = total + self.graph.resident
            beyond = not further and (index > self.options.reach or self.slots[index] > 0)
            if beyond or total > self.room or alive > self.options.max_live:
                break
            if buckets[index] in buckets[:index]:
                break
            count += 1
        return count

    def _first_slot(self, index: int) -> int:
        """The first slot at which a gather may start if regions are not crossed."""
        if self.options.across:
            return 0
        region = region_of(self.gathers[index])
        return next(i for i, g in enumerate(self.gathers) if region_of(_wait_of(g)) == region)

    def _earliest(self, index: int, floor: int) -> int:
        """The first slot, not before `floor`, at which gather `index` may start; updates `live`."""
        size, in_flight, slot = _numel(self.gathers[index]), _numel(self.gathers[index]), index
        options = self.options
        while (
            slot > floor
            and index - slot < options.reach
            and in_flight <= self.room
            and self.live[slot - 1] + size <= options.max_live
        ):
            slot -= 1
            self.live[slot] += size
            in_flight += _numel(self.gathers[slot])
        return slot

    def _place(self, gather: fx.Node, slot: int) -> fx.Node:
        """The node before which a gather starts that may start at a slot."""
        wait = _wait_of(self.gathers[slot])
        if region_of(gather) == region_of(wait):
            return wait
        turned = any(_is_under_way(node) for node in self.graph.outputs("saved"))
        return _turn(self.graph) if turned else wait

    def _move(self, gather: fx.Node, place: fx.Node) -> None:
        place.prepend(gather)
        if region_of(gather) != region_of(place):
            gather.meta["region"] = region_of(place)
            self.graph.save(gather)


def _halves(graph: TrainGraph) -> Iterable[list[fx.Node]]:
    """The starts of the backward's reductions, in order: those along the copies apart from the others."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes("backward"):
        if is_call(node, ops.reduce_scatter, ops.all_reduce):
            found.setdefault(axis_of(node), []).append(node)
    return found.values()


def _behind(start: fx.Node, done: list[fx.Node]) -> Iterator[fx.Node]:
    """What follows the start of a reduction: its wait, a slice of it, what goes along the copies, and what is
    `done` then."""
    node = start
    while node not in done:
        node = _wait_of(node) if is_call(node, *ops.COLLECTIVES) else next(iter(node.users))
        if node not in done:
            yield node
    yield from done


def _wait_of(start: fx.Node) -> fx.Node:
    return next(user for user in start.users if is_call(user, ops.wait))


def _release_of(gather: fx.Node) -> fx.Node:
    return next(user for user in _wait_of(gather).users if is_call(user, ops.release))


def _is_kept(gather: fx.Node) -> bool:
    """Whether the forward keeps a bucket for the backward."""
    return region_of(_release_of(gather)) == "backward"


def _behind_reductions(graph: TrainGraph) -> dict[str, list[fx.Node]]:
    """By bucket what is done in the backward with its mean gradient, and what an update starts, in order."""
    kinds = (ops.accumulate, ops.squares, ops.update, ops.refresh, ops.gather_ahead)
    found: dict[str, list[fx.Node]] = {name: [] for name in graph.layout.buckets}
    for node in graph.nodes("backward"):
        if is_call(node, *kinds):
            found[bucket_of(node)].append(node)
    return found


def _is_under_way(saved: fx.Node | None) -> bool:
    """Whether what the forward keeps is a gather that the backward waits for."""
    return saved is not None and is_call(saved, ops.gather)


def _turn(graph: TrainGraph) -> fx.Node:
    """Where the backward comes to its first parameters, be it to read them or to make their gradients."""
    kinds = (ops.param, ops.grad_buffer, ops.wait)
    return next(node for node in graph.nodes("backward") if is_call(node, *kinds))


def _numel(gather: fx.Node) -> int:
    return int(gather.meta["val"].numel())


def _live_at_slots(graph: TrainGraph) -> list[int]:
    """Gathered elements alive at each gather's wait, all gathers being just in time."""
    alive = graph.resident
    at_wait: list[int] = []
    for node in graph.nodes():
        if is_call(node, ops.gather):
            alive += _numel(node)
            at_wait.append(alive)
        elif is_call(node, ops.release):
            alive -= int(node.args[0].meta["val"].numel())  # type: ignore[union-attr]
    return at_wait


def _check_bound(graph: TrainGraph, bound: int) -> None:
    """Gathered just in time, more must not be alive than allowed: nothing can be moved later."""
    gathers = [n for n in graph.nodes() if is_call(n, ops.gather)]
    live = zip(_live_at_slots(graph), gathers, strict=True)
    total, gather = max(live, default=(graph.resident, None), key=lambda pair: pair[0])
    if total <= bound:
        return
    used, mends = "", [f"set it to at least {total:,}"]
    if gather is not None:
        bucket = graph.layout.buckets[bucket_of(gather)]
        used = f" when bucket {bucket.name} ({bucket.block}, {bucket.numel:,} elements) is used"
        if len(bucket.params) > 1:
            mends.append("cut the block with a smaller zero_optimization.reduce_bucket_size")
    if graph.resident:
        persistent = f"persistent parameters are {graph.resident:,} of them"
        mends.append(f"lower stage3_param_persistence_threshold ({persistent})")
    raise PlanError(
        f"zero_optimization.stage3_max_live_parameters is {bound:,}, but {total:,} gathered elements are "
        f"alive{used}; {', or '.join(mends)}"
    )
