"""How each zero.* operator is lowered: one function an operator, which emits into a program.

lower.py walks the graph and calls them; its docstring shows what they make.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from zerograph import arenas, collectives, ops, transfers
from zerograph.codegen import dispatch, in_place, kernels, packing
from zerograph.cost import name_of
from zerograph.ir import TrainGraph
from zerograph.mesh import named
from zerograph.nodes import axis_of, bucket_of, is_ahead, is_call

if TYPE_CHECKING:
    from zerograph.passes.lower import Builder

c10d = torch.ops._c10d_functional
CHANNELS = {"gathers": (ops.gather,), "reductions": (ops.reduce_scatter, ops.all_reduce)}
"""What goes over each kind of channel, point-to-point; each axis has channels of its own."""

Handler = Callable[["Builder", fx.Node], fx.Node | None]


def _checkpoint(b: "Builder", node: fx.Node) -> fx.Node:
    value: fx.Node = b.args(node)[0]
    return value


def _bracket(b: "Builder", node: fx.Node) -> fx.Node:
    name, _, profiles = node.args
    return b.start("regions", name_of(node), name, b.region, profiles)


def _place(b: "Builder", node: fx.Node) -> fx.Node:
    if len(node.args) > 3:  # its operator has written it there
        value: fx.Node = b.args(node)[0]
        return value
    return b.call(arenas.keep, *b.args(node))


def _offload(b: "Builder", node: fx.Node) -> fx.Node:
    return b.call(transfers.offload, *b.args(node))


def _reload(b: "Builder", node: fx.Node) -> fx.Node:
    return b.call(transfers.reload, *b.args(node))


def _partition_activation(b: "Builder", node: fx.Node) -> fx.Node:
    value, _, *row = b.args(node)
    return b.start("mesh", "share", value, axis_of(node), *row)


def _gather_activation(b: "Builder", node: fx.Node) -> fx.Node:
    return _gathered(b, b.args(node)[0], node)


def _gather(b: "Builder", node: fx.Node) -> fx.Node:
    shard, bucket, *_ = b.args(node)
    if is_ahead(node) and b.graph.world > 1:
        return b.start("ahead", "take", shard, bucket)
    if not b.point_to_point:
        return _gathered(b, shard, node)
    return b.start(channel_of(node), "gather", shard, _empty(b, shard, node), bucket)


def _gathered(b: "Builder", shard: fx.Node, node: fx.Node) -> fx.Node:
    """An all-gather into a buffer that is made first.

    With one that the collective makes itself, gloo corrupts the heap (seen on torch 2.13) when two are
    under way and the first is freed.
    """
    if b.alone(node):
        return shard
    op = c10d.all_gather_into_tensor_out.default
    buffer = _empty(b, shard, node)
    return b.out.call_function(op, (shard, *b.among(node)), {"out": buffer})


def _empty(b: "Builder", like: fx.Node, node: fx.Node) -> fx.Node:
    return b.call(torch.ops.aten.new_empty.default, like, list(node.meta["val"].shape))


def _wait(b: "Builder", node: fx.Node) -> fx.Node:
    pending: fx.Node = b.args(node)[0]
    start = cast(fx.Node, node.args[0])
    if is_call(start, *ops.COPIES):
        return b.call(transfers.wait, pending)
    if b.alone(start):
        return pending
    if is_ahead(start) or (b.point_to_point and channel_of(start)):
        return b.out.call_method("wait", (pending,))
    done = b.call(collectives.wait, pending, called(start))
    if not is_call(start, ops.reduce_scatter, ops.all_reduce):
        return done
    _, post = _factors(start)
    return done if post in (None, 1.0) else b.call(torch.ops.aten.mul_.Scalar, done, post)


def channel_of(node: fx.Node) -> str:
    """The channel of a collective that goes point-to-point: `gathers/node`; empty for others."""
    kind = next((name for name, kinds in CHANNELS.items() if is_call(node, *kinds)), "")
    return f"{kind}/{axis_of(node)}" if kind and axis_of(node) else kind


def called(start: fx.Node) -> str:
    """What an error calls a collective: `the reduction of bucket b0 over dp_shard`."""
    gathers = dict.fromkeys((ops.gather, ops.refresh), "gather")
    reductions = dict.fromkeys((ops.reduce_scatter, ops.all_reduce), "reduction")
    kinds: dict[Any, str] = gathers | reductions
    kind = kinds.get(start.target, "")
    if is_call(start, ops.gather_activation):
        return named(
            f"the gather of activation {cast(fx.Node, start.args[0]).name}", axis_of(start)
        )
    what = f"the {kind} of bucket {bucket_of(start)}" if kind else f"the {name_of(start)}"
    return named(what, axis_of(start))


def _partition(b: "Builder", node: fx.Node) -> fx.Node:
    full = b.args(node)[0]
    return full if b.graph.world == 1 else b.start("mesh", "part", full, axis_of(node))


def _param(b: "Builder", node: fx.Node) -> fx.Node:
    full, _, offset, size, stride = b.args(node)
    return b.call(torch.ops.aten.as_strided.default, full, size, stride, offset)


def _release(b: "Builder", node: fx.Node) -> None:
    return None


def _grad_buffer(b: "Builder", node: fx.Node) -> fx.Node:
    like, bucket, numel, dtype = b.args(node)
    return b.call(kernels.grad_buffer, like, numel, dtype, _gaps(b.graph, node, bucket, numel))


def _gaps(graph: TrainGraph, node: fx.Node, bucket: str, numel: int) -> list[tuple[int, int]]:
    """What no `put` writes: padding and absent gradients, as (start, stop), neighbours joined."""
    filled: set[str] = set()
    while put := next((user for user in node.users if is_call(user, ops.put)), None):
        filled.add(cast(str, put.args[2]))
        node = put
    gaps: list[tuple[int, int]] = []
    for param, start, stop in graph.layout.extents(bucket):
        begin = start + param.numel if param.name in filled else start
        if begin < stop:
            joined = bool(gaps) and gaps[-1][1] == begin
            gaps[-1:] = [(gaps[-1][0], stop)] if joined else [*gaps[-1:], (begin, stop)]
    return gaps


def _put(b: "Builder", node: fx.Node) -> fx.Node:
    if in_place.is_in_place(node):
        return b.values[cast(fx.Node, node.args[0])]
    buffer, grad, _, offset, size, stride = b.args(node)
    target = kernels.put if packing.kernel_of(node) is None else kernels.pack
    return b.call(target, buffer, grad, offset, size, stride, packing.scale_of(node))


def _factors(node: fx.Node) -> tuple[float, float | None]:
    """(pre, post) of a reduction; no post where it is the collective's own average."""
    pre, post, world = cast(tuple[float, float, int], node.args[2:])
    return (1.0, None) if pre == 1.0 and post == 1 / world else (pre, post)


def _sent(b: "Builder", node: fx.Node) -> fx.Node:
    """The buffer of a reduction, scaled for the sum."""
    buffer: fx.Node = b.args(node)[0]
    pre, _ = _factors(node)
    put = packing.is_scaled(cast(fx.Node, node.args[0]))  # the puts have scaled it already
    scaled = pre != 1.0 and b.graph.world > 1 and not put
    return b.call(torch.ops.aten.mul_.Scalar, buffer, pre) if scaled else buffer


def _reduce_scatter(b: "Builder", node: fx.Node) -> fx.Node:
    sent, (_, post) = _sent(b, node), _factors(node)
    if b.point_to_point:
        mean = post is None
        return b.start(channel_of(node), "reduce_scatter", sent, node.args[1], mean, post or 1.0)
    op = c10d.reduce_scatter_tensor.default
    return b.collective(op, sent, sent, _operation(post), *b.among(node))


def _all_reduce(b: "Builder", node: fx.Node) -> fx.Node:
    sent, (_, post) = _sent(b, node), _factors(node)
    if b.point_to_point:
        mean = post is None
        return b.start(channel_of(node), "all_reduce", sent, node.args[1], mean, post or 1.0)
    return b.collective(c10d.all_reduce_.default, sent, sent, _operation(post), b.among(node)[1])


def _operation(post: float | None) -> str:
    return "avg" if post is None else "sum"


def _accumulate(b: "Builder", node: fx.Node) -> fx.Node:
    kept, grad, _, weight = b.args(node)
    return b.call(kernels.accumulate, kept, grad, weight, node.meta["val"].dtype)


def _norm_partials(b: "Builder", node: fx.Node) -> fx.Node:
    return b.call(dispatch.norm_partials, *b.args(node))


def _squares(b: "Builder", node: fx.Node) -> fx.Node:
    grad, _, parts = b.args(node)
    return b.call(dispatch.squares, grad, parts)


def _sum_squares(b: "Builder", node: fx.Node) -> fx.Node:
    first = cast(list[fx.Node], node.args[0])[0]
    dtype = cast(fx.Node, first.args[0]).meta["val"].dtype
    return b.call(dispatch.sum_squares, *b.args(node), dtype)


def _gather_partials(b: "Builder", node: fx.Node) -> fx.Node:
    partial, _ = b.args(node)
    return _gathered(b, partial, node)


def _finish(b: "Builder", node: fx.Node) -> fx.Node:
    return b.call(dispatch.finish, *b.args(node))


def _measure(b: "Builder", node: fx.Node) -> fx.Node:
    master, grad, state, hyper, used, control, bucket, _, _ = b.args(node)
    return b.out.call_method("measure", (hyper, bucket, master, grad, state, used, control))


def _gather_norms(b: "Builder", node: fx.Node) -> fx.Node:
    norms, _ = b.args(node)
    joined = b.call(torch.ops.aten.cat.default, norms)
    return _gathered(b, b.call(torch.ops.aten.unsqueeze.default, joined, 0), node)


def _sum_norms(b: "Builder", node: fx.Node) -> fx.Node:
    gathered, _, first, params = b.args(node)
    return b.call(kernels.sum_norms, gathered, first, params)


def _any_rank(b: "Builder", node: fx.Node) -> fx.Node:
    flags, _ = b.args(node)
    return b.collective(c10d.all_reduce.default, flags, flags, "max", b.among(node)[1])


def _sum_weights(b: "Builder", node: fx.Node) -> fx.Node:
    weight, _ = b.args(node)
    return b.collective(c10d.all_reduce.default, weight, weight, "sum", b.among(node)[1])


def _update(b: "Builder", node: fx.Node) -> fx.Node:
    """The `hyper` input carries the optimizer's groups, step counts and rule, and applies it."""
    master, grad, state, low, hyper, used, control, bucket, _, *norms = b.args(node)
    args = (hyper, bucket, master, grad, state, low, used, control, *norms)
    return b.out.call_method("update", args)


def _refresh(b: "Builder", node: fx.Node) -> fx.Node:
    full, shard, bucket, _ = b.args(node)
    return full if b.graph.world == 1 else b.start("ahead", "refresh", full, shard, bucket)


def _refreshed(b: "Builder", node: fx.Node) -> fx.Node:
    full, bucket = b.args(node)
    return full if b.graph.world == 1 else b.start("ahead", "refreshed", full, bucket)


def _gather_ahead(b: "Builder", node: fx.Node) -> fx.Node | None:
    shard, bucket, _ = b.args(node)
    return None if b.graph.world == 1 else b.start("ahead", "begin", shard, bucket)


HANDLERS: dict[Any, Handler] = {
    ops.checkpoint: _checkpoint,
    ops.enter: _bracket,
    ops.leave: _bracket,
    ops.place: _place,
    ops.offload: _offload,
    ops.reload: _reload,
    ops.partition_activation: _partition_activation,
    ops.gather_activation: _gather_activation,
    ops.gather: _gather,
    ops.partition: _partition,
    ops.wait: _wait,
    ops.param: _param,
    ops.release: _release,
    ops.grad_buffer: _grad_buffer,
    ops.put: _put,
    ops.reduce_scatter: _reduce_scatter,
    ops.all_reduce: _all_reduce,
    ops.accumulate: _accumulate,
    ops.norm_partials: _norm_partials,
    ops.squares: _squares,
    ops.sum_squares: _sum_squares,
    ops.gather_partials: _gather_partials,
    ops.finish: _finish,
    ops.measure: _measure,
    ops.gather_norms: _gather_norms,
    ops.sum_norms: _sum_norms,
    ops.any_rank: _any_rank,
    ops.sum_weights: _sum_weights,
    ops.update: _update,
    ops.refresh: _refresh,
    ops.refreshed: _refreshed,
    ops.gather_ahead: _gather_ahead,
}
