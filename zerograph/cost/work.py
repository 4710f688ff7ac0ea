"""What a node computes: floating-point operations, and bytes read from and written to memory.

FLOPs come from `torch.utils.flop_counter`'s formulas (a multiply-add is two), which know matrix
products, convolutions and attention; every other operator is taken to do none. A view does nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from zerograph import ops
from zerograph.compat import hint
from zerograph.cost.traffic import nbytes
from zerograph.ir import is_call, is_view


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes of memory traffic."""

    flops: int = 0
    nbytes: int = 0
    dtype: torch.dtype = torch.float32
    """The type of the products, which decides how fast a device makes them."""


def work_of(node: fx.Node) -> Work:
    """The work of one call on its device; collectives, waits, releases and views have none."""
    idle = is_call(node, *ops.COLLECTIVES, ops.wait, ops.release, ops.grad_buffer)
    if node.op != "call_function" or is_view(node) or idle:
        return Work()
    moved = nbytes(node) + sum(nbytes(source) for source in node.all_input_nodes)
    return Work(_flops(node), moved, _dtype(node))


def _flops(node: fx.Node) -> int:
    target: Any = node.target
    formula = flop_registry.get(getattr(target, "overloadpacket", target))
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return int(hint(formula(*args, **kwargs, out_val=node.meta["val"])))


def _dtype(node: fx.Node) -> torch.dtype:
    values = [n.meta["val"] for n in (*node.all_input_nodes, node)]
    floats = (v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    return next((v.dtype for v in floats), torch.float32)
