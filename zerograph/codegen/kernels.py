"""What a lowered program calls to keep gradients (buffers, copies into them, sums over micro-batches) and
to sum norms.

Each function is the target of a node that `lower` emits, as are `norm_partials` and `finish` of dispatch.py,
which are generated. Nothing here communicates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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


def put(buffer: Tensor, grad: Tensor, offset: int, size: list[int], stride: list[int]) -> Tensor:
    """Copy `grad` [size] to its place in `buffer`, casting; answers `buffer`."""
    buffer.as_strided(size, stride, offset).copy_(grad)
    return buffer


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
