"""lower: the rewritten graph becomes three programs that run.

    zero.gather %b0.shard         ->  c10d.all_gather_into_tensor_out(%b0.shard, 8, "dp", out=empty)
    zero.wait %b0                 ->  collectives.wait(%b0, "the gather of bucket b0")
      or, point-to-point:         ->  gathers.gather(%b0.shard, empty, "b0"), its wait()
    zero.partition %b1 over node  ->  mesh.part(%b1, "node")                       a copy of the own slice
    zero.partition_activation %3  ->  mesh.share(%3, "mp")                         a copy of the own share
    zero.param %b0 "w"            ->  aten.as_strided(%b0, [64, 32], [32, 1], 0)     a view, no copy
    zero.release %b0              ->  nothing: a value's storage ends with its last use
    %8 = aten.mm(..)              ->  aten.mm.out(.., out=a view of %b0.grad)
    zero.put %b0.grad, %8 "w" in place   nothing
    zero.enter "layers.0"         ->  regions.enter("layers.0", "forward", ..)
    zero.place %2, %a0[3]         ->  arenas.keep(%2, %a0, 3); in place as a gradient is
    zero.update ..                ->  a kernel

Every node of a program carries in `meta["plan"]` the index in `graph.nodes()` of the node that it comes from,
and one that starts a collective in `meta["called"]` what errors call it. Which algorithm moves the buckets
is a note of the graph (collectives.py); small messages are c10d's on every backend. With a world of one rank
no collective is left. A program takes its inputs in a list that it empties, so that each input's storage can
end at its last use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from zerograph import collectives, ops
from zerograph.codegen import arenas, in_place
from zerograph.cost import collective_bytes, name_of
from zerograph.ir import TrainGraph
from zerograph.nodes import Region, Role, axis_of, bucket_of, is_ahead, is_call, role_of
from zerograph.passes.lowerings import HANDLERS, called, channel_of

aten = torch.ops.aten

_AHEAD = (ops.gather_ahead, ops.refresh, ops.refreshed)
_KEPT = ("buffer", "constant", "input", "size")
"""Inputs that the backward takes as they were in the forward."""


class Started(NamedTuple):
    """A collective that a program starts."""

    kind: str
    bucket: str
    """Empty for one of no bucket."""
    axis: str
    nbytes: int


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
    pending: frozenset[str] = frozenset()
    """Names of those that are collectives under way, whose values are still to come."""
    starts: dict[str, Started] = field(default_factory=dict, compare=False)
    """The collectives that it starts, by what errors call each."""
    placed: dict[str, tuple[str, int]] = field(default_factory=dict, compare=False)
    """By name of a saved value that lies in an arena, the arena and the row."""


GroupName = Callable[[str], str]
"""Answers the name of the process group along an axis, as the functional collectives know it."""


def unnamed(axis: str) -> str:
    """A name for programs that are looked at, not run."""
    return axis or "dp"


@dataclass(frozen=True)
class Lower:
    """Options: the names of process groups."""

    group: GroupName = unnamed

    def program(self, graph: TrainGraph, region: Region) -> Program:
        builder = Builder(graph, region, self.group)
        return builder.build()


@dataclass
class Builder:
    graph: TrainGraph
    region: Region
    group: GroupName
    out: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inputs: list[Role] = field(default_factory=list)
    channels: dict[str, fx.Node] = field(default_factory=dict)
    writers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Operators whose result is written into its place, and the puts that it is for."""
    unseen: set[fx.Node] = field(default_factory=set)
    """Views of such results, which nobody reads."""

    def build(self) -> Program:
        nodes = self.graph.nodes(self.region)
        results = self.graph.outputs(self.region)
        saved = self.graph.outputs("saved") if self.region == "forward" else ()
        for node in self._needed(nodes, (*results, *saved)):
            self.values[node] = self.out.placeholder(node.name)
            self.inputs.append(self._role(node))
        self._open_channels(nodes)
        for source, put, views in in_place.writers(nodes):
            self.writers[source] = put
            self.unseen.update(views)
        self.writers.update(arenas.writers(nodes))
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
        gathers = (n for n in saved if n is not None and is_call(n, ops.gather))
        pending = frozenset(n.name for n in gathers)
        roles, starts = tuple(self.inputs), {}
        for node in nodes:
            if is_call(node, *ops.COLLECTIVES) and not self.alone(node):
                about = name_of(node), bucket_of(node), axis_of(node), collective_bytes(node)
                starts[called(node)] = Started(*about)
        rest = names, pending, starts, arenas.places(self.graph) if saved else {}
        return Program(self.region, module, roles, len(results), first, *rest)

    def _needed(self, nodes: Sequence[fx.Node], results: Sequence[fx.Node | None]) -> list[fx.Node]:
        """Values from outside the region that it reads, in graph order."""
        own = set(nodes)
        read = {n for node in nodes for n in node.all_input_nodes if n not in own}
        read.update(n for n in results if n is not None and n not in own)
        return sorted(read)

    def _open_channels(self, nodes: Sequence[fx.Node]) -> None:
        """Channels, and what the step before started, are inputs: they are the rank's."""
        several = self.graph.world > 1
        ahead = any(is_ahead(node) or is_call(node, *_AHEAD) for node in nodes)
        used = {"ahead"} if several and ahead else set()
        shares = any(is_call(n, ops.partition_activation) for n in nodes)
        cuts = several and any(is_call(n, ops.partition) for n in nodes)
        used |= {"mesh"} if shares or cuts else set()
        used |= {"regions"} if any(is_call(n, *ops.BRACKETS) for n in nodes) else set()
        if self.point_to_point:
            used |= {channel_of(n) for n in nodes if channel_of(n) and not is_ahead(n)}
        for name in sorted(used):
            self.channels[name] = self.out.placeholder(name.replace("/", "_"))
            self.inputs.append(Role("channel", name))

    @property
    def point_to_point(self) -> bool:
        return self.graph.world > 1 and self.graph.notes["collectives"] == "point-to-point"

    def _role(self, node: fx.Node) -> Role:
        if node.op == "placeholder":
            role = role_of(node)
            kept = self.region == "backward" and role.kind in _KEPT
            return Role("saved", node.name) if kept else role
        if is_call(node, ops.accumulate):
            return Role("kept", cast(str, node.args[2]))
        if is_call(node, ops.squares):
            return Role("squares", bucket_of(node))
        return Role("saved", node.name)

    # Emitting

    def _emit(self, node: fx.Node) -> None:
        if node in self.unseen:
            return
        if node in self.writers:
            self.values[node] = self._write(node, self.writers[node])
            return
        handler = HANDLERS.get(node.target) if ops.is_zero(node.target) else None
        if handler is None:
            assert not ops.is_zero(node.target), f"no lowering for {node.target}"
            made = self.out.node_copy(node, self._value)
            if _is_roomy(node):
                made = self.call(aten.clone.default, made)
                made.meta["val"] = node.meta["val"]
            self.values[node] = made
            return
        result = handler(self, node)
        if result is not None:
            self.values[node] = result
            result.meta["val"] = node.meta.get("val")
            if is_call(node, *ops.COLLECTIVES):
                result.meta["called"] = called(node)

    def _write(self, node: fx.Node, put: fx.Node) -> fx.Node:
        kwargs = fx.map_arg(node.kwargs, self._value)
        if is_call(put, ops.place):
            arena = self.values[cast(fx.Node, arenas.arena_of(put))]
            return arenas.emit(self.out, node, put, arena, self.args(node), kwargs)
        buffer = self.values[in_place.buffer_of(put)]
        return in_place.emit(self.out, node, put, buffer, self.args(node), kwargs)

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

    def start(self, channel: str, method: str, *args: Any) -> fx.Node:
        """A collective on a channel; its result is pending."""
        return self.out.call_method(method, (self.channels[channel], *args))

    def alone(self, node: fx.Node) -> bool:
        """Whether there is nobody to talk to along a collective's axis."""
        return self.graph.mesh.size(axis_of(node)) == 1

    def among(self, node: fx.Node) -> tuple[int, str]:
        """(number of ranks, name of their process group) that a collective is among."""
        return self.graph.mesh.size(axis_of(node)), self.group(axis_of(node))

    def collective(self, target: Callable[..., Any], alone: fx.Node, *args: Any) -> fx.Node:
        """`target(*args)`, or `alone` when there is nobody to talk to."""
        return alone if self.graph.world == 1 else self.call(target, *args)


_ROOMY = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.binary_cross_entropy.default,
    aten.soft_margin_loss.default,
)
"""Losses whose mean torch leaves in the storage of the losses of all elements, while someone holds it."""


def _is_roomy(node: fx.Node) -> bool:
    """Whether a node's result is one number in a large storage; a copy of it lets that go."""
    return is_call(node, *_ROOMY) and node.meta["val"].dim() == 0


_STARTS = ("gather", "reduce_scatter", "all_reduce", "begin", "refresh")


def starts_collective(node: fx.Node) -> bool:
    """Whether a program's node starts a collective."""
    functional = getattr(node.target, "namespace", "") == "_c10d_functional"
    return functional or (node.op == "call_method" and node.target in _STARTS)


def waits_for_collective(node: fx.Node) -> bool:
    """Whether a program's node waits for its first argument, a collective that was started."""
    method = node.op == "call_method" and node.target == "wait"
    return method or node.target is collectives.wait


def _unmarked(node: fx.Node) -> bool:
    return node.op != "placeholder" and "plan" not in node.meta


class _Boxed(fx.graph.CodeGen):
    """Code that takes its inputs in a list and empties it."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        head = f"def {self._func_name}(self, inputs){maybe_return_annotation}:"
        if not names:
            return head
        return f"{head}\n    {', '.join(names)}, = inputs\n    inputs.clear()"
