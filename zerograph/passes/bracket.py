"""bracket: the device is waited for, or read off a clock, where a checkpointed region begins and ends.

    before                                     after
      zero.checkpoint %0 "layers.0"              zero.enter "layers.0" synchronize, profile
      %1 = aten.mm(%0, %w)                       zero.checkpoint %0 "layers.0"
      %2 = aten.gelu(%1)                         %1 = aten.mm(%0, %w)
    backward                                     %2 = aten.gelu(%1)
      %3 = aten.mm(%0, %w)   # recomputed        zero.leave "layers.0" synchronize, profile
      %4 = aten.gelu_backward(%d, %3)          backward
                                                 zero.enter "layers.0" synchronize, profile
                                                 %3 = aten.mm(%0, %w)   # recomputed
                                                 %4 = aten.gelu_backward(%d, %3)
                                                 zero.leave "layers.0" synchronize, profile

A region is what is between its first and its last node. In the backward its nodes are those that are computed
again, and the gradients of modules that run in this region alone. It is the last pass, so what the
schedule starts within a region, for whichever layer, is in its time. No number depends on it.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from zerograph import ops
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import Region, checkpoint_of, module_of

_SECTIONS: tuple[Region, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Bracket:
    synchronizes: bool
    """Whether the device is waited for."""
    profiles: bool
    """Whether the time of each region is logged, which waits as well."""

    name: ClassVar[str] = "bracket"
    requires: ClassVar[frozenset[str]] = frozenset({"checkpointed", "scheduled"})
    provides: ClassVar[frozenset[str]] = frozenset({"bracketed"})

    def apply(self, graph: TrainGraph) -> str:
        if not graph.training:
            return "there is no backward"
        own = _modules(graph)
        found = [(each, _extents(graph, each, own)) for each in _SECTIONS]
        if not any(extents for _, extents in found):
            raise PlanError(
                f"activation_checkpointing.{self._keys()}=true: it is about the boundaries of checkpointed "
                f"regions, and {graph.model} has no regions; give "
                "activation_checkpointing.number_checkpoints, mark regions in the model with "
                "zerograph.checkpointing.checkpoint, or set it to false"
            )
        for section, extents in found:
            for name, nodes in extents.items():
                with graph.inserting(nodes[0], section) as insert:
                    insert(ops.enter, name, self.synchronizes, self.profiles)
                with graph.inserting(nodes[-1].next, section) as insert:
                    insert(ops.leave, name, self.synchronizes, self.profiles)
        return f"{len(found[0][1])} regions in the forward, {len(found[1][1])} in the backward"

    def _keys(self) -> str:
        return "synchronize_checkpoint_boundary" if self.synchronizes else "profile"


def _extents(graph: TrainGraph, section: Region, own: dict[str, str]) -> dict[str, list[fx.Node]]:
    """By checkpointed region its nodes in the forward or the backward, in order."""
    extents: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes(section):
        name = checkpoint_of(node)
        if section == "backward" and not name and not ops.is_zero(node.target):
            name = own.get(module_of(node), "")
        if name:
            extents[name].append(node)
    return extents


def _modules(graph: TrainGraph) -> dict[str, str]:
    """By module that runs in one region alone, that region."""
    regions: dict[str, set[str]] = defaultdict(set)
    for node in graph.nodes("forward"):
        if module_of(node) and not ops.is_zero(node.target):
            regions[module_of(node)].add(checkpoint_of(node))
    return {module: next(iter(found)) for module, found in regions.items() if len(found) == 1}
