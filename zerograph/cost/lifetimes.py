"""Lifetimes: which storage each value of a TrainGraph lies in, and from when to when it is alive.

    %1 = aten.mm(%0, %w)         a storage of its own, from here to the last use of it or a view of it
    %2 = aten.view(%1, ..)       %1's
    %3 = aten.native_layer_norm  one storage a result
    zero.wait %b0, zero.put      their first argument's
    a gradient put in place      its buffer's
    zero.partition %b1           one of its own, of parameters or, behind an all-reduce, gradients
    zero.place %1, %a0[3]        the arena's, and so does %1 if it is made in place
    %b0.sum = zero.accumulate    %b0.kept's; the gradient's own where nothing is kept yet

as the lowered program has it, which forgets each value at its last use. Longer lives:

    an input of a collective     until its wait; of a copy to the host, or from it, as well
    what the forward saves       at least to the end of the forward
    what the forward returns     to the end of the step: the caller may hold its outputs
    the batch, an arena          throughout
    an arriving gradient         to the end of the backward: autograd holds it

The kernel of an update makes nothing; a user's own class is given copies of gradients. What any other
operator uses inside and frees before it returns (a convolution's workspace, a collective's staging) is not a
storage of the graph, and not counted.
"""

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx

from zerograph import ops
from zerograph.codegen import arenas, in_place
from zerograph.codegen.rules import rule_of
from zerograph.compat import hint
from zerograph.ir import TrainGraph
from zerograph.nodes import (
    axis_of,
    bucket_of,
    is_ahead,
    is_call,
    is_recomputed,
    is_reduced,
    is_view,
    module_of,
    region_of,
    role_of,
)

HOST = "host"
"""The category of what lies in the host's memory."""
_RESIDENT = ("full", "shard", "master", "state", "buffer", "constant", "param", "size", "hyper")
"""Placeholders that are no storage of the step's own."""
_IN_PLACE = frozenset((ops.wait, ops.put, ops.param, ops.all_reduce, ops.refresh, ops.refreshed))
_ALONE = _IN_PLACE | frozenset((*ops.COLLECTIVES, ops.gather_ahead, ops.partition))
"""What answers its first argument where there is nobody to talk to."""


@dataclass(slots=True)
class Stored:
    """One storage that the step makes or is given."""

    owner: str
    """FQN of the module that made it, or the block of its bucket."""
    category: str
    nbytes: int
    birth: int
    """Index in `graph.nodes()` of the call at which it is first alive."""
    death: int
    """Index of the last one."""
    saved: bool = False
    """Whether the forward computed it and keeps it for the backward, on the device."""


@dataclass
class Lifetimes:
    """The storages of a graph's step, in the order in which they appear."""

    graph: TrainGraph
    nodes: list[fx.Node]
    found: list[Stored] = field(default_factory=list)
    of: dict[fx.Node, list[Stored]] = field(default_factory=dict)
    """The storages that a value lies in: several for an operator with several results."""
    buffers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """The buffers and arenas that values are written to by the operators that make them."""

    @classmethod
    def read(cls, graph: TrainGraph, nodes: list[fx.Node]) -> "Lifetimes":
        """The lifetimes of `graph`, whose calls are `nodes`."""
        made = cls(graph, nodes)
        for source, put, _ in in_place.writers(nodes):
            made.buffers[source] = in_place.buffer_of(put)
        for source, place in arenas.writers(nodes):
            made.buffers[source] = cast(fx.Node, arenas.arena_of(place))
        regions = [region_of(node) for node in nodes]
        forward = regions.count("forward")
        backward = forward + regions.count("backward")
        for node in graph.placeholders():
            made._given(node, forward, backward)
        for index, node in enumerate(nodes):
            made._call(index, node)
        made._started_in_the_step()
        made._leaves(forward, backward)
        return made

    def _given(self, node: fx.Node, forward: int, backward: int) -> None:
        kind, end = role_of(node).kind, len(self.nodes) - 1
        if kind in _RESIDENT:
            self.of[node] = []
        elif kind == "arena":
            category = HOST if self._on_host(node) else "activations"
            (nbytes,) = _sizes(node.meta["val"])
            self.of[node] = [Stored(f"arena {role_of(node).name}", category, nbytes, 0, end)]
            self.found += self.of[node]
        elif kind == "kept":
            later = self.graph.notes.get("accumulation", 1) > 1
            self.of[node] = self._new(node, 0, "gradients") if later else []
        elif kind == "tangent":
            self.of[node] = self._new(node, forward, "inputs", backward - 1)
        elif kind == "input":
            self.of[node] = self._new(node, 0, "inputs", end)
        else:
            self.of[node] = self._new(node, backward, "inputs")

    def _on_host(self, arena: fx.Node) -> bool:
        return all(is_call(user, ops.offload) for user in arena.users)

    def _call(self, index: int, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            self._extend(source, index + 1)
        if is_call(node, ops.wait):
            for source in cast(fx.Node, node.args[0]).all_input_nodes:
                self._extend(source, index + 1)
        self.of[node] = self._lies_in(index, node)
        if is_call(node, ops.reduce_scatter, ops.all_reduce):
            self._arrivals(index, node)
        if is_call(node, ops.update):
            self.found.append(self._temporaries(index, node))

    def _started_in_the_step(self) -> None:
        """What the step gathers ahead lives to its end, and from the start of the forward that takes it."""
        for node in self.nodes:
            if is_call(node, ops.gather_ahead) and self.graph.world > 1:
                self._extend(node, len(self.nodes))
            elif is_ahead(node) and self.graph.world > 1:
                for stored in self.of[node]:
                    stored.birth = 0

    def _lies_in(self, index: int, node: fx.Node) -> list[Stored]:
        if node in self.buffers:
            return self.of[self.buffers[node]]
        arena = arenas.arena_of(node)
        if arena is not None:
            return self.of[arena]
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return self._new(node, index, self._category(node))
        kinds = _ALONE if self.graph.mesh.size(axis_of(node)) == 1 else _IN_PLACE
        if node.target in kinds or is_view(node):
            return self.of[first]
        if getattr(node.target, "__name__", "") == "getitem":
            return [self.of[first][cast(int, node.args[1])]]
        if is_call(node, ops.accumulate):
            grad = cast(fx.Node, node.args[1])
            if self.of[first]:
                return self.of[first]
            if grad.meta["val"].dtype == node.meta["val"].dtype:
                return self.of[grad]
        return self._new(node, index, self._category(node))

    def _new(self, node: fx.Node, birth: int, category: str, death: int = -1) -> list[Stored]:
        bucket = self.graph.layout.buckets.get(bucket_of(node))
        owner = bucket.block if bucket is not None else module_of(node)
        last = max(birth, death)
        made = [Stored(owner, category, n, birth, last) for n in _sizes(node.meta.get("val"))]
        self.found += [stored for stored in made if stored.nbytes]
        return made

    def _category(self, node: fx.Node) -> str:
        if is_call(node, ops.gather, ops.gather_ahead):
            return "gathered"
        if is_call(node, ops.partition):
            return "gradients" if is_reduced(node) else "parameters"
        if is_call(node, ops.offload):
            return HOST
        if is_recomputed(node):
            return "recomputed"
        reduces = is_call(node, ops.grad_buffer, ops.reduce_scatter, ops.accumulate, ops.squares)
        return "gradients" if reduces or region_of(node) == "step" else "activations"

    def _arrivals(self, index: int, node: fx.Node) -> None:
        """Beside the result, what a point-to-point reduction receives from each further rank."""
        world, result = self.graph.mesh.size(axis_of(node)), int(is_call(node, ops.reduce_scatter))
        if self.graph.notes.get("collectives") == "point-to-point" and world > 1 + result:
            wait = next(user for user in node.users if is_call(user, ops.wait))
            bucket = self.graph.layout.buckets[bucket_of(node)]
            part = _sizes(cast(fx.Node, node.args[0]).meta["val"])[0] // world
            nbytes, death = (world - 1 - result) * part, self.nodes.index(wait)
            self.found.append(Stored(bucket.block, "gradients", nbytes, index, death))

    def _temporaries(self, index: int, node: fx.Node) -> Stored:
        """The gradients that a user's class is given; a rule's kernel makes nothing."""
        master, grad = (cast(fx.Node, a).meta["val"] for a in node.args[:2])
        made = grad.dtype != master.dtype or node.args[6] is not None
        is_rule = rule_of(cast(str, node.args[8])) is not None
        count = master.numel() * int(made and not is_rule)
        block = self.graph.layout.buckets[bucket_of(node)].block
        return Stored(block, "optimizer", count * master.dtype.itemsize, index, index)

    def _leaves(self, forward: int, backward: int) -> None:
        """Let what leaves a region live on; `forward` and `backward` are where these two end."""
        end = len(self.nodes)
        ends = {"output": end, "update": forward, "input_update": forward}
        for result, node in zip(self.graph.results, self.graph.outputs("forward")):
            self._extend(node, ends[result.kind])
        for gradient, node in zip(self.graph.gradients, self.graph.outputs("backward")):
            self._extend(node, backward if gradient.kind == "kept" else end)
        for node in self.graph.outputs("saved"):
            for stored in self._extend(node, forward):
                stored.saved = stored.category not in ("inputs", "gathered", HOST)

    def _extend(self, node: fx.Node | None, stop: int) -> list[Stored]:
        """Let a value live until the call before `stop`; answers its storages."""
        found = [] if node is None else self.of[node]
        for stored in found:
            stored.death = max(stored.death, stop - 1)
        return found


def _sizes(value: Any) -> list[int]:
    """Bytes of each result of an operator; 0 for one that is no tensor."""
    if isinstance(value, Tensor):
        return [hint(value.numel()) * value.dtype.itemsize]
    if isinstance(value, (list, tuple)):
        return [sum(_sizes(item)) for item in value]
    return [0]
