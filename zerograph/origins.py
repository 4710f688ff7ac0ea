"""Where each node of a joint graph comes from: its region and module; and that no gradient is lost."""

import re
from typing import Any

import torch
from torch import fx, nn

from zerograph import nodes
from zerograph.errors import CaptureError
from zerograph.fakes import requires_grad
from zerograph.ir import TrainGraph


def write_origins(graph: TrainGraph) -> None:
    """Give every node its region and module, and keep forward nodes before backward ones."""
    after_tangent: set[fx.Node] = set(graph.placeholders("tangent"))
    for node in graph.nodes():
        tagged = node.meta.get("partitioner_tag") == "is_backward"
        derived = any(source in after_tangent for source in node.all_input_nodes)
        if derived or (tagged and graph.training):
            after_tangent.add(node)
        node.meta["region"] = "backward" if node in after_tangent else "forward"
        node.meta["module"] = _module_name(node)
    for result in graph.outputs("forward"):
        if isinstance(result, fx.Node) and result.op == "call_function":
            assert nodes.region_of(result) == "forward", f"{result} is an output of the forward"
    for node in graph.nodes("backward"):
        graph.output.prepend(node)


def _module_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    last = next(reversed(list(stack.values())), None)
    if last is None:
        return ""
    path = re.sub(r"^L\[['\"][^\]]*['\"]\]", "", str(last[0]))  # the name of forward's own `self`
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    parts = [p for p in path.split(".") if p and p != "_modules"]
    return ".".join(parts)


def require_gradients(graph: TrainGraph, model: nn.Module) -> None:
    """A trainable parameter that a differentiable output depends on must have a gradient, and a dense one."""
    if not graph.training:
        return
    for gradient, node in zip(graph.gradients, graph.outputs("backward"), strict=True):
        if isinstance(node, fx.Node) and node.meta["val"].layout is not torch.strided:
            raise CaptureError(
                f"the gradient of {gradient.name} is sparse, and gradients are reduced in dense buckets; "
                "make its module (torch.nn.Embedding or EmbeddingBag) with sparse=False"
            )
    have = {gradient.name for gradient in graph.gradients if gradient.kind == "param"}
    assert all(graph.layout.params[name].trainable for name in have), "laid out as frozen"
    results = zip(graph.results, graph.outputs("forward"), strict=True)
    needed: set[fx.Node] = {n for r, n in results if r.differentiable and isinstance(n, fx.Node)}
    for node in reversed(graph.nodes("forward")):
        if node in needed and _may_carry_gradient(node):
            needed.update(node.all_input_nodes)
    for node in graph.placeholders("param"):
        name = nodes.role_of(node).name
        if node in needed and requires_grad(model, name) and name not in have:
            raise CaptureError(
                f"parameter {name} is trainable and the forward's result depends on it, but no "
                "gradient reaches it; if that is meant (a no_grad() region), call "
                "requires_grad_(False) on it or detach() it where it is used"
            )


def _may_carry_gradient(node: fx.Node) -> bool:
    target: Any = node.target
    if target in (torch.ops.aten.detach.default, torch.ops.aten.sign.default):
        return False
    value = node.meta.get("val")
    return any(nodes.map_tensors(value, lambda t: t.dtype.is_floating_point or t.dtype.is_complex))
