"""partition: of what is kept at the boundaries of regions each model-parallel rank keeps its share.

    before                                     after
      zero.checkpoint %0 "layers.0"              zero.checkpoint %0 "layers.0"
      %1 = aten.mm(%0, %w)                       %1 = aten.mm(%0, %w)
      zero.checkpoint %1 "layers.1"              %0.share = zero.partition_activation %0 over mp
      %2 = aten.mm(%1, %v)                       zero.checkpoint %1 "layers.1"
      save %0, %1                                %2 = aten.mm(%1, %v)
    backward                                     %1.share = zero.partition_activation %1 over mp
      %3 = aten.mm(%1, %v)   # recomputed        save %0.share, %1.share
      ..                                       backward
      %4 = aten.mm(%0, %w)   # recomputed        %1.whole = zero.gather_activation %1.share over mp
                                                 zero.wait %1.whole
                                                 %5 = aten.as_strided(%1.whole, ..)
                                                 %0.whole = zero.gather_activation %0.share over mp
                                                 %3 = aten.mm(%5, %v)   # recomputed
                                                 ..
                                                 zero.wait %0.whole
                                                 %6 = aten.as_strided(%0.whole, ..)
                                                 %4 = aten.mm(%6, %w)   # recomputed

These ranks compute one batch, and between the parts of a layer that are cut over them all have the same
values: of a boundary each keeps one `mp`-th, a run of its storage. The gather is one region ahead, and a view
of it stands for the value, so no bit changes. What the model's own collectives gave within a region, which
is kept since nothing communicates twice, is shared as well. ZeRO-R, arXiv:1910.02054 section 6.1 (P_a).

Whole remain: what is a rank's own (alike.py), masks of dropouts, what layers outside of regions keep, and
what would not go to the host (passes/offload.py). It runs before `offload`, which then moves shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from zerograph import ops
from zerograph.alike import Joins, every, is_joined, own_values
from zerograph.cost import nbytes
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.kept import SMALLEST, last_use, movable, returns, under_boundaries
from zerograph.mesh import MODEL
from zerograph.nodes import checkpoint_of, module_of, region_of
from zerograph.units import size


@dataclass(frozen=True)
class Partition:
    smallest: int = SMALLEST
    overlaps: bool = True
    """Whether gathers are under way while something else is computed."""
    joins: Joins = every
    """Which process groups of the model's own collectives are the model-parallel ranks."""

    name: ClassVar[str] = "partition"
    requires: ClassVar[frozenset[str]] = frozenset({"checkpointed", "specialized"})
    provides: ClassVar[frozenset[str]] = frozenset({"partitioned"})

    def apply(self, graph: TrainGraph) -> str:
        if not graph.training:
            return "there is no backward"
        graph.notes["joins"] = self.joins
        found = under_boundaries(graph)
        if not found:
            raise PlanError(
                "activation_checkpointing.partition_activations=true: what ranks share is what checkpointed "
                f"regions keep, and {graph.model} has no regions; give "
                "activation_checkpointing.number_checkpoints, mark regions in the model with "
                "zerograph.checkpointing.checkpoint, or set partition_activations to false"
            )
        found |= {n: region for n, region in _joined_within(graph).items() if n not in found}
        own = own_values(graph, self.joins)
        shared = [v for v in movable(graph, found, self.smallest) if v not in own]
        shares = {value: self._share(graph, value) for value in shared}
        saved = graph.outputs("saved")
        graph.set_outputs(saved=[shares.get(cast(fx.Node, node), node) for node in saved])
        self._gather(graph, shares, found)
        kept = (
            f"{size(sum(map(nbytes, shared)))} as {size(sum(map(nbytes, shares.values())))} a rank"
        )
        differ = sum(value in own for value in found)
        said = f", {differ} are a rank's own" if differ else ""
        return f"{len(shared)} of {len(found)} kept values are shared, {kept}{said}"

    def _share(self, graph: TrainGraph, value: fx.Node) -> fx.Node:
        """This rank's share of a value, behind its last use in the forward."""
        with graph.inserting(last_use(value).next, "forward", module_of(value)) as insert:
            return insert(ops.partition_activation, value, graph.mesh.model, axis=MODEL)

    def _gather(
        self, graph: TrainGraph, shares: Mapping[fx.Node, fx.Node], under: Mapping[fx.Node, str]
    ) -> None:
        for value, readers, at in returns(graph, shares, under, self.overlaps):
            first = readers[0]
            with graph.inserting(at, "backward", module_of(first)) as insert:
                whole = insert(ops.gather_activation, shares[value], graph.mesh.model, axis=MODEL)
            with graph.inserting(first, "backward", module_of(first)) as insert:
                made = value.meta["val"]
                shape = [[insert.size(n) for n in each] for each in (made.shape, made.stride())]
                whole = insert(torch.ops.aten.as_strided.default, insert(ops.wait, whole), *shape)
            for reader in readers:
                reader.replace_input_with(value, whole)
        _save_sizes(graph)


def _joined_within(graph: TrainGraph) -> dict[fx.Node, str]:
    """Saved results of the model's own collectives, with the region that they are in."""
    values = [n for n in graph.outputs("saved") if n is not None and n.op != "placeholder"]
    found = {n: checkpoint_of(n) for n in values if is_joined(n) and checkpoint_of(n)}
    return {n: region for n, region in found.items() if isinstance(n.meta.get("val"), Tensor)}


def _save_sizes(graph: TrainGraph) -> None:
    """Sizes that vary, of which the backward now makes those of views."""
    saved = graph.outputs("saved")
    for node in graph.placeholders("size"):
        read = any(user.op != "output" and region_of(user) == "backward" for user in node.users)
        if read and node not in saved:
            graph.save(node)
