"""shard: parameters move into flat buckets; placeholders become buckets or shards of them.

    before                                     after
    forward(%w: f32[64,32], %x)                forward(%b0.full: f32[2048], %x)
      %0 = aten.mm(%x, %w)                       %w = zero.param %b0.full "w"
                                                 %0 = aten.mm(%x, %w)

At stages 0 to 2 each rank holds the full bucket. At stage 3 (ZeRO's parameter partitioning,
arXiv:1910.02054 section 5.3) it holds a slice, `%b0.shard`, and `gather` must follow, unless the bucket is
persistent. From here on buckets are within the config's sizes (bucketing.py).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from zerograph import ops
from zerograph.bucketing import UNLIMITED, Limits, within
from zerograph.ir import TrainGraph
from zerograph.layout import Bucket, Param
from zerograph.nodes import REGIONS, Region, module_of, region_of, role_of


@dataclass(frozen=True)
class Shard:
    stage: int
    limits: Limits = UNLIMITED

    name: ClassVar[str] = "shard"
    requires: ClassVar[frozenset[str]] = frozenset({"specialized"})
    provides: ClassVar[frozenset[str]] = frozenset({"sharded"})

    def apply(self, graph: TrainGraph) -> str:
        graph.stage = self.stage
        graph.layout = within(graph.layout, self.limits)
        storages = {name: self._storage(graph, bucket) for name, bucket in _used(graph).items()}
        for node in graph.placeholders("param"):
            param = graph.layout.params[role_of(node).name]
            for region in REGIONS:
                _view_in_region(graph, node, param, storages[param.bucket], region)
            graph.graph.erase_node(node)
        kept = sum(bucket.persistent for bucket in graph.layout.buckets.values())
        said = f"{len(graph.layout.params)} parameters in {len(graph.layout.buckets)} buckets"
        return f"{said}, {kept} persistent" if kept else said

    def _storage(self, graph: TrainGraph, bucket: Bucket) -> fx.Node:
        sliced = bucket.sliced(self.stage)
        kind, numel = ("shard", bucket.shard_numel) if sliced else ("full", bucket.numel)
        device = graph.placeholders("param")[0].meta["val"].device
        return graph.add_placeholder(kind, bucket.name, graph.fake(numel, bucket.dtype, device))


def _used(graph: TrainGraph) -> dict[str, Bucket]:
    """Buckets with a parameter that the graph reads, and all that are trained; in layout order."""
    read = {graph.layout.params[role_of(n).name].bucket for n in graph.placeholders("param")}
    buckets = graph.layout.buckets.values()
    return {b.name: b for b in buckets if b.name in read or (b.trainable and graph.training)}


def _view_in_region(
    graph: TrainGraph, node: fx.Node, param: Param, storage: fx.Node, region: Region
) -> None:
    """One view of the bucket for all uses of the parameter in `region`, before the first of them."""
    users = {n for n in node.users if n.op != "output" and region_of(n) == region}
    if not users:
        return
    first = min(users)
    with graph.inserting(first, region, module_of(first)) as insert:
        view = insert(
            ops.param, storage, param.name, param.offset, list(param.shape), list(param.stride)
        )
    for user in users:
        user.replace_input_with(node, view)
