"""lower: the rewritten graph becomes three programs that run.

    zero.gather %b0.shard         ->  c10d.all_gather_into_tensor_out(%b0.shard, 8, "dp", out=empty)
    zero.wait %b0                 ->  c10d.wait_tensor(%b0)
    zero.param %b0 "w"            ->  aten.as_strided(%b0, [64, 32], [32, 1], 0)     a view, no copy
    zero.release %b0              ->  nothing: a value's storage ends with its last use
    zero.update ..                ->  a kernel

Every node of a program carries in `meta["plan"]` the index in `graph.nodes()` of the node that it comes from.
This is the only file that knows c10d. With a world of one rank no collective is left. A program takes
its inputs in a list that it empties, so that each input's storage can end at its last use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, cast

import torch
from torch import fx

from zerograph import ops
from zerograph.codegen import dispatch, kernels, packing
from zerograph.ir import Region, Role, TrainGraph, is_call, role_of

c10d = torch.ops._c10d_functional
_KEPT = ("buffer", "constant", "input", "size")
"""Inputs that the backward takes as they were in the forward."""


@dataclass(frozen=True)
class Program:
    """One region, ready to run: `module(list of inputs)` answers a tuple."""

    region: Region
    module: fx.GraphModule
    inputs: tuple[Role, ...]
    """Roles of the inputs; kind "saved" is the forward's saved value of that name."""
    outputs: int
    """Number of results (forward), gradients (backward) or scalars (step) in the answer."""
    first: int
    """Index in `graph.nodes()` of the region's first node."""
    saved: tuple[str, ...] = ()
    """Names of the values that the forward's answer ends with."""


@dataclass(frozen=True)
class Lower:
    """Options: the process group's name, as the functional collectives know it."""

    group: str = "dp"

    def program(self, graph: TrainGraph, region: Region) -> Program:
        builder = _Builder(graph, region, self.group)
        return builder.build()


@dataclass
class _Builder:
    graph: TrainGraph
    region: Region
    group: str
    out: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inputs: list[Role] = field(default_factory=list)

    def build(self) -> Program:
        nodes = self.graph.nodes(self.region)
        results = self.graph.outputs(self.region)
        saved = self.graph.outputs("saved") if self.region == "forward" else ()
        for node in self._needed(nodes, (*results, *saved)):
            self.values[node] = self.out.placeholder(node.name)
            self.inputs.append(self._role(node))
        first = self.graph.nodes().index(nodes[0]) if nodes else 0
        for index, node in enumerate(nodes, first):
            self._emit(node)
            self._mark(index)
        returned = [self.values[n] if n is not None else None for n in (*results, *saved)]
        self.out.output(tuple(returned))
        self.out.set_codegen(_Boxed())
        module = fx.GraphModule(
            self.graph.module, self.out, class_name=f"Zero{self.region.title()}"
        )
        names = tuple(n.name for n in saved if n is not None)
        return Program(self.region, module, tuple(self.inputs), len(results), first, names)

    def _needed(self, nodes: Sequence[fx.Node], results: Sequence[fx.Node | None]) -> list[fx.Node]:
        """Values from outside the region that it reads, in graph order."""
        own = set(nodes)
        read = {n for node in nodes for n in node.all_input_nodes if n not in own}
        read.update(n for n in results if n is not None and n not in own)
        return sorted(read)

    def _role(self, node: fx.Node) -> Role:
        if node.op == "placeholder":
            role = role_of(node)
            kept = self.region == "backward" and role.kind in _KEPT
            return Role("saved", node.name) if kept else role
        if is_call(node, ops.accumulate):
            return Role("kept", cast(str, node.args[2]))
        return Role("saved", node.name)

    # Emitting

    def _emit(self, node: fx.Node) -> None:
        handler = _HANDLERS.get(node.target) if ops.is_zero(node.target) else None
        if handler is None:
            assert not ops.is_zero(node.target), f"no lowering for {node.target}"
            self.values[node] = self.out.node_copy(node, self._value)
            return
        result = handler(self, node)
        if result is not None:
            self.values[node] = result
            result.meta["val"] = node.meta.get("val")

    def _mark(self, index: int) -> None:
        """Say of the nodes made last which node of the plan they come from."""
        for made in takewhile(_unmarked, reversed(self.out.nodes)):
            made.meta["plan"] = index

    def _value(self, node: fx.Node) -> fx.Node:
        return self.values[node]

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self.out.call_function(target, args)

    def args(self, node: fx.Node) -> tuple[Any, ...]:
        return cast(tuple[Any, ...], fx.map_arg(node.args, self._value))

    def collective(self, target: Callable[..., Any], alone: fx.Node, *args: Any) -> fx.Node:
        """`target(*args)`, or `alone` when there is nobody to talk to."""
        return alone if self.graph.world == 1 else self.call(target, *args)


def _unmarked(node: fx.Node) -> bool:
    return node.op != "placeholder" and "plan" not in node.meta


Handler = Callable[[_Builder, fx.Node], fx.Node | None]


def _gather(b: _Builder, node: fx.Node) -> fx.Node:
    shard, _, _ = b.args(node)
    return _gathered(b, shard, node)


def _gathered(b: _Builder, shard: fx.Node, node: fx.Node) -> fx.Node:
    """An all-gather into a buffer that is made first.

    With one that the collective makes itself, gloo corrupts the heap (seen on torch 2.13) when two are
    under way and the first is freed.
    """
    if b.graph.world == 1:
        return shard
    buffer = b.call(torch.ops.aten.new_empty.default, shard, list(node.meta["val"].shape))
    op = c10d.all_gather_into_tensor_out.default
    return b.out.call_function(op, (shard, b.graph.world, b.group), {"out": buffer})


def _wait(b: _Builder, node: fx.Node) -> fx.Node:
    (pending,) = b.args(node)
    done = b.collective(c10d.wait_tensor.default, pending, pending)
    start = cast(fx.Node, node.args[0])
    if b.graph.world == 1 or not is_call(start, ops.reduce_scatter, ops.all_reduce):
        return done
    pre, post, world = cast(tuple[float, float, int], start.args[2:])
    summed = not _is_mean(pre, post, world) and post != 1.0
    return b.call(torch.ops.aten.mul_.Scalar, done, post) if summed else done


def _param(b: _Builder, node: fx.Node) -> fx.Node:
    full, _, offset, size, stride = b.args(node)
    return b.call(torch.ops.aten.as_strided.default, full, size, stride, offset)


def _release(b: _Builder, node: fx.Node) -> None:
    return None


def _grad_buffer(b: _Builder, node: fx.Node) -> fx.Node:
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


def _put(b: _Builder, node: fx.Node) -> fx.Node:
    buffer, grad, _, offset, size, stride = b.args(node)
    target = kernels.put if packing.kernel_of(node) is None else kernels.pack
    return b.call(target, buffer, grad, offset, size, stride, packing.scale_of(node))


def _is_mean(pre: float, post: float, world: int) -> bool:
    """Whether the collective's own average does it."""
    return pre == 1.0 and post == 1 / world


def _reduced(b: _Builder, node: fx.Node) -> tuple[fx.Node, str]:
    """What is sent, and the collective's operation; `_wait` multiplies by the rest."""
    buffer, _, pre, post, world = b.args(node)
    if _is_mean(pre, post, world):
        return buffer, "avg"
    if b.graph.world > 1 and pre != 1.0 and not packing.is_scaled(cast(fx.Node, node.args[0])):
        buffer = b.call(torch.ops.aten.mul_.Scalar, buffer, pre)
    return buffer, "sum"


def _reduce_scatter(b: _Builder, node: fx.Node) -> fx.Node:
    sent, how = _reduced(b, node)
    op = c10d.reduce_scatter_tensor.default
    return b.collective(op, sent, sent, how, b.graph.world, b.group)


def _all_reduce(b: _Builder, node: fx.Node) -> fx.Node:
    sent, how = _reduced(b, node)
    return b.collective(c10d.all_reduce_.default, sent, sent, how, b.group)


def _accumulate(b: _Builder, node: fx.Node) -> fx.Node:
    kept, grad, _, weight = b.args(node)
    return b.call(kernels.accumulate, kept, grad, weight, node.meta["val"].dtype)


def _norm_partials(b: _Builder, node: fx.Node) -> fx.Node:
    return b.call(dispatch.norm_partials, *b.args(node))


def _gather_partials(b: _Builder, node: fx.Node) -> fx.Node:
    partial, _ = b.args(node)
    return _gathered(b, partial, node)


def _finish(b: _Builder, node: fx.Node) -> fx.Node:
    return b.call(dispatch.finish, *b.args(node))


def _measure(b: _Builder, node: fx.Node) -> fx.Node:
    master, grad, state, hyper, used, control, bucket, _, _ = b.args(node)
    return b.out.call_method("measure", (hyper, bucket, master, grad, state, used, control))


def _gather_norms(b: _Builder, node: fx.Node) -> fx.Node:
    norms, _ = b.args(node)
    joined = b.call(torch.ops.aten.cat.default, norms)
    return _gathered(b, b.call(torch.ops.aten.unsqueeze.default, joined, 0), node)


def _sum_norms(b: _Builder, node: fx.Node) -> fx.Node:
    gathered, _, first, params = b.args(node)
    return b.call(kernels.sum_norms, gathered, first, params)


def _any_rank(b: _Builder, node: fx.Node) -> fx.Node:
    flags, _ = b.args(node)
    return b.collective(c10d.all_reduce.default, flags, flags, "max", b.group)


def _sum_weights(b: _Builder, node: fx.Node) -> fx.Node:
    weight, _ = b.args(node)
    return b.collective(c10d.all_reduce.default, weight, weight, "sum", b.group)


def _update(b: _Builder, node: fx.Node) -> fx.Node:
    """The `hyper` input carries the optimizer's groups, step counts and rule, and applies it."""
    master, grad, state, low, hyper, used, control, bucket, _, *norms = b.args(node)
    args = (hyper, bucket, master, grad, state, low, used, control, *norms)
    return b.out.call_method("update", args)


def _refresh(b: _Builder, node: fx.Node) -> fx.Node:
    full: fx.Node
    full, shard, _, world = b.args(node)
    if b.graph.world == 1:
        return full
    op = c10d.all_gather_into_tensor_out.default
    return b.out.call_function(op, (shard, world, b.group), {"out": full})


_HANDLERS: dict[Any, Handler] = {
    ops.gather: _gather,
    ops.wait: _wait,
    ops.param: _param,
    ops.release: _release,
    ops.grad_buffer: _grad_buffer,
    ops.put: _put,
    ops.reduce_scatter: _reduce_scatter,
    ops.all_reduce: _all_reduce,
    ops.accumulate: _accumulate,
    ops.norm_partials: _norm_partials,
    ops.gather_partials: _gather_partials,
    ops.finish: _finish,
    ops.measure: _measure,
    ops.gather_norms: _gather_norms,
    ops.sum_norms: _sum_norms,
    ops.any_rank: _any_rank,
    ops.sum_weights: _sum_weights,
    ops.update: _update,
    ops.refresh: _refresh,
}


class _Boxed(fx.graph.CodeGen):
    """Code that takes its inputs in a list and empties it."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        head = f"def {self._func_name}(self, inputs){maybe_return_annotation}:"
        if not names:
            return head
        return f"{head}\n    {', '.join(names)}, = inputs\n    inputs.clear()"
