"""What a step moves: the bytes of values, and the collectives by kind.

Bytes of a collective are those of its full buffer (a gather of a bucket counts the whole bucket).
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.compat import hint
from zerograph.ir import TrainGraph
from zerograph.mesh import named
from zerograph.nodes import axis_of, is_call, map_tensors


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many, and the bytes of their full buffers."""

    count: int
    nbytes: int


def traffic_of(graph: TrainGraph) -> dict[str, Traffic]:
    """Per operator name ("gather", "gather over node", ...): its collectives in one step."""
    found: dict[str, list[int]] = defaultdict(list)
    for node in graph.nodes():
        if is_call(node, *ops.COLLECTIVES):
            found[named(name_of(node), axis_of(node))].append(collective_bytes(node))
    return {name: Traffic(len(sizes), sum(sizes)) for name, sizes in sorted(found.items())}


def name_of(node: fx.Node) -> str:
    """`gather` for a zero.gather node."""
    return str(cast(Any, node.target)._schema.name).partition("::")[2]


def op_of(node: fx.Node) -> str:
    """`zero.gather`, `aten.mm`: the operator without its overload."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.replace("::", ".")
    return str(getattr(target, "__name__", target))


def moved_bytes(node: fx.Node) -> int:
    """Bytes of a node's value; of a collective, those of its full buffer."""
    moves = is_call(node, *ops.COLLECTIVES, ops.gather_ahead)
    return collective_bytes(node) if moves else nbytes(node)


def collective_bytes(node: fx.Node) -> int:
    """Bytes of a collective's full buffer, the larger of its input and output."""
    return max(nbytes(node), *(nbytes(source) for source in node.all_input_nodes))


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's value at the captured call's sizes, as if its storage were its own."""
    sizes = map_tensors(node.meta.get("val"), lambda t: hint(t.numel()) * t.dtype.itemsize)
    return sum(sizes)
