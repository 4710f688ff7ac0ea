"""The kernels as functions on tensors: the device at hand decides which target runs (targets.py).

    update(rule, groups, runs, master, grad, states, low, control)     in place, one launch a variant
    measure(..), apply(..)                                             updates with norms of parameters
    norm_partials(grads, parts)  ->  float64 [parts]
    squares(grad, parts), sum_squares(squares)     the same in two steps, the first for each gradient
    finish(partials, divided, max_norm, skips)  ->  norm float64 [], control fp32 [2]
    pack(grad, bucket, offset, scale)     unpack(bucket, offset, out, scale)

No function waits for a GPU. All launches of a program's step read factor and flag from `control` on the
device.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from zerograph.codegen import gpu, plain
from zerograph.codegen.spec import CHUNK, LANES, Copy, Finish, Norm
from zerograph.codegen.targets import Target, call, native, target_of
from zerograph.codegen.updates import apply, measure, update

__all__ = [
    "apply",
    "finish",
    "measure",
    "norm_partials",
    "pack",
    "squares",
    "sum_squares",
    "unpack",
    "update",
]

# Norms


def norm_partials(grads: Sequence[Tensor], parts: int, target: Target | None = None) -> Tensor:
    """Sums of squares, float64 [parts]: of the r-th of `parts` equal slices of all `grads`.

    The result depends on a slice's contents alone: it has the same bits whether a rank has one slice
    or all of them.
    """
    target = target or target_of(grads[0].device)
    sizes = [grad.numel() // parts for grad in grads]
    assert all(size * parts == grad.numel() for size, grad in zip(sizes, grads))
    counts = [-(-size // CHUNK) for size in sizes]
    if target == "torch":
        return _totals(target, grads[0].dtype, torch.cat([_plain(g, parts) for g in grads], 1))
    partials = torch.empty(parts, sum(counts), dtype=torch.float64, device=grads[0].device)
    first = 0
    for grad, size, count in zip(grads, sizes, counts):
        _norm(target, Norm(grad.dtype), grad, partials, parts, size, first)
        first += count
    return _totals(target, grads[0].dtype, partials)


def squares(grad: Tensor, parts: int, target: Target | None = None) -> Tensor:
    """Of one gradient the sums of which `norm_partials` is made, float64 [parts, chunks of a slice]."""
    target = target or target_of(grad.device)
    size = grad.numel() // parts
    if target == "torch":
        return _plain(grad, parts)
    partials = torch.empty(parts, -(-size // CHUNK), dtype=torch.float64, device=grad.device)
    _norm(target, Norm(grad.dtype), grad, partials, parts, size, 0)
    return partials


def sum_squares(
    found: Sequence[Tensor], dtype: torch.dtype, target: Target | None = None
) -> Tensor:
    """The `norm_partials`, float64 [parts], of gradients of which `found` are the squares.

    `dtype` is the first gradient's, whose kernel sums them.
    """
    return _totals(target or target_of(found[0].device), dtype, torch.cat(list(found), 1))


def _plain(grad: Tensor, parts: int) -> Tensor:
    return torch.stack([plain.sums_of_squares(own) for own in grad.chunk(parts)])


def _totals(target: Target, dtype: torch.dtype, partials: Tensor) -> Tensor:
    """The sum of each row of `partials`, float64 [parts, blocks]."""
    parts, blocks = partials.shape
    if target == "torch":
        return torch.stack([row.sum() for row in partials])
    totals = torch.empty(parts, dtype=torch.float64, device=partials.device)
    if target == "cpp":
        call(native(Norm(dtype), "_total"), parts, blocks, partials, totals)
    else:
        total, settings = gpu.kernel(Norm(dtype), "_total"), gpu.chosen("total", partials.device)
        gpu.launch(total, (parts,), settings.warps, partials, totals, blocks, LANES=settings.block)
    return totals


def _norm(
    target: Target, spec: Norm, grad: Tensor, partials: Tensor, parts: int, size: int, first: int
) -> None:
    """The partial sums of one gradient, to its columns of `partials`."""
    blocks = partials.shape[1]
    if target == "cpp":
        threads = torch.get_num_threads()
        call(native(spec), threads, parts, size, blocks, first, grad, partials)
        return
    grid = (-(-size // CHUNK), parts)
    warps = gpu.chosen("norm", grad.device).warps
    args = (grad, partials, size, blocks, first)
    gpu.launch(gpu.kernel(spec), grid, warps, *args, CHUNK=CHUNK, LANES=LANES)


def finish(
    partials: Tensor,
    divided: Tensor | None = None,
    max_norm: float = 0.0,
    skips: bool = False,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm, float64 [], and `control` for updates, fp32 [2], from partials float64 [world].

    `divided` [], fp32 or float64, is what gradients are to be multiplied by beside clipping to
    `max_norm`; the norm is theirs after it. With `skips` a norm that is not finite applies nothing.
    """
    target = target or target_of(partials.device)
    spec = Finish(max_norm > 0, divided.dtype if divided is not None else None, skips)
    limit = _limit(max_norm, partials.device) if max_norm > 0 else None
    if target == "torch":
        return plain.finish(spec, partials, divided, limit)
    norm = torch.empty((), dtype=torch.float64, device=partials.device)
    control = torch.empty(2, dtype=torch.float32, device=partials.device)
    if target == "cpp":
        call(native(spec), len(partials), partials, divided, limit, norm, control)
    else:
        given = tuple(t for t in (partials, divided, limit, norm, control) if t is not None)
        warps = gpu.chosen("finish", partials.device).warps
        gpu.launch(gpu.kernel(spec), (1,), warps, *given, len(partials))
    return norm, control


@cache
def _limit(max_norm: float, device: torch.device) -> Tensor:
    return torch.tensor(max_norm, dtype=torch.float64, device=device)


# Packing


def pack(
    grad: Tensor, bucket: Tensor, offset: int, scale: float = 1.0, target: Target | None = None
) -> None:
    """Copy `grad` (dense, in memory order) to `bucket[offset:]`, cast, then times `scale`."""
    flat = grad.as_strided((grad.numel(),), (1,))
    place = bucket.narrow(0, offset, grad.numel())
    _copy(Copy("pack", grad.dtype, bucket.dtype), flat, place, scale, target)


def unpack(
    bucket: Tensor, offset: int, out: Tensor, scale: float = 1.0, target: Target | None = None
) -> None:
    """Copy `bucket[offset:]` to `out` (dense, in memory order), times `scale`, cast."""
    flat = out.as_strided((out.numel(),), (1,))
    place = bucket.narrow(0, offset, out.numel())
    _copy(Copy("unpack", bucket.dtype, out.dtype), place, flat, scale, target)


def _copy(spec: Copy, source: Tensor, given: Tensor, scale: float, target: Target | None) -> None:
    target = target or target_of(source.device)
    size = source.numel()
    if target == "torch" and spec.rounds_first:
        given.copy_(source).mul_(scale)
    elif target == "torch":
        real = torch.float64 if spec.double else torch.float32
        given.copy_(source.to(real) * _scale(scale, torch.device("cpu")).to(real))
    elif target == "cpp":
        scaled = _scale(scale, source.device)
        call(native(spec), torch.get_num_threads(), size, source, scaled, given)
    else:
        settings = gpu.chosen(spec.kind, source.device)
        grid = (-(-size // settings.block),)
        args = (source, _scale(scale, source.device), given, size)
        gpu.launch(gpu.kernel(spec), grid, settings.warps, *args, BLOCK=settings.block)


@lru_cache(maxsize=256)
def _scale(scale: float, device: torch.device) -> Tensor:
    return torch.tensor(scale, dtype=torch.float32, device=device)
