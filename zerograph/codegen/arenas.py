"""Which operator writes a value straight into its place in an arena, and where that is.

    %2 = aten.add(%0, %1)                       %place = aten.as_strided(%a0, ..)
    %2.kept = zero.place %2, %a0[3] in place    aten.add.out(%0, %1, out=%place)

An arena is a tensor [values, length] of one dtype, whose rows begin at multiples of ALIGNMENT bytes: each is
the place of one value, which lies there with strides of its own. An operator of `in_place.WRITERS` can
write there if it computes this value, or what the value is a view of, with sizes that do not vary and without
gaps. Others' values are copied.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.codegen.in_place import WRITERS
from zerograph.codegen.packing import is_dense
from zerograph.compat import hint
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, region_of, role_of, view_root

ALIGNMENT = 128
"""Bytes; a place is aligned as memory of its own is (64 on a CPU), and no line of a cache is shared."""

_ARENA: dict[Any, int] = {ops.place: 1, ops.offload: 1, ops.partition_activation: 2}
"""What puts a value into an arena, and which of its arguments that is; the next one is the row."""


def length_of(value: Tensor) -> int:
    """Elements of a row for such a value: its own, rounded up; a symbol where sizes vary."""
    least = ALIGNMENT // value.dtype.itemsize
    return (value.numel() + least - 1) // least * least


def arena_of(node: fx.Node) -> fx.Node | None:
    """The placeholder of the arena that a node's result lies in; None for one that has none."""
    at = _ARENA.get(node.target, 0) if node.op == "call_function" else 0
    return cast(fx.Node, node.args[at]) if 0 < at < len(node.args) else None


def row_of(node: fx.Node) -> int:
    """The row of its arena in which a node's result lies."""
    return cast(int, node.args[_ARENA[cast(OpOverload, node.target)] + 1])


def offset_of(node: fx.Node) -> int | None:
    """Bytes from the start of its arena to a node's result, at the captured call's sizes."""
    arena = arena_of(node)
    if arena is None:
        return None
    value = arena.meta["val"]
    return row_of(node) * hint(value.shape[1]) * int(value.dtype.itemsize)


def can_write(place: fx.Node) -> bool:
    """Whether the operator that makes the value of a `zero.place` can write it there."""
    source, value = view_root(cast(fx.Node, place.args[0])), place.meta["val"]
    if source.op != "call_function" or source.target not in WRITERS:
        return False
    made = source.meta["val"]
    static = all(isinstance(n, int) for n in (*made.shape, *made.stride()))
    if not static or made.dtype != value.dtype or region_of(source) != region_of(place):
        return False
    return bool(made.numel() == value.numel()) and is_dense(made.shape, made.stride())


def writers(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(operator, place) of every value of `nodes` that is made in its place."""
    for node in nodes:
        if is_call(node, ops.place) and node.args[3:] == (True,):
            yield view_root(cast(fx.Node, node.args[0])), node


def emit(
    out: fx.Graph, source: fx.Node, place: fx.Node, arena: fx.Node, args: Any, kwargs: Any
) -> fx.Node:
    """Call `source`'s operator, with `args` and `kwargs` of `out`'s own, into its place in `arena`."""
    value = source.meta["val"]
    start = row_of(place) * cast(fx.Node, arena_of(place)).meta["val"].stride(0)
    where = list(value.shape), list(value.stride()), start
    row = out.call_function(torch.ops.aten.as_strided.default, (arena, *where))
    target = WRITERS[cast(OpOverload, source.target)]
    return out.call_function(target, args, {**kwargs, "out": row})


def places(graph: TrainGraph) -> dict[str, tuple[str, int]]:
    """(arena, row) by name of each value that the forward saves in an arena."""
    found = {}
    for node in graph.outputs("saved"):
        start = node.args[0] if node is not None and is_call(node, ops.wait) else node
        arena = arena_of(start) if isinstance(start, fx.Node) else None
        if isinstance(start, fx.Node) and arena is not None:
            found[cast(fx.Node, node).name] = role_of(arena).name, row_of(start)
    return found
