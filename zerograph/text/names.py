"""Names of values in a text: numbers for aten ops in order, buckets and parameters for zero.*."""

from typing import Any, cast

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.mesh import MODEL
from zerograph.nodes import axis_of, bucket_of, is_call, is_reduced, role_of, slice_of
from zerograph.sizes import Sizes


class Names(dict[fx.Node, str]):
    """Names of nodes, and of the symbols in their shapes."""

    sizes: Sizes


def names_of(graph: TrainGraph) -> Names:
    names = Names()
    names.sizes = graph.sizes
    for node in graph.placeholders():
        role = role_of(node)
        names[node] = {
            "input": f"%{role.name}",
            "buffer": f"%{role.name}",
            "constant": f"%{role.name}",
            "arena": f"%{role.name}",
            "size": f"%{role.name}",
            "param": f"%{role.name}",
            "tangent": f"%d_{role.name}",
            "hyper": "%hyper",
            "used": "%used",
            "scale": "%scale",
            "weight": "%weight",
            "state": "%" + role.name.replace("/", "."),
        }.get(role.kind, f"%{role.name}.{role.kind}")
    count = 0
    for node in graph.nodes():
        if ops.is_zero(node.target):
            names[node] = _zero_name(node, names)
        elif _is_of_finish(node):
            names[node] = ("%norm", "%control")[cast(int, node.args[1])]
        else:
            names[node] = f"%{count}"
            count += 1
    return names


def folded_names(names: Names) -> Names:
    """Names in a skeleton: values of aten ops have no number, which torch's decompositions decide."""
    folded = Names({n: _folded(n, name) for n, name in names.items()})
    folded.sizes = names.sizes
    return folded


def _folded(node: fx.Node, name: str) -> str:
    """A name in a skeleton; what is kept elsewhere is named after a value, which has no number there."""
    start = node.args[0] if is_call(node, ops.wait, ops.checkpoint) else node
    shares = (ops.partition_activation, ops.gather_activation)
    if is_call(cast(fx.Node, start), ops.place, *shares, *ops.COPIES):
        return f"%_.{name.rpartition('.')[2]}"
    return name if is_kept(node) else "%_"


def is_kept(node: fx.Node) -> bool:
    """Whether a skeleton shows a node: those of ZeRO, not those of aten."""
    return node.op == "placeholder" or ops.is_zero(node.target) or _is_of_finish(node)


def _zero_name(node: fx.Node, names: Names) -> str:
    first = node.args[0]
    if is_call(node, ops.checkpoint, ops.wait, ops.put, ops.refreshed):
        return names[cast(fx.Node, first)]
    if is_call(node, ops.place):
        return f"{names[cast(fx.Node, first)]}.kept"
    if is_call(node, ops.offload):
        return f"{names[cast(fx.Node, first)]}.host"
    if is_call(node, ops.reload):
        return f"{names[cast(fx.Node, first)].removesuffix('.host')}.back"
    if is_call(node, ops.partition_activation):
        return f"{names[cast(fx.Node, first)]}.share"
    if is_call(node, ops.gather_activation):
        return f"{names[cast(fx.Node, first)].partition('.share')[0]}.whole"
    if is_call(node, ops.param):
        return f"%{node.args[1]}"
    if is_call(node, ops.finish):
        return "%finish"
    if is_call(node, ops.norm_partials, ops.sum_squares):
        return "%partial"
    if is_call(node, ops.gather_partials):
        return "%partials.mp" if axis_of(node) == MODEL else "%partials"
    if is_call(node, ops.gather_norms):
        return "%norms"
    if is_call(node, ops.any_rank):
        return "%used_anywhere"
    if is_call(node, ops.sum_weights):
        return "%weights"
    if is_call(node, ops.all_reduce) and slice_of(node) is not None:
        return f"%{bucket_of(node)}.whole"
    if is_call(node, ops.partition) and is_reduced(node):
        return f"%{bucket_of(node)}{'.group' if axis_of(node) else '.mean'}"
    suffix = {
        ops.gather: "",
        ops.partition: ".second",
        ops.grad_buffer: ".grad",
        ops.reduce_scatter: ".group" if axis_of(node) else ".mean",
        ops.all_reduce: ".mean",
        ops.accumulate: ".sum",
        ops.squares: ".squares",
        ops.measure: ".norms",
        ops.sum_norms: ".totals",
        ops.refresh: ".full",
    }.get(cast(Any, node.target), "")
    return f"%{bucket_of(node)}{suffix}"


def _is_of_finish(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and is_call(source, ops.finish)
