"""scale: with fp16 the loss is scaled, by scaling what arrives at the backward.

    before                                     after
    backward(%d_loss)                          backward(%d_loss, %scale)
                                                 %6 = aten.mul(%d_loss, %scale)
      %7 = aten.nll_loss_backward(%d_loss, ..)   %7 = aten.nll_loss_backward(%6, ..)
      return grad x=%9                           %10 = aten.div(%9, %scale)
                                                 return grad x=%10

Every gradient that arrives is multiplied, whatever the user made of the outputs, so `loss.backward()`
needs no scaling of its own; `update` divides it out again, and so do gradients of inputs here. The
scale is an input, so that it changes without a new plan. arXiv:1710.03740 section 3.2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from zerograph.ir import Inserter, TrainGraph


@dataclass(frozen=True)
class Scale:
    name: ClassVar[str] = "scale"
    requires: ClassVar[frozenset[str]] = frozenset({"specialized"})
    provides: ClassVar[frozenset[str]] = frozenset({"scaled"})

    def apply(self, graph: TrainGraph) -> str:
        if not graph.training or not graph.precision.scaled:
            return "the loss is not scaled"
        tangents = graph.placeholders("tangent")
        scale = add_scalar(graph, "scale", torch.float32)
        with graph.inserting(graph.first("backward"), "backward") as insert:
            for tangent in tangents:
                readers = list(tangent.users)
                scaled = _times(insert, torch.ops.aten.mul.Tensor, tangent, scale)
                for reader in readers:
                    reader.replace_input_with(tangent, scaled)
        self._unscale_inputs(graph, scale)
        return f"{len(tangents)} arriving gradients scaled"

    def _unscale_inputs(self, graph: TrainGraph, scale: fx.Node) -> None:
        results = list(graph.outputs("backward"))
        with graph.inserting(graph.end("backward"), "backward") as insert:
            for index, gradient in enumerate(graph.gradients):
                if gradient.kind == "input":
                    node = cast(fx.Node, results[index])
                    results[index] = _times(insert, torch.ops.aten.div.Tensor, node, scale)
        graph.set_outputs(backward=results)


def _times(insert: Inserter, target: Any, node: fx.Node, scale: fx.Node) -> fx.Node:
    """`target(node, scale)` in the dtype of `node` (two scalars would promote to fp32)."""
    dtype = node.meta["val"].dtype
    made = insert(target, node, scale)
    if made.meta["val"].dtype == dtype:
        return made
    return insert(torch.ops.aten._to_copy.default, made, dtype=dtype)


def add_scalar(graph: TrainGraph, kind: str, dtype: torch.dtype) -> fx.Node:
    """The scalar input of that kind, on the graph's device; added if it is not there yet."""
    found = graph.placeholders(kind)
    if found:
        return found[0]
    device = graph.placeholders("tangent")[0].meta["val"].device
    with graph.fake_mode:
        value = torch.empty((), dtype=dtype, device=device)
    return graph.add_placeholder(kind, kind, value)
