"""What a lowered program calls to keep gradients (buffers, copies into them, sums over micro-batches) and
to sum norms.

Each function is the target of a node that `lower` emits, as are `norm_partials` and `finish` of dispatch.py,
which are generated, as is what `pack` calls. Nothing here communicates.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from zerograph.codegen import dispatch
from zerograph.codegen.packing import same_layout


def grad_buffer(
    like: Tensor, numel: int, dtype: torch.dtype, gaps: Sequence[tuple[int, int]]
) -> Tensor:
    """An empty flat buffer [numel] on `like`'s device whose `gaps` (start, stop) are zero.

    The gaps are the padding and the places of parameters without a gradient.
    """
    buffer = torch.empty(numel, dtype=dtype, device=like.device)
    for start, stop in gaps:
        buffer[start:stop].zero_()
    return buffer


def put(
    buffer: Tensor,
    grad: Tensor,
    offset: int,
    size: list[int],
    stride: list[int],
    scale: float = 1.0,
) -> Tensor:
    """Copy `grad` [size] to its place in `buffer`, cast, then times `scale`; answers `buffer`."""
    place = buffer.as_strided(size, stride, offset).copy_(grad)
    if scale != 1.0:
        torch.ops.aten.mul_.Scalar(place, scale)
    return buffer


def pack(
    buffer: Tensor, grad: Tensor, offset: int, size: list[int], stride: list[int], scale: float
) -> Tensor:
    """The same by one kernel, for a `grad` that lies in memory as its place does; the same bits."""
    if not same_layout(grad.stride(), size, stride):  # not as it was traced
        return put(buffer, grad, offset, size, stride, scale)
    dispatch.pack(grad, buffer, offset, _rounded(scale, buffer.dtype, buffer.device.type))
    return buffer


@lru_cache(maxsize=256)
def _rounded(scale: float, dtype: torch.dtype, device: str) -> float:
    """What aten.mul_.Scalar multiplies by: on the CPU it takes the factor in the tensor's own dtype."""
    return float(torch.tensor(scale, dtype=dtype)) if device == "cpu" else scale


def accumulate(kept: Tensor | None, grad: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """`kept + weight * grad` in `dtype`. With nothing kept yet `grad`'s own storage is taken."""
    if kept is not None:
        return kept.add_(grad, alpha=weight)
    first = grad.to(dtype)
    return first.mul_(weight) if weight != 1.0 else first


def sum_norms(gathered: Tensor, first: int, count: int) -> Tensor:
    """The sums over ranks, float64 [count, 2], of rows `first` on of `gathered`, float64 [world, rows, 2].

    Every rank adds the same numbers in the same order.
    """
    return gathered.narrow(1, first, count).sum(0)
