"""gather: before a region's first use of a bucket, all-gather its shards (stage 3).

    before                                     after
      %w = zero.param %b0.shard "w"              %b0 = zero.gather b0
      %1 = aten.mm(%x, %w)                       zero.wait %b0
                                                 %w = zero.param %b0 "w"
                                                 %1 = aten.mm(%x, %w)

A bucket whose uses in one region lie more than `max_reuse_distance` elements of other buckets apart
(an embedding tied to the head) is gathered again for the later ones. Gathers are placed just in time;
`schedule` starts them earlier. ZeRO, arXiv:1910.02054 section 7.2.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from zerograph import ops
from zerograph.ir import Region, TrainGraph, is_call, module_of, role_of


@dataclass(frozen=True)
class Gather:
    max_reuse_distance: int

    name: ClassVar[str] = "gather"
    requires: ClassVar[frozenset[str]] = frozenset({"sharded"})
    provides: ClassVar[frozenset[str]] = frozenset({"gathered"})

    def apply(self, graph: TrainGraph) -> str:
        if graph.stage < 3:
            return "every rank holds the full buckets"
        count = 0
        regions: tuple[Region, ...] = ("forward", "backward")
        for region in regions:
            for uses in list(self._runs(graph, region)):
                _gather_for(graph, uses, region)
                count += 1
        return f"{count} gathers"

    def _runs(self, graph: TrainGraph, region: Region) -> Iterator[list[fx.Node]]:
        """Views of one bucket that one gather serves, in order of the first of each run."""
        open_runs: dict[str, list[fx.Node]] = {}
        distance: dict[str, int] = {}
        views = self._by_use(graph, region)
        for view, name in views:
            if name in open_runs and distance[name] > self.max_reuse_distance:
                yield open_runs.pop(name)
            open_runs.setdefault(name, []).append(view)
            for other in distance:
                distance[other] += _size(view) if other != name else 0
            distance[name] = 0
        yield from open_runs.values()

    def _by_use(self, graph: TrainGraph, region: Region) -> list[tuple[fx.Node, str]]:
        """(view, bucket) of each use of a parameter in the order of use.

        A parameter that is used far apart (a tied one) is split into one view a use here, so that
        the runs can fall between its uses.
        """
        for view in [n for n in graph.nodes(region) if is_call(n, ops.param)]:
            _one_view_per_use(graph, view, region)
        found = [n for n in graph.nodes(region) if is_call(n, ops.param)]
        return [(n, role_of(cast(fx.Node, n.args[0])).name) for n in found]


def _one_view_per_use(graph: TrainGraph, view: fx.Node, region: Region) -> None:
    for user in sorted(view.users)[1:]:
        with graph.inserting(user, region, module_of(user)) as insert:
            again = insert(ops.param, *view.args)
        user.replace_input_with(view, again)


def _size(view: fx.Node) -> int:
    return int(view.meta["val"].numel())


def _gather_for(graph: TrainGraph, views: list[fx.Node], region: Region) -> None:
    """One gather and wait before the first view; views of the same parameter become one again."""
    shard = cast(fx.Node, views[0].args[0])
    bucket = role_of(shard).name
    with graph.inserting(views[0], region, graph.layout.buckets[bucket].block) as insert:
        full = insert(ops.wait, insert(ops.gather, shard, bucket, graph.world))
    first: dict[str, fx.Node] = {}
    for view in views:
        name = cast(str, view.args[1])
        if name in first:
            view.replace_all_uses_with(first[name])
            graph.graph.erase_node(view)
        else:
            first[name] = view
            view.replace_input_with(shard, full)
