"""Checks of axes: every collective is over the ranks among which what it moves is cut, or copied."""

from collections.abc import Iterator
from typing import cast

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.mesh import ALL, MODEL
from zerograph.nodes import axis_of, is_call, is_reduced, region_of
from zerograph.verify.common import bucket_of, say

_OF_SLICES = (
    ops.gather,
    ops.gather_ahead,
    ops.refresh,
    ops.reduce_scatter,
    ops.gather_partials,
    ops.gather_norms,
)
"""What is over the ranks that hold a bucket together, unless it is of a slice of the forward's."""
_OF_MODEL = (ops.partition_activation, ops.gather_activation)


def axes_fit(graph: TrainGraph) -> Iterator[str]:
    """Slices are gathered and reduced over the axis over which they are cut; their sums go along the copies.

    With model-parallel ranks partials of all data-parallel ones are then gathered among these.
    """
    mesh = graph.mesh
    for node in graph.nodes():
        due = mesh.cut if is_call(node, *_OF_SLICES) else ALL
        if is_call(node, ops.all_reduce):
            due = mesh.cut if _is_whole(graph, node) else mesh.copies
        elif is_call(node, ops.partition):
            due = mesh.cut if is_reduced(node) else mesh.second or "no axis"
        elif is_call(node, ops.gather) and is_call(_source(node), ops.partition):
            due = axis_of(_source(node))
        elif is_call(node, *_OF_MODEL) or _is_of_gathered(graph, node):
            due = MODEL
        if ops.is_zero(node.target) and axis_of(node) != due:
            yield f"{say(node)} is over {axis_of(node) or 'all ranks'}, not {due or 'all ranks'}"


def _is_whole(graph: TrainGraph, reduction: fx.Node) -> bool:
    """Whether a reduction is of all of a bucket, not of a slice."""
    whole = graph.layout.buckets[str(bucket_of(reduction))].numel
    return bool(reduction.meta["val"].numel() == whole)


def _is_of_gathered(graph: TrainGraph, node: fx.Node) -> bool:
    """Whether a node gathers partials that this rank has of all data-parallel ranks."""
    if graph.mesh.model == 1 or not is_call(node, ops.gather_partials):
        return False
    return graph.stage == 0 or is_call(_source(node), ops.wait)


def slices_are_kept(graph: TrainGraph) -> Iterator[str]:
    """A slice is of a bucket that the forward has gathered, and is kept for a gather of the backward."""
    saved = graph.outputs("saved")
    for node in graph.nodes():
        if not is_call(node, ops.partition) or is_reduced(node):
            continue
        full = _source(node)
        if not is_call(full, ops.wait) or not is_call(_source(full), ops.gather):
            yield f"{say(node)} is of {full.name}, which is not gathered"
        if region_of(node) != "forward" or node not in saved:
            yield f"{say(node)} is not kept for the backward"
        for user in node.users:
            if user.op != "output" and (not is_call(user, ops.gather) or _crosses(user)):
                yield f"{user.name} reads {say(node)}, which is for gathers of the backward"
            elif user.op != "output" and bucket_of(user) != bucket_of(node):
                yield f"{say(user)} gathers slices of {bucket_of(node)}"


def _crosses(gather: fx.Node) -> bool:
    """Whether a gather is waited for in the forward."""
    return any(is_call(user, ops.wait) and region_of(user) == "forward" for user in gather.users)


def _source(node: fx.Node) -> fx.Node:
    return cast(fx.Node, node.args[0])
