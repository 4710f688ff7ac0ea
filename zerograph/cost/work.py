"""What a node computes: floating-point operations, and bytes read from and written to memory.

FLOPs are those of matrix products, convolutions and attention (a multiply-add is two), by the formulas of
`torch.utils.flop_counter` and those below for what it does not know; causal attention computes the pairs on
and below the diagonal alone. Every other operator is bound by memory and is taken to do none.

Bytes are those of the distinct elements read and written: an expanded dim counts once, a lookup reads only
the rows that it takes, what is changed in place is read and written. Views, waits, releases and collectives
move nothing here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import flop_counter
from torch.utils.flop_counter import flop_registry

from zerograph import ops
from zerograph.codegen.in_place import is_in_place
from zerograph.compat import hint
from zerograph.nodes import is_call, is_view, map_tensors


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes of memory traffic."""

    flops: int = 0
    nbytes: int = 0
    dtype: torch.dtype = torch.float32
    """The type of the products, which decides how fast a device makes them."""


_WITHOUT_WORK = (
    *ops.BRACKETS,
    ops.gather_ahead,
    ops.refreshed,
    ops.wait,
    ops.release,
    ops.grad_buffer,
)


def work_of(node: fx.Node) -> Work:
    """The work of one call on its device; collectives, waits, releases and views have none."""
    idle = is_call(node, *ops.COLLECTIVES, *_WITHOUT_WORK)
    if idle or is_view(node) or not isinstance(node.target, OpOverload):
        return Work()
    rule = _TRAFFIC.get(_name(node))
    moved = _everything(node) if rule is None else rule(node, _arguments(node))
    return Work(_flops(node), moved, _dtype(node))


def _name(node: fx.Node) -> str:
    """`aten.add` for all of its overloads, in place or not."""
    name = cast(OpOverload, node.target)._schema.name
    return name.replace("::", ".").removesuffix("_")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of its schema, as values."""
    schema = cast(OpOverload, node.target)._schema
    named = {**dict(zip((a.name for a in schema.arguments), node.args)), **node.kwargs}
    return cast(dict[str, Any], fx.map_arg(named, lambda n: n.meta.get("val")))


def _dtype(node: fx.Node) -> torch.dtype:
    values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
    floats = (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return next((v.dtype for v in floats), torch.float32)


# FLOPs


def _flops(node: fx.Node) -> int:
    name, target = _name(node), cast(Any, node.target)
    if name not in _FLOPS and target.overloadpacket not in flop_registry:
        return 0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _plain(n.meta["val"]))
    if name in _FLOPS:
        count = _FLOPS[name]([tuple(a.shape) for a in args if isinstance(a, Tensor)])
    else:
        formula = flop_registry[target.overloadpacket]
        count = int(formula(*args, **kwargs, out_val=_plain(node.meta["val"])))
    return _below_diagonal(count, _arguments(node)) if "attention" in name else count


def _plain(value: Any) -> Any:
    """A value with the captured call's sizes, so that no formula compares symbols."""
    if isinstance(value, Tensor):
        return torch.empty([hint(n) for n in value.shape], dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return hint(value) if isinstance(value, torch.SymInt) else value


def _below_diagonal(count: int, given: dict[str, Any]) -> int:
    """Of an attention's FLOPs, those of the pairs that a causal mask leaves."""
    if not given.get("is_causal"):
        return count
    queries, keys = (hint(given[name].shape[-2]) for name in ("query", "key"))
    low = min(queries, keys)
    pairs = low * (low + 1) // 2 + (queries - low) * keys
    return count * pairs // (queries * keys)


Shapes = Sequence[tuple[int, ...]]


def _matrix_vector(shapes: Shapes) -> int:
    return 2 * max(prod(shape) for shape in shapes)


def _grouped(shapes: Shapes) -> int:
    """Rows [m, k], each times the matrix of its group, one of [groups, k, n]."""
    (rows, inner), (_, _, columns) = shapes[:2]
    return 2 * rows * inner * columns


def _attention(shapes: Shapes) -> int:
    return int(flop_counter.sdpa_flop_count(*shapes[:3]))  # type: ignore[no-untyped-call]


def _attention_backward(shapes: Shapes) -> int:
    return int(flop_counter.sdpa_backward_flop_count(*shapes[:4]))  # type: ignore[no-untyped-call]


_FLOPS: dict[str, Callable[[Shapes], int]] = {
    "aten.mv": _matrix_vector,
    "aten.addmv": _matrix_vector,
    "aten.dot": _matrix_vector,
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": lambda shapes: 2 * _grouped(shapes),
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
"""From the shapes of the positional tensors; what torch's registry lacks."""


# Bytes

Arguments = dict[str, Any]


def _bytes(*values: Any) -> int:
    """Bytes of the distinct elements of tensors, lists of them, or neither."""
    return sum(map_tensors(values, _distinct))


def _distinct(tensor: Tensor) -> int:
    extents = (hint(n) for n, step in zip(tensor.shape, tensor.stride()) if hint(step) != 0)
    return prod(extents) * tensor.dtype.itemsize


def _everything(node: fx.Node) -> int:
    """All inputs are read, once each, and the result is written."""
    read = {n: n.meta.get("val") for n in node.all_input_nodes}
    return _bytes(*read.values(), node.meta["val"])


def _written(node: fx.Node, given: Arguments) -> int:
    return _bytes(node.meta["val"])


def _rows_read(node: fx.Node, given: Arguments) -> int:
    """As many elements are read as are written, and the indices."""
    indices = _bytes(given.get("indices"), given.get("index"))
    return 2 * _bytes(node.meta["val"]) + indices


def _rows_added(node: fx.Node, given: Arguments) -> int:
    """Zeros everywhere, then each row of the gradient is added to one of them."""
    return _bytes(node.meta["val"], given["indices"]) + 3 * _bytes(given["grad_output"])


def _rows_written(node: fx.Node, given: Arguments) -> int:
    """A copy (unless in place), then some elements are written."""
    values = _bytes(given.get("values"), given.get("src"), given.get("source"))
    indices = _bytes(given.get("indices"), given.get("index"))
    in_place = cast(OpOverload, node.target)._schema.is_mutable
    return (0 if in_place else 2 * _bytes(node.meta["val"])) + 2 * values + indices


def _loss(node: fx.Node, given: Arguments) -> int:
    """One element of each row of the logarithms is read."""
    target = given["target"]
    picked: int = hint(target.numel()) * given["self"].dtype.itemsize
    return _bytes(target, node.meta["val"], given.get("weight")) + picked


def _copied(node: fx.Node, given: Arguments) -> int:
    return _bytes(given["src"], node.meta["val"])


def _placed(node: fx.Node, given: Arguments) -> int:
    """The value is read and written, unless it was made in its place."""
    return 0 if given.get("in_place") else 2 * _bytes(node.meta["val"])


def _put(node: fx.Node, given: Arguments) -> int:
    """The gradient is read, and written in the buffer's dtype, unless it was made there."""
    if is_in_place(node):
        return 0
    grad, buffer = given["grad"], given["buffer"]
    return _bytes(grad) + hint(grad.numel()) * int(buffer.dtype.itemsize)


def _accumulate(node: fx.Node, given: Arguments) -> int:
    """The only micro-batch's gradient is kept as it is, or cast; of several each is added."""
    kept, grad = given["kept"], given["grad"]
    if given["weight"] != 1.0:
        return _bytes(grad, kept, kept)
    return 0 if grad.dtype == kept.dtype else _bytes(grad, kept)


def _update(node: fx.Node, given: Arguments) -> int:
    """Master and the rule's states are read and written, the gradient read, the copy written.

    After a `measure` the states are read alone, and the gradient is not.
    """
    if given.get("norms") is not None:
        return _bytes(given["master"], given["master"], given["state"], given["low"])
    changed = _bytes(given["master"], given["state"])
    return 2 * changed + _bytes(given["grad"], given["low"])


def _measure(node: fx.Node, given: Arguments) -> int:
    """The rule's states are read and written, master and gradient read."""
    return _bytes(given["master"], given["grad"]) + 2 * _bytes(given["state"])


_TRAFFIC: dict[str, Callable[[fx.Node, Arguments], int]] = {
    **dict.fromkeys(("aten.empty", "aten.empty_like", "aten.new_empty"), lambda node, given: 0),
    **dict.fromkeys(
        (
            *("aten.full", "aten.full_like", "aten.fill", "aten.new_full", "aten.arange"),
            *("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.zero", "aten.ones"),
            *("aten.ones_like", "aten.new_ones", "aten.bernoulli", "aten.rand_like"),
        ),
        _written,
    ),
    **dict.fromkeys(("aten.embedding", "aten.index", "aten.gather"), _rows_read),
    **dict.fromkeys(("aten.index_select", "aten.take_along_dim"), _rows_read),
    "aten.embedding_dense_backward": _rows_added,
    **dict.fromkeys(("aten.index_put", "aten._unsafe_index_put", "aten.scatter"), _rows_written),
    **dict.fromkeys(("aten.scatter_add", "aten.index_add", "aten.index_copy"), _rows_written),
    "aten.nll_loss_forward": _loss,
    "aten.nll_loss_backward": _loss,
    "aten.copy": _copied,
    "zero.partition_activation": lambda node, given: 2 * _bytes(node.meta["val"]),
    "zero.partition": lambda node, given: 2 * _bytes(node.meta["val"]),
    "zero.place": _placed,
    "zero.offload": _placed,
    "zero.put": _put,
    "zero.accumulate": _accumulate,
    "zero.measure": _measure,
    "zero.update": _update,
}
