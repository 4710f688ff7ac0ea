"""Which operator writes a gradient straight into its place in the bucket's buffer.

    %8 = aten.mm(%5, %x)                        %place = aten.as_strided(%b0.grad, ..)
    %9 = aten.view(%8, [64, 32])            ->  aten.mm.out(%5, %x, out=%place)
    zero.put %b0.grad, %9 "w" in place

It may when its result becomes this gradient and nothing else, through views alone, lies in memory as the
place does, has the buffer's dtype, and is not multiplied by a factor. Those of WRITERS compute their result
where `out` says as they would into memory of their own: the same strides, the same bits, no temporary. Places
start at multiples of 128 bytes, so they are aligned as an operator's own memory is.

What torch tags `generated` among its out variants computes elsewhere and copies (embedding_dense_backward,
convolution_backward, native_layer_norm_backward). A product that lies the other way round than its place is
copied as well: written transposed it is another product, with other bits in fp64.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.codegen.packing import is_dense, same_layout, scale_of
from zerograph.nodes import is_call, is_view, region_of

aten = torch.ops.aten
WRITERS: dict[OpOverload, OpOverload] = {
    aten.mm.default: aten.mm.out,
    aten.addmm.default: aten.addmm.out,
    aten.bmm.default: aten.bmm.out,
    aten.baddbmm.default: aten.baddbmm.out,
    aten.sum.dim_IntList: aten.sum.IntList_out,
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.mul.Tensor: aten.mul.out,
    aten.div.Tensor: aten.div.out,
}
"""Operators that can, and how each is called with `out`."""


def is_in_place(node: fx.Node) -> bool:
    """Whether a node is a `zero.put` whose gradient is in its place already."""
    return is_call(node, ops.put) and len(node.args) > 6 and bool(node.args[6])


def views_of(put: fx.Node) -> list[fx.Node]:
    """The views through which a put's gradient is seen, from the last to the first."""
    node, found = cast(fx.Node, put.args[1]), []
    while is_view(node):
        found.append(node)
        node = cast(fx.Node, node.args[0])
    return found


def source_of(put: fx.Node) -> fx.Node:
    """The node that computes a put's gradient."""
    views = views_of(put)
    return cast(fx.Node, (views[-1].args[0]) if views else put.args[1])


def can_write(put: fx.Node) -> bool:
    """Whether the operator that makes a put's gradient can write it into its place."""
    source, buffer, grad = source_of(put), cast(fx.Node, put.args[0]), cast(fx.Node, put.args[1])
    if source.op != "call_function" or source.target not in WRITERS:
        return False
    alone = all(len(node.users) == 1 for node in (source, *views_of(put)))
    backward = region_of(source) == region_of(put)
    if not alone or not backward or scale_of(put) != 1.0:
        return False
    made, dtype = source.meta["val"], buffer.meta["val"].dtype
    return made.dtype == dtype and _covers(made, grad.meta["val"], *_place(put))


def _place(put: fx.Node) -> tuple[list[int], list[int]]:
    return cast(tuple[list[int], list[int]], put.args[4:6])


def _covers(made: Tensor, grad: Tensor, size: list[int], stride: list[int]) -> bool:
    """Whether `made` [any shape] fills a range of memory that `grad`, a view of it, sees as the place."""
    static = all(isinstance(n, int) for n in (*made.shape, *made.stride()))
    if not static or grad.storage_offset() != 0 or made.numel() != grad.numel():
        return False
    dense = is_dense(made.shape, made.stride()) and is_dense(size, stride)
    return dense and same_layout(grad.stride(), size, stride)


def buffer_of(put: fx.Node) -> fx.Node:
    """The `zero.grad_buffer` that a put writes to."""
    node = put
    while is_call(node, ops.put):
        node = cast(fx.Node, node.args[0])
    return node


def writers(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """(operator, put, views between them) of every put of `nodes` that is in place."""
    for node in nodes:
        if is_in_place(node):
            yield source_of(node), node, views_of(node)


def emit(
    out: fx.Graph, source: fx.Node, put: fx.Node, buffer: fx.Node, args: Any, kwargs: Any
) -> fx.Node:
    """Call `source`'s operator, with `args` and `kwargs` of `out`'s own, into its place in `buffer`."""
    value = source.meta["val"]
    where = list(value.shape), list(value.stride()), put.args[3]
    place = out.call_function(aten.as_strided.default, (buffer, *where))
    target = WRITERS[cast(OpOverload, source.target)]
    return out.call_function(target, args, {**kwargs, "out": place})
