"""gather: before a bucket's first use, all-gather its shards (stage 3).

    before                                     after
      %w = zero.param %b0.shard "w"              %b0 = zero.gather b0
      %1 = aten.mm(%x, %w)                       zero.wait %b0
                                                 %w = zero.param %b0 "w"
                                                 %1 = aten.mm(%x, %w)

One gather serves all uses of a bucket that lie at most `max_reuse_distance` elements of other buckets apart,
those of the forward and of the backward in one line: at a distance of 0, those with no other bucket between
them. Beyond it, or where keeping the bucket would have more than `max_live` gathered elements alive, it is
gathered again: buckets whose uses are nearest are kept first, since all save the same bytes per byte kept,
and those are kept for the shortest time. Gathers are placed just in time; `schedule` starts them earlier.
ZeRO, arXiv:1910.02054 section 7.2.2. Persistent buckets are never gathered: they count as alive throughout.

With a `budget` bytes decide, not the distance, what is kept from the forward to the backward. All that is
kept is alive at the turn between them, where activations are at their peak as well: so the bytes kept are
what keeping costs, whichever bucket they are of, and each byte kept saves the gathering of one. The best
choice is then the one that fills the budget best, a subset sum, which is solved exactly (in parts of a
millionth of the budget, rounded up, where sizes have no larger common divisor). Of equal sums the nearest
buckets' is taken, which are held for the shortest time. A bucket with no other between its uses is kept in
any case and not counted: to gather it again would free it for no operator of another block. Nor is what
`schedule` starts early for the backward, which its own bounds limit.

With a mesh of nodes (hpZ, ZeRO++, arXiv:2306.10209 section 3.2) the forward keeps of what it gathers each
rank's slice of its node, and the backward gathers within the node:

    forward                                    backward
      %b0 = zero.gather b0                       %b0 = zero.gather b0 over node    # from %b0.second
      zero.wait %b0                              zero.wait %b0
      %b0.second = zero.partition b0 over node
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import gcd
from typing import ClassVar, cast

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.mesh import over
from zerograph.nodes import Region, is_call, module_of, region_of, role_of
from zerograph.passes.release import aliases, users_of_aliases


@dataclass(frozen=True)
class Gather:
    max_reuse_distance: int
    max_live: int = 10**18
    """Gathered elements that may be alive at once."""
    across: bool = True
    """Whether a bucket may be kept from the forward to the backward."""
    budget: int | None = None
    """Bytes of buckets that may be so kept, whatever the distance; None for what the distance says."""

    name: ClassVar[str] = "gather"
    requires: ClassVar[frozenset[str]] = frozenset({"sharded"})
    provides: ClassVar[frozenset[str]] = frozenset({"gathered"})

    def apply(self, graph: TrainGraph) -> str:
        if graph.stage < 3:
            return "every rank holds the full buckets"
        runs = self._runs(graph)
        kept = self._kept(graph, runs) if self.across else set()
        parts = [p for run in runs for p in ([run.views] if run in kept else run.by_region())]
        second = _Second(graph, graph.mesh.second if self.across else "")
        for views in parts:
            second.gather_for(views)
        said = f", {len(kept)} buckets kept for the backward" if kept else ""
        said += f", of {len(second.slices)} a slice" if second.slices else ""
        return f"{len(parts)} gathers{said}"

    def _kept(self, graph: TrainGraph, runs: list["_Run"]) -> set["_Run"]:
        """The runs that one gather serves over the turn from forward to backward."""
        kept = _affordable(graph, runs, self.max_live)
        if self.budget is None:
            return kept
        counted = sorted((run for run in kept if run.distance), key=lambda run: run.distance)
        sizes = [graph.layout.buckets[run.bucket].nbytes for run in counted]
        chosen = best_within(sizes, self.budget)
        return kept - {run for run, taken in zip(counted, chosen) if not taken}

    def _runs(self, graph: TrainGraph) -> list["_Run"]:
        """Views of one bucket that one gather may serve, in order of the first of each run."""
        found: list[_Run] = []
        last: dict[str, _Run] = {}
        passed = 0
        for view, name in _by_use(graph):
            run = last.get(name)
            between = passed - run.passed if run is not None else 0
            far = between > self.max_reuse_distance
            if run is not None and self.budget is not None:
                far = far and region_of(run.views[-1]) == region_of(view)
            if run is None or far:
                run = last[name] = _Run(name)
                found.append(run)
            elif run.views and region_of(run.views[-1]) != region_of(view):
                run.distance = between
            passed += _size(view)
            run.views.append(view)
            run.passed = passed
        return found


@dataclass(eq=False)
class _Run:
    """Uses of one bucket near each other."""

    bucket: str
    views: list[fx.Node] = field(default_factory=list)
    passed: int = 0
    """Elements used up to and with the last view."""
    distance: int = 0
    """Elements of other buckets between the forward's uses and the backward's."""

    def by_region(self) -> list[list[fx.Node]]:
        regions: tuple[Region, ...] = ("forward", "backward")
        parts = [[v for v in self.views if region_of(v) == region] for region in regions]
        return [part for part in parts if part]

    @property
    def crosses(self) -> bool:
        return len(self.by_region()) == 2


def _affordable(graph: TrainGraph, runs: list[_Run], max_live: int) -> set[_Run]:
    """The runs that cross into the backward for which there is room, the nearest first."""
    order = {node: index for index, node in enumerate(graph.graph.nodes)}

    def interval(views: list[fx.Node]) -> tuple[int, int]:
        readers = {user for view in views for user in aliases(view) | users_of_aliases(view)}
        return order[views[0]], max(order[node] for node in readers)

    size = {run: graph.layout.buckets[run.bucket].numel for run in runs}
    alive = [(*interval(views), size[run]) for run in runs for views in run.by_region()]
    kept: set[_Run] = set()
    room = max_live - graph.resident
    crossing = [run for run in runs if run.crosses]
    for run in sorted(crossing, key=lambda run: (run.distance, -order[run.views[0]])):
        apart = [(*interval(views), size[run]) for views in run.by_region()]
        trial = [each for each in alive if each not in apart] + [(*interval(run.views), size[run])]
        if _peak(trial) <= room:
            alive, kept = trial, kept | {run}
    return kept


_UNITS = 1 << 20
"""The most parts that a budget is divided into."""


def best_within(sizes: Sequence[int], budget: int) -> list[bool]:
    """Which of `sizes`, by preference, to take so that their sum is largest within `budget`.

    Of the sets with that sum it is the one with the first that can be had, then the second, and so on. Sums
    are exact if the greatest common divisor of the sizes is at least a millionth of the budget; otherwise
    sizes are rounded up to such parts: a set that leaves less of the budget than a part for each size may be
    missed, and sums within a part for each size of another count as equal. Time and memory: len(sizes) times
    2**20 bits.
    """
    unit = max(gcd(*sizes), -(-budget // _UNITS), 1)
    parts, whole = [-(-size // unit) for size in sizes], budget // unit
    sums = [1]  # bit s of sums[i]: whether some of the last i sizes add up to s
    for part in reversed(parts):
        sums.append((sums[-1] | sums[-1] << part) & ((2 << whole) - 1))
    left, taken = sums[-1].bit_length() - 1, []
    for part, rest in zip(parts, sums[-2::-1]):
        taken.append(part <= left and bool(rest >> (left - part) & 1))
        left -= part * taken[-1]
    return taken


def _peak(intervals: Iterable[tuple[int, int, int]]) -> int:
    """The most elements alive at once, of (first, last, elements)."""
    changes: dict[int, int] = {}
    for first, last, elements in intervals:
        changes[first] = changes.get(first, 0) + elements
        changes[last + 1] = changes.get(last + 1, 0) - elements
    return max(accumulate(changes[at] for at in sorted(changes)), default=0)


def _by_use(graph: TrainGraph) -> list[tuple[fx.Node, str]]:
    """(view, bucket) of each use of a parameter that is gathered, in the order of use.

    A parameter that is used far apart (a tied one) is split into one view a use here, so that the runs can
    fall between its uses.
    """
    for view in _views_of_slices(graph):
        _one_view_per_use(graph, view)
    return [(n, role_of(cast(fx.Node, n.args[0])).name) for n in _views_of_slices(graph)]


def _views_of_slices(graph: TrainGraph) -> list[fx.Node]:
    views = [n for n in graph.nodes() if is_call(n, ops.param)]
    return [n for n in views if role_of(cast(fx.Node, n.args[0])).kind == "shard"]


def _one_view_per_use(graph: TrainGraph, view: fx.Node) -> None:
    for user in sorted(view.users)[1:]:
        with graph.inserting(user, region_of(view), module_of(user)) as insert:
            again = insert(ops.param, *view.args)
        user.replace_input_with(view, again)


def _size(view: fx.Node) -> int:
    return int(view.meta["val"].numel())


@dataclass
class _Second:
    """The slices that the forward keeps of what it gathers, from which the backward gathers over `axis`."""

    graph: TrainGraph
    axis: str
    """Empty if it keeps none."""
    slices: dict[str, fx.Node] = field(default_factory=dict)
    """By bucket."""
    _gathered: dict[str, fx.Node] = field(default_factory=dict)
    """What the forward gathered last of each bucket."""

    def gather_for(self, views: list[fx.Node]) -> None:
        shard, region = cast(fx.Node, views[0].args[0]), region_of(views[0])
        bucket, axis = role_of(shard).name, self.graph.mesh.cut
        if region == "backward" and self.axis and bucket in self._gathered:
            shard, axis = self._slice(bucket), self.axis
        full = _gather_for(self.graph, views, shard, axis)
        if region == "forward":
            self._gathered[bucket] = full

    def _slice(self, bucket: str) -> fx.Node:
        if bucket not in self.slices:
            full, size = self._gathered[bucket], self.graph.mesh.size(self.axis)
            block = self.graph.layout.buckets[bucket].block
            with self.graph.inserting(full.next, "forward", block) as insert:
                made = insert(ops.partition, full, bucket, size, **over(self.axis))
            self.graph.save(made)
            self.slices[bucket] = made
        return self.slices[bucket]


def _gather_for(graph: TrainGraph, views: list[fx.Node], source: fx.Node, axis: str) -> fx.Node:
    """One gather and wait before the first view; a region's views of one parameter become one again."""
    shard, region = cast(fx.Node, views[0].args[0]), region_of(views[0])
    bucket, size = role_of(shard).name, graph.mesh.size(axis)
    with graph.inserting(views[0], region, graph.layout.buckets[bucket].block) as insert:
        full = insert(ops.wait, insert(ops.gather, source, bucket, size, **over(axis)))
    first: dict[tuple[Region, str], fx.Node] = {}
    for view in views:
        key = region_of(view), cast(str, view.args[1])
        if key in first:
            view.replace_all_uses_with(first[key])
            graph.graph.erase_node(view)
        else:
            first[key] = view
            view.replace_input_with(shard, full)
    if region_of(views[-1]) != region:
        graph.save(full)
    return full
