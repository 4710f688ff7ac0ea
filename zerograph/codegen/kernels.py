"""Torch implementations of the kernels that a lowered program calls.

Each function is the target of a node that `lower` emits. Their signatures are final: generated Triton
and C++ kernels take their places one by one. Nothing here communicates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NORM_CHUNK = 1 << 14
"""Elements summed at a time, so that fp32 partial sums of squares stay accurate."""


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


def norm_partials(grads: Sequence[Tensor], parts: int) -> Tensor:
    """Sums of squares, float64 [parts]: of the r-th of `parts` equal slices of all `grads`.

    Each slice is summed in chunks (fp32 inside a chunk, float64 over them), so the result depends on
    the slice's contents alone: the same bits whether a rank has one slice or all of them.
    """
    totals = torch.zeros(parts, dtype=torch.float64, device=grads[0].device)
    for grad in grads:
        for part, own in enumerate(grad.chunk(parts)):
            totals[part] += _sum_of_squares(own)
    return totals


def _sum_of_squares(flat: Tensor) -> Tensor:
    whole = flat.numel() // NORM_CHUNK * NORM_CHUNK
    chunks = flat[:whole].view(-1, NORM_CHUNK)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(chunks, dim=1, dtype=dtype)] if whole else []
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1))
    return torch.cat(norms).double().square().sum()


def grad_norm(partials: Tensor) -> Tensor:
    """The global 2-norm, float64 [], from one partial for each rank, summed in rank order."""
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total.sqrt()


def clip(norm: Tensor, max_norm: float) -> Tensor:
    """The factor, fp32 [], that torch.nn.utils.clip_grad_norm_ multiplies gradients by."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
