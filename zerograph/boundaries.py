"""Boundaries: which nodes of the forward lie in a checkpointed region, and the values that enter it.

    %0 = aten.embedding(..)
    zero.checkpoint %0 "model.layers.0"      a value that enters: the forward keeps it
    %1 = aten.mm(%0, ..)                     in it: meta["checkpoint"] is "model.layers.0"
    %2 = aten.gelu(%1)                       in it

There are three sources of regions: calls of `torch.utils.checkpoint` in the model, which the capture marks
(`zerograph.checkpointing.checkpoint` is one); `activation_checkpointing.number_checkpoints`, evenly over the
repeated blocks; and, without any of these, a budget in bytes, for which the whole forward is one region. A
region is named by the module that all of its nodes come from, or c0, c1, .. where there is none of its own.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise, takewhile

import torch
from torch import fx

from zerograph import compat, ops
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import checkpoint_of, is_call, is_view, module_of, region_of, role_of


def mark_captured(graph: TrainGraph) -> None:
    """Mark the regions that the model's own calls of `torch.utils.checkpoint` made."""
    calls: dict[int, list[fx.Node]] = {}
    for node in graph.nodes("forward"):
        call = compat.checkpoint_call(node)
        if call is not None:
            calls.setdefault(call, []).append(node)
    taken: set[str] = set()
    for index, nodes in enumerate(calls.values()):
        name = _common_module(nodes)
        name = f"c{index}" if not name or name in taken else name
        taken.add(name)
        _mark(nodes, name)


def mark_blocks(graph: TrainGraph, number: int) -> None:
    """Mark `number` regions, evenly over the repeated blocks of the model.

    Raises PlanError if there are fewer blocks.
    """
    for node, region in regions_of_blocks(graph, number).items():
        _mark([node], region)


def regions_of_blocks(graph: TrainGraph, number: int) -> dict[fx.Node, str]:
    """The region of each node of the forward that lies in one of `number` even runs of the repeated blocks.

    Raises PlanError if there are fewer blocks.
    """
    blocks = graph.layout.blocks
    if number > len(blocks):
        raise no_blocks(graph, number)
    starts = [index * len(blocks) // number for index in range(number + 1)]
    region_by_block: dict[str, str] = {}
    for start, stop in pairwise(starts):
        first, last = blocks[start], blocks[stop - 1]
        name = first if first == last else f"{first} .. {last}"
        region_by_block.update(dict.fromkeys(blocks[start:stop], name))
    found = {n: _region_around(module_of(n), region_by_block) for n in graph.nodes("forward")}
    return {node: region for node, region in found.items() if region}


def no_blocks(graph: TrainGraph, number: int | str) -> PlanError:
    """The error of a model with fewer repeated blocks than regions."""
    blocks = graph.layout.blocks
    count = f"{len(blocks)} repeated blocks" if blocks else "no repeated blocks"
    mend = f"give at most {len(blocks)}" if blocks else "leave it out"
    return PlanError(
        f"activation_checkpointing.number_checkpoints={number}: {graph.model} has {count}; {mend}, or "
        "mark regions in the model with zerograph.checkpointing.checkpoint"
    )


def marked(graph: TrainGraph) -> dict[fx.Node, str]:
    """The region of each node of the forward that lies in one."""
    return {n: checkpoint_of(n) for n in graph.nodes("forward") if checkpoint_of(n)}


def crossing(graph: TrainGraph, regions: Mapping[fx.Node, str]) -> set[fx.Node]:
    """The values that enter or leave a region: what the forward keeps of regions at least."""
    return {
        source
        for node in graph.nodes("forward")
        for source in node.all_input_nodes
        if regions.get(source) != regions.get(node) and _is_boundary(source)
    }


def mark_forward(graph: TrainGraph, region: str) -> None:
    """Mark the whole forward as one region."""
    _mark(graph.nodes("forward"), region)


def insert_boundaries(graph: TrainGraph) -> None:
    """Put `zero.checkpoint` on what enters a region, before its first use there."""
    made: dict[tuple[fx.Node, str], fx.Node] = {}
    for node in graph.nodes("forward"):
        region = checkpoint_of(node)
        for source in node.all_input_nodes if region else ():
            if checkpoint_of(source) == region or not _is_boundary(source):
                continue
            if (source, region) not in made:
                made[source, region] = insert_boundary(graph, source, node, region)
            node.replace_input_with(source, made[source, region])


def insert_boundary(graph: TrainGraph, value: fx.Node, reader: fx.Node, region: str) -> fx.Node:
    """Put `zero.checkpoint` on a value, before a node of the forward, which then reads it through that."""
    with graph.inserting(reader, "forward", module_of(reader)) as insert:
        made = insert(ops.checkpoint, value, region)
    made.meta["val"] = value.meta["val"]  # with its strides, whatever they are
    _mark([made], region)
    reader.replace_input_with(value, made)
    return made


def leaves(node: fx.Node) -> bool:
    """Whether the forward reads or returns a node's value outside of the node's region."""
    return any(
        user.op == "output"
        or (region_of(user) == "forward" and checkpoint_of(user) != checkpoint_of(node))
        for user in node.users
    )


def of_param(node: fx.Node) -> bool:
    """Whether a value is a parameter, or made of one by views and casts: it is never kept."""
    while is_view(node) or is_call(node, torch.ops.aten._to_copy.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder" and role_of(node).kind == "param"


def _is_boundary(source: fx.Node) -> bool:
    """Parameters, buffers and constants are there in any case; sizes are numbers."""
    if source.op == "placeholder" and role_of(source).kind != "input":
        return False
    is_tensor = isinstance(source.meta.get("val"), torch.Tensor)
    return is_tensor and source.op != "get_attr" and not of_param(source)


def _mark(nodes: list[fx.Node], region: str) -> None:
    for node in nodes:
        node.meta["checkpoint"] = region


def _common_module(nodes: list[fx.Node]) -> str:
    """The innermost module that all of the nodes come from."""
    parts = [module_of(node).split(".") for node in nodes if module_of(node)]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*parts))
    return ".".join(names[0] for names in shared)


def _region_around(module: str, regions: dict[str, str]) -> str:
    return next((regions[name] for name in _enclosing(module) if name in regions), "")


def _enclosing(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]
