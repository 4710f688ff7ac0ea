"""specialize: the backward for the gradients that arrive, and no more.

    before                                     after (only the loss's gradient arrives)
    backward(%d_loss, %d_logits: f32[2,9,64])  backward(%d_loss)
      %7 = aten._log_softmax_backward(%d_loss..) %7 = aten._log_softmax_backward(%d_loss..)
      %8 = aten.add(%d_logits, %7)               %9 = aten.mm(%7, ..)
      %9 = aten.mm(%8, ..)

Every result of the forward stays differentiable: what the forward saves is fixed here for all of them.
A backward is linear in the incoming gradients, so one that does not arrive is zero, and so is all that
is computed from such zeros alone; an addition of zero is its other side.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from zerograph import compat
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, is_random, module_of, region_of, role_of


@dataclass(frozen=True)
class Specialize:
    arriving: tuple[str, ...] | None = None
    """Paths of the results whose gradients arrive; None for all of them."""

    name: ClassVar[str] = "specialize"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    provides: ClassVar[frozenset[str]] = frozenset({"specialized"})

    def apply(self, graph: TrainGraph) -> str:
        graph.set_outputs(saved=_saved(graph))
        tangents = graph.placeholders("tangent")
        absent = [
            t
            for t in tangents
            if self.arriving is not None and role_of(t).name not in self.arriving
        ]
        zeros = _propagate(graph, set(tangents), set(absent))
        _drop_gradients(graph, zeros)
        _erase_unused(graph, absent)
        graph.unused = _without_gradient(graph) if graph.training else ()
        return f"{len(tangents) - len(absent)} of {len(tangents)} gradients arrive"


def _saved(graph: TrainGraph) -> list[fx.Node]:
    """Forward values (not parameters) that any backward may read, in graph order."""
    needed: set[fx.Node] = set()
    for node in graph.nodes("backward"):
        needed.update(node.all_input_nodes)
    needed.update(n for n in graph.outputs("backward") if n is not None)
    needed.update(graph.placeholders("size"))
    kinds = ("buffer", "constant", "input", "size")
    inputs = [p for p in graph.placeholders() if role_of(p).kind in kinds]
    return [n for n in (*inputs, *graph.nodes("forward")) if n in needed]


def _propagate(graph: TrainGraph, tangents: set[fx.Node], absent: set[fx.Node]) -> set[fx.Node]:
    """All values that are zero because the gradients in `absent` are."""
    derived, zeros = set(tangents), set(absent)
    for node in graph.nodes("backward"):
        sources = [n for n in node.all_input_nodes if n in derived]
        if not sources:
            continue
        derived.add(node)
        dead = [n for n in sources if n in zeros]
        if len(dead) == len(sources):
            zeros.add(node)
        elif dead and (other := _other_side(node, dead)) is not None:
            node.replace_all_uses_with(other)
        elif dead:
            for source in dead:
                node.replace_input_with(source, _zeros_like(graph, source, node))
    return zeros


def _other_side(node: fx.Node, dead: list[fx.Node]) -> fx.Node | None:
    """The operand that `add(zero, operand)` equals, where shapes and dtypes allow it."""
    if not is_call(node, torch.ops.aten.add.Tensor) or node.kwargs:
        return None
    operands = [n for n in node.args if n not in dead]
    if len(operands) != 1 or not isinstance(operands[0], fx.Node):
        return None
    ours, theirs = (_layout(n.meta["val"]) for n in (node, operands[0]))
    return operands[0] if ours == theirs else None


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    return (*map(compat.exact, (*value.shape, *value.stride())), value.dtype)


def _zeros_like(graph: TrainGraph, source: fx.Node, before: fx.Node) -> fx.Node:
    value = cast(torch.Tensor, source.meta["val"])
    with graph.inserting(before, region_of(before), module_of(before)) as insert:
        return insert(
            torch.ops.aten.full.default,
            [insert.size(dim) for dim in value.shape],
            0,
            dtype=value.dtype,
            device=value.device,
            pin_memory=False,
        )


def _drop_gradients(graph: TrainGraph, zeros: set[fx.Node]) -> None:
    pairs = zip(graph.gradients, graph.outputs("backward"), strict=True)
    kept = [(g, n) for g, n in pairs if n is not None and n not in zeros]
    graph.gradients = tuple(g for g, _ in kept)
    graph.set_outputs(backward=[n for _, n in kept])


def _erase_unused(graph: TrainGraph, absent: list[fx.Node]) -> None:
    """Erase what only led to dropped gradients, then the placeholders of absent ones."""
    for node in reversed(graph.nodes("backward")):
        if not node.users and not is_random(node):
            graph.graph.erase_node(node)
    for tangent in absent:
        if not tangent.users:
            graph.graph.erase_node(tangent)


def _without_gradient(graph: TrainGraph) -> tuple[str, ...]:
    have = {g.name for g in graph.gradients if g.kind == "param"}
    params = graph.layout.params.values()
    return tuple(p.name for p in params if p.trainable and p.name not in have)
