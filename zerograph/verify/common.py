"""What the checks share: the bucket that a node is about, what a value was, and how to say it."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.cost import name_of
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, region_of

Check = Callable[[TrainGraph], Iterator[str]]
"""Answers what is wrong with a graph, a sentence each."""

_BUCKET_ARGUMENT = {
    ops.gather: 1,
    ops.gather_ahead: 1,
    ops.partition: 1,
    ops.refreshed: 1,
    ops.release: 1,
    ops.grad_buffer: 1,
    ops.reduce_scatter: 1,
    ops.all_reduce: 1,
    ops.squares: 1,
    ops.accumulate: 2,
    ops.refresh: 2,
    ops.measure: 6,
    ops.sum_norms: 1,
    ops.update: 7,
}


def bucket_of(node: fx.Node) -> str | None:
    """The bucket that a zero.* node is about, if it is about one."""
    index = _BUCKET_ARGUMENT.get(cast(OpOverload, node.target))
    return None if index is None else cast(str, node.args[index])


def say(node: fx.Node) -> str:
    """`the gather of b1 in the forward`."""
    bucket = bucket_of(node)
    return f"the {name_of(node)}{f' of {bucket}' if bucket else ''} in the {region_of(node)}"


def source_of(node: fx.Node) -> fx.Node:
    """What a value was before it was waited for and cast."""
    while is_call(node, ops.wait, torch.ops.aten._to_copy.default):
        node = cast(fx.Node, node.args[0])
    return node
