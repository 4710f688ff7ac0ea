"""What the forward keeps at boundaries: which values these are, where they are used, and when they are back.

Passes that keep them elsewhere (passes/partition.py, passes/offload.py) bring them back one region ahead
(passes/arena.py keeps them in place):

    region that the backward comes to     values that start to come back
      (its start)                           those of layers.2
      layers.2                              those of layers.1
      layers.1                              those of layers.0
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from typing import cast

from torch import Tensor, fx

from zerograph import ops
from zerograph.codegen.packing import is_dense
from zerograph.compat import hint
from zerograph.cost import nbytes
from zerograph.ir import TrainGraph
from zerograph.nodes import checkpoint_of, is_call, region_of, view_root
from zerograph.passes.release import users_of_aliases

SMALLEST = 4096
"""Bytes. A copy takes some microseconds to start, in which a link of 32 GB/s moves some 100 KB."""


def under_boundaries(graph: TrainGraph) -> dict[fx.Node, str]:
    """The saved tensors that have a boundary, in order, with the group in which they are brought back.

    It is the region that the backward comes to first, the last of the forward; of a value from within its
    region, which a budget chose, itself. Of a value that is shared it is this rank's share.
    """
    found: dict[fx.Node, str] = {}
    saved = set(graph.outputs("saved"))
    shares = {n.args[0]: n for n in graph.nodes("forward") if is_call(n, ops.partition_activation)}
    for node in graph.nodes("forward"):
        if is_call(node, ops.checkpoint):
            value, region = cast(tuple[fx.Node, str], node.args)
            kept = shares.get(value, value)
            if kept in saved and isinstance(value.meta.get("val"), Tensor):
                chosen = checkpoint_of(value) == region
                found[kept] = f"{region} {value.name}" if chosen else region
    return found


def movable(graph: TrainGraph, values: Collection[fx.Node], smallest: int) -> list[fx.Node]:
    """Those of some saved values that can be kept in another form, and are worth it.

    The step made them, they fill their memory, have `smallest` bytes, and share their storage with no result
    of the step and with nothing else that is saved.
    """
    roots = Counter(view_root(node) for node in _leaving(graph))
    return [v for v in values if _is_worth(v, smallest) and roots[view_root(v)] == 1]


def _is_worth(value: fx.Node, smallest: int) -> bool:
    return is_own(value) and nbytes(value) >= smallest


def is_own(value: fx.Node) -> bool:
    """Whether a value is a tensor that the step made, and it fills its memory."""
    made = value.meta.get("val")
    if not isinstance(made, Tensor) or view_root(value).op != "call_function":
        return False
    return is_dense([hint(n) for n in made.shape], [hint(n) for n in made.stride()])


def _leaving(graph: TrainGraph) -> list[fx.Node]:
    """What is returned, and what is saved."""
    sections = [graph.outputs(name) for name in ("forward", "saved", "backward")]
    return [node for section in sections for node in section if node is not None]


def last_use(value: fx.Node) -> fx.Node:
    """The last node of the forward that reads a value, or what shares its storage."""
    readers = users_of_aliases(view_root(value))
    return max(node for node in (value, *readers) if region_of(node) == "forward")


def readers_of(value: fx.Node) -> list[fx.Node]:
    """The nodes of the backward that read a value, in order."""
    return sorted(u for u in value.users if u.op != "output" and region_of(u) == "backward")


def returns(
    graph: TrainGraph, values: Collection[fx.Node], under: Mapping[fx.Node, str], early: bool
) -> Iterator[tuple[fx.Node, list[fx.Node], fx.Node]]:
    """(value, its readers in the backward, the node before which it starts to come back), in order.

    With `early` that is where the backward comes to the region before its own, else the first reader. The
    readers are those before anything is inserted, but for those of values that came before.
    """
    readers = {value: readers_of(value) for value in values}
    read = sorted((v for v in values if readers[v]), key=lambda v: readers[v][0])
    groups = [list(each) for _, each in groupby(read, key=under.__getitem__)]
    starts = [readers[group[0]][0] for group in groups]
    for before, group in zip([graph.first("backward"), *starts], groups):
        for value in group:
            first = readers[value][0]
            yield value, readers[value], before if early else first
