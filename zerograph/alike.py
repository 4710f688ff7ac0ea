"""Which values of a forward all model-parallel ranks have alike, and which are a rank's own.

    %x                                          alike: they have one batch
    %1 = aten.mm(%x, %w)                        own: %w is a rank's part of a parameter
    %2 = _c10d_functional.all_reduce(%1, 'mp')  alike: the same sum on each
    %3 = aten.add(%x, %2)                       alike: computed of such values alone

A parameter is own if it is marked so (layout.py), and ranks check that all others are equal. Taken for
granted is what a model of this kind needs in any case: that these ranks have the same inputs, and draw the
same random numbers where they compute the same.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, role_of

Joins = Callable[[str], bool]
"""Whether the process group of a name has the model-parallel ranks."""
_JOINING = ("all_reduce", "all_gather", "broadcast")
"""Beginnings of the names of collectives that give all ranks the same."""


def every(group: str) -> bool:
    """Any group: where none is known, a model's collectives are taken to be among model-parallel ranks."""
    return True


def own_values(graph: TrainGraph, joins: Joins) -> set[fx.Node]:
    """The values of the forward that differ from one model-parallel rank to another."""
    params = graph.layout.params
    own = {n for n in graph.placeholders("param") if params[role_of(n).name].parallel}
    for node in graph.nodes("forward"):
        if is_call(node, ops.param):
            differs = params[cast(str, node.args[1])].parallel
        elif _is_collective(node):
            differs = _differs(node, own, joins)
        else:
            differs = not own.isdisjoint(node.all_input_nodes)
        if differs:
            own.add(node)
    return own


def is_joined(node: fx.Node) -> bool:
    """Whether a value is what a collective of the model's own ended with."""
    return _is_collective(node) and _name(node) == "wait_tensor"


def _differs(node: fx.Node, own: set[fx.Node], joins: Joins) -> bool:
    differs = not own.isdisjoint(node.all_input_nodes)
    name, group = _name(node), node.args[-1]
    if name == "wait_tensor" or not isinstance(group, str) or not joins(group):
        return differs
    return not name.startswith(_JOINING)


def _is_collective(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and "c10d" in node.target.namespace


def _name(node: fx.Node) -> str:
    return str(cast(Any, node.target)._schema.name).rpartition("::")[2]
