"""normalize: canonical aten, and a chain of views and casts of its own for each reader of a parameter.

    before                                     after
      %0 = aten.t(%w)                            %0 = aten.t(%w)
      %1 = aten.mm(%x, %0)                       %1 = aten.mm(%x, %0)
    backward                                   backward
      %2 = aten.t(%0)     <- keeps %w alive      %2 = aten.t(%w)
                                                 %3 = aten.t(%2)

Autograd reuses the forward's views of a parameter in the backward. A view keeps the whole gathered
bucket alive, so each is made again from the parameter where the backward uses it. At stage 3 so is a
cast (autocast's bf16 weights), which would be a second, whole copy kept. An output that is a view of a
parameter is copied, and a buffer that the backward reads and the forward updates is saved
as a copy of its old value. `detach` and `alias` do nothing below autograd and are removed.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, is_view, module_of, region_of, role_of, view_root

_IDENTITIES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


@dataclass(frozen=True)
class Normalize:
    recast: bool = False
    """Whether casts are made again too (stage 3)."""

    name: ClassVar[str] = "normalize"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    provides: ClassVar[frozenset[str]] = frozenset({"normal"})

    def apply(self, graph: TrainGraph) -> str:
        removed = _remove_identities(graph)
        copied = _copy_outputs(graph)
        remade = _remake_views(graph, self.recast)
        kept = keep_old_buffers(graph)
        return (
            f"{removed} identities removed, {remade} views remade, "
            f"{copied} outputs and {kept} buffers copied"
        )


def _remove_identities(graph: TrainGraph) -> int:
    found = [n for n in graph.nodes() if is_call(n, *_IDENTITIES)]
    for node in found:
        node.replace_all_uses_with(cast(fx.Node, node.args[0]))
        graph.graph.erase_node(node)
    return len(found)


def _is_param(node: fx.Node) -> bool:
    return node.op == "placeholder" and role_of(node).kind == "param"


def _copy_outputs(graph: TrainGraph) -> int:
    """What leaves the forward must not share storage with a parameter."""
    results = list(graph.outputs("forward"))
    copied = 0
    for index, node in enumerate(results):
        if node is not None and _is_param(view_root(node)):
            with graph.inserting(graph.end("forward"), "forward", module_of(node)) as insert:
                results[index] = insert(torch.ops.aten.clone.default, node)
            copied += 1
    graph.set_outputs(forward=results)
    return copied


def _remake_views(graph: TrainGraph, recast: bool) -> int:
    """Backward users of a forward view (at stage 3, or cast) of a parameter get it made again there."""
    made: dict[fx.Node, fx.Node] = {}
    chains: set[fx.Node] = set()
    for node in graph.nodes("forward"):
        if is_view(node) or (recast and is_call(node, torch.ops.aten._to_copy.default)):
            source = cast(fx.Node, node.args[0])
            chains.update({node} if source in chains or _is_param(source) else ())
    for user in graph.nodes("backward"):
        for source in user.all_input_nodes:
            if source in chains:
                user.replace_input_with(source, _again(graph, source, user, made))
    gradients = list(graph.outputs("backward"))
    for index, gradient in enumerate(gradients):
        if gradient in chains:
            gradients[index] = _again(graph, gradient, graph.end("backward"), made)
    graph.set_outputs(backward=gradients)
    return len(made)


def _again(
    graph: TrainGraph, view: fx.Node, before: fx.Node, made: dict[fx.Node, fx.Node]
) -> fx.Node:
    """The backward's copy of a forward view or cast, made (once) before its first user."""
    if view in made:
        return made[view]
    source = cast(fx.Node, view.args[0])
    if not _is_param(source):
        source = _again(graph, source, before, made)
    with graph.graph.inserting_before(before):
        made[view] = graph.graph.node_copy(view, lambda n: source if n is view.args[0] else n)
    made[view].meta["region"] = "backward"
    return made[view]


def keep_old_buffers(graph: TrainGraph) -> int:
    """A buffer that is updated after the forward and read by the backward is read as a copy."""
    updated = {r.name for r in graph.results if r.kind == "update"}
    copied = 0
    for buffer in graph.placeholders("buffer"):
        readers = [n for n in buffer.users if n.op != "output" and region_of(n) == "backward"]
        if role_of(buffer).name not in updated or not readers:
            continue
        with graph.inserting(graph.first("forward"), "forward") as insert:
            old = insert(torch.ops.aten.clone.default, buffer)
        for reader in readers:
            reader.replace_input_with(buffer, old)
        copied += 1
    return copied
