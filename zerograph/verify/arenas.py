"""Checks of arenas: each value that is kept there has a row to itself, fits, and does not leave in it."""

from collections.abc import Iterator
from typing import cast

from torch import fx

from zerograph import compat, ops
from zerograph.codegen import arenas
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, region_of, role_of, view_root
from zerograph.units import size


def rows_are_apart(graph: TrainGraph) -> Iterator[str]:
    """All that the forward saves is alive at its end, so no two values may have one row."""
    taken: dict[tuple[str, int], fx.Node] = {}
    for node, arena in _kept(graph):
        name, row = role_of(arena).name, arenas.row_of(node)
        rows = arena.meta["val"].shape[0]
        if not 0 <= row < rows:
            yield f"{_value(node).name} lies in row {row} of arena {name}, which has {rows}"
        other = taken.setdefault((name, row), node)
        if other is not node:
            yield f"{_value(node).name} and {_value(other).name} both lie in row {row} of arena {name}"


def rows_are_large_enough(graph: TrainGraph) -> Iterator[str]:
    """An arena is of one class: of its values' dtype, device and size."""
    for node, arena in _kept(graph):
        made, memory = node.meta["val"], arena.meta["val"]
        name = f"{_value(node).name} lies in arena {role_of(arena).name}"
        if made.dtype != memory.dtype or made.device != memory.device:
            yield f"{name} of {memory.dtype} on {memory.device}, and is {made.dtype} on {made.device}"
        needs, has = (compat.exact(n) for n in (arenas.length_of(made), memory.shape[1]))
        if needs != has:
            nbytes = [compat.hint(n) * made.dtype.itemsize for n in (made.numel(), memory.shape[1])]
            yield f"{name}, whose rows are of {size(nbytes[1])}, and has {size(nbytes[0])}"


def kept_once(graph: TrainGraph) -> Iterator[str]:
    """What lies in an arena is saved, once; the value that was copied there is read no more."""
    saved = graph.outputs("saved")
    for node, arena in _kept(graph):
        start = next(iter(node.users), node) if is_call(node, ops.offload) else node
        count = saved.count(start)
        if region_of(node) != "forward" or count != 1:
            yield (
                f"{_value(node).name} in arena {role_of(arena).name} is placed in the {region_of(node)} "
                f"and saved {count} times, not once"
            )
        for user in _value(node).users if is_call(node, ops.place) else ():
            if user is not node and user.op != "output":
                yield f"{user.name} reads {_value(node).name}, not its place in an arena"
    for source, place in arenas.writers(graph.nodes()):
        if not arenas.can_write(place):
            yield f"{source.name} cannot write {_value(place).name} into its place"


def nothing_leaves_in_an_arena(graph: TrainGraph) -> Iterator[str]:
    """The next forward writes there; what is returned is the caller's."""
    within = {node: node for node, _ in _kept(graph) if not is_call(node, ops.offload)}
    within |= dict(arenas.writers(graph.nodes()))
    for section in ("forward", "backward"):
        for node in graph.outputs(section):
            if node is not None and view_root(node) in within:
                yield f"{section} output {node.name} lies in an arena, which the next forward writes"


def _kept(graph: TrainGraph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node, its arena) of what puts a value there."""
    for node in graph.nodes():
        arena = arenas.arena_of(node)
        if arena is not None:
            yield node, arena


def _value(node: fx.Node) -> fx.Node:
    return cast(fx.Node, node.args[0])
