"""checkpoint: of a region the forward keeps what enters it, and the backward computes the rest again.

    before                                     after
      %1 = aten.mm(%0, %w)                       zero.checkpoint %0 "layers.0"
      %2 = aten.gelu(%1)                         %1 = aten.mm(%0, %w)
      save %0, %1, %2                            %2 = aten.gelu(%1)
    backward                                     save %0
      %3 = aten.gelu_backward(%d, %1)          backward
                                                 %3 = aten.mm(%0, %w)            # recomputed
                                                 %4 = aten.gelu_backward(%d, %3)

Kept are also the values that leave a region, the results of what must not run twice (masks of dropouts),
and what a selective checkpoint's policy says. Each node runs again just before the backward's first reader,
once, so at most one region's values are alive beside the boundaries. Parameters are read again, and
gathered again at stage 3. The numbers are the same, bit for bit. "Training Deep Nets with Sublinear Memory
Cost", arXiv:1604.06174. It runs before `specialize`, so that the forward keeps the same values
whichever gradients arrive.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from zerograph import compat, ops
from zerograph.boundaries import (
    insert_boundaries,
    insert_boundary,
    leaves,
    mark_blocks,
    mark_forward,
    marked,
)
from zerograph.ir import TrainGraph
from zerograph.nodes import checkpoint_of, is_call, is_view, region_of, role_of
from zerograph.passes.normalize import keep_old_buffers
from zerograph.repeats import Repeats, can_repeat

Choose = Callable[[TrainGraph], Collection[fx.Node]]
"""The nodes of the forward whose values are kept."""
Count = Callable[[TrainGraph], int]
"""A number of regions."""


@dataclass(frozen=True)
class Checkpoint:
    number: int | Count = 0
    """Regions over the repeated blocks of a model that marks none itself."""
    choose: Choose | None = None
    """What is kept within regions. Where there are none the whole forward is one, "budget"."""

    name: ClassVar[str] = "checkpoint"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    provides: ClassVar[frozenset[str]] = frozenset({"checkpointed"})

    def apply(self, graph: TrainGraph) -> str:
        if not graph.training:
            return "there is no backward"
        said = self._mark(graph)
        chosen = set(self.choose(graph)) if self.choose else set()
        whole = self.choose is not None and not marked(graph)
        if whole:
            mark_forward(graph, "budget")
        insert_boundaries(graph)
        inside = [n for n in graph.nodes("forward") if checkpoint_of(n)]
        least = _kept(graph, inside)
        kept = least | chosen.intersection(inside)
        again = {n for n in inside if n not in kept and not is_call(n, ops.checkpoint)}
        count = Repeats(graph, again).make()
        keep_old_buffers(graph)
        for node in sorted(chosen if whole else kept - least):
            _show(graph, node)
        regions = len({checkpoint_of(node) for node in inside})
        return f"{regions} regions{said}, {count} nodes recomputed"

    def _mark(self, graph: TrainGraph) -> str:
        """Mark the regions; answers what to say of those that the model marks itself."""
        own = bool(marked(graph))
        if self.number and not own:
            mark_blocks(graph, self.number if isinstance(self.number, int) else self.number(graph))
        return ", which the model marks itself" if own and (self.number or self.choose) else ""


def _kept(graph: TrainGraph, inside: list[fx.Node]) -> set[fx.Node]:
    """Nodes of regions whose values the forward keeps, if the backward reads them.

    With a view the value that it is of is kept: it is the same storage.
    """
    kept = {n for n in inside if not can_repeat(n) or leaves(n) or compat.policy_keeps(n)}
    for node in [n for n in inside if n in kept]:
        while is_view(node) and checkpoint_of(cast(fx.Node, node.args[0])) == checkpoint_of(node):
            node = cast(fx.Node, node.args[0])
            kept.add(node)
    return kept | _read_before_a_change(graph)


def _read_before_a_change(graph: TrainGraph) -> set[fx.Node]:
    """Nodes that read an input which the forward changes: the backward has its new value alone."""
    changed = {r.name for r in graph.results if r.kind == "input_update"}
    values = {p for p in graph.placeholders("input") if role_of(p).name in changed}
    readers: set[fx.Node] = set()
    for node in graph.nodes("forward"):
        if not values.isdisjoint(node.all_input_nodes):
            (values if is_view(node) else readers).add(node)
    return readers


def _show(graph: TrainGraph, node: fx.Node) -> None:
    """A boundary on a chosen value that the backward does read."""
    readers = sorted(user for user in node.users if user.op != "output")
    regions = [region_of(reader) for reader in readers]
    if "backward" in regions and regions[0] == "forward":
        insert_boundary(graph, node, readers[0], checkpoint_of(node))
