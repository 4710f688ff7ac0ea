"""The kernels as functions on tensors: the device at hand decides which target runs.

    update(rule, groups, runs, master, grad, states, low, control)     in place, one launch a variant
    norm_partials(grads, parts)  ->  float64 [parts]
    finish(partials, divided, max_norm, skips)  ->  norm float64 [], control fp32 [2]
    pack(grad, bucket, offset, scale)     unpack(bucket, offset, out, scale)
    measure(..), apply(..)                                             updates with norms of parameters

CUDA and ROCm tensors go to Triton, CPU tensors to C++; without Triton or a compiler, plain torch runs.
ZEROGRAPH_KERNELS=torch asks for that. No function waits for a GPU. All launches of a program's step read
factor and flag from `control` on the device.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from zerograph.codegen import cpp, gpu, plain
from zerograph.codegen.render import render
from zerograph.codegen.rules import Described, Flags, Options, Run
from zerograph.codegen.spec import CHUNK, LANES, RUN_ALIGN, Copy, Finish, Norm, Spec, Update
from zerograph.errors import KernelError, KernelWarning

Target = Literal["triton", "cpp", "torch"]
Tile = tuple[int, ...]
"""(start, stop, row of the table of scalars, run)"""

CPU_TILE = 1 << 14
"""Elements of a tile on the CPU: what one thread takes at a time."""


def target_of(device: torch.device) -> Target:
    """What runs on `device`."""
    asked = os.environ.get("ZEROGRAPH_KERNELS", "")
    if asked in ("torch", "cpp", "triton"):
        return asked  # type: ignore[return-value]
    if asked:
        raise KernelError(f"ZEROGRAPH_KERNELS is {asked!r}; it may be torch, cpp or triton")
    if device.type == "cpu":
        return "cpp" if cpp.available() else "torch"
    return "triton" if device.type == "cuda" and _has_triton(device.type) else "torch"


@cache
def _has_triton(device: str) -> bool:
    if not gpu.available():
        warnings.warn(
            f"Triton is not installed, so optimizer updates on {device} run as plain torch operations, "
            "several times slower; install triton",
            KernelWarning,
            stacklevel=3,
        )
    return gpu.available()


def _native(spec: Spec, suffix: str = "") -> Any:
    """The C++ function of `spec`, or another of its file by the end of its name."""
    loaded = cpp.load(render(spec, "cpp"), spec.name)
    if loaded is None:
        raise KernelError("there is no C++ compiler; install g++, or set ZEROGRAPH_KERNELS=torch")
    return cpp.function(loaded, spec.name + suffix)


def _call(function: Any, *args: int | Tensor | None) -> None:
    """Call a C function with int64 and pointers. Tensors must be contiguous."""
    made: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            assert arg.is_contiguous() and arg.device.type == "cpu"
            made.append(ctypes.c_void_p(arg.data_ptr()))
        elif arg is not None:
            made.append(ctypes.c_int64(arg))
    function(*made)


# Updates


def update(
    rule: Described,
    groups: Sequence[Options],
    runs: Sequence[Run],
    master: Tensor,
    grad: Tensor,
    states: Mapping[str, Tensor],
    low: Tensor | None,
    control: Tensor | None,
    target: Target | None = None,
) -> None:
    """Apply `rule` to the runs of one slice, in place, and store the low-precision copy.

    `master`, `grad`, `low` and each of `states` are flat and of one length; runs start and stop at
    multiples of 16 elements on a GPU. `control` is fp32 [2]: what gradients are multiplied by, and
    0 where nothing may be touched. Groups that differ in flags take a launch for each set of them.
    """
    for flags, ranges, rows in _variants(rule, groups, runs):
        last = low.dtype if low is not None else None
        spec = Update(rule.name, flags, grad.dtype, master.dtype, last, control is not None)
        given = ranges, rows, control, None, grad, [states[name] for name in spec.states]
        _launch(target or target_of(master.device), spec, *given, low, master)


def measure(
    rule: Described,
    groups: Sequence[Options],
    runs: Sequence[Run],
    master: Tensor,
    grad: Tensor,
    states: Mapping[str, Tensor],
    control: Tensor | None,
    target: Target | None = None,
) -> Tensor:
    """The first launch of a rule with norms of parameters: updates the states.

    Answers sums of squares, float64 [runs, 2]: of each run's parameters and of their changes. A run
    belongs to one parameter; the sums over its runs on all ranks are what `apply` takes.
    """
    target = target or target_of(master.device)
    totals = torch.zeros(len(runs), 2, dtype=torch.float64, device=master.device)
    for flags, ranges, rows in _variants(rule, groups, runs):
        free = control is not None
        spec = Update(rule.name, flags, grad.dtype, master.dtype, None, free, "measure")
        given = ranges, rows, control, None, grad, [states[name] for name in spec.states]
        sums, bounds = _launch(target, spec, *given, None, master)
        own = torch.empty(len(ranges), 2, dtype=torch.float64, device=master.device)
        _total(target, spec, sums, bounds, own)
        if len(ranges) == len(runs):
            return own
        for place, (*_, run) in enumerate(ranges):
            totals[run] = own[place]
    return totals


def apply(
    rule: Described,
    groups: Sequence[Options],
    runs: Sequence[Run],
    master: Tensor,
    states: Mapping[str, Tensor],
    low: Tensor | None,
    control: Tensor | None,
    norms: Tensor,
    target: Target | None = None,
) -> None:
    """The second launch: updates parameters, with sums of squares over whole ones, float64 [runs, 2]."""
    for flags, ranges, rows in _variants(rule, groups, runs):
        last = low.dtype if low is not None else None
        free, dtype = control is not None, master.dtype
        spec = Update(rule.name, flags, dtype, dtype, last, free, "apply")
        given = ranges, rows, control, norms, None, [states[name] for name in spec.states]
        _launch(target or target_of(master.device), spec, *given, low, master)


Variant = tuple[Flags, tuple[Tile, ...], list[list[float]]]


def _variants(rule: Described, groups: Sequence[Options], runs: Sequence[Run]) -> Iterator[Variant]:
    """For each set of flags: it, its ranges (start, stop, row, run) and its rows of scalars."""
    for flags in dict.fromkeys(rule.flags(groups[run.group]) for run in runs):
        own = [(i, run) for i, run in enumerate(runs) if rule.flags(groups[run.group]) == flags]
        pairs = list(dict.fromkeys((run.group, run.step) for _, run in own))
        index = {pair: row for row, pair in enumerate(pairs)}
        rows = [rule.row(groups[group], step) for group, step in pairs]
        yield flags, tuple((r.start, r.stop, index[r.group, r.step], i) for i, r in own), rows


def _launch(
    target: Target,
    spec: Update,
    ranges: tuple[Tile, ...],
    rows: list[list[float]],
    control: Tensor | None,
    norms: Tensor | None,
    grad: Tensor | None,
    states: list[Tensor],
    low: Tensor | None,
    master: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run an update; of "measure" the answer is its sums and the first tile of each run."""
    device, whole = master.device, spec.phase == "whole"
    scalars = torch.tensor(rows, dtype=torch.float64).to(master.dtype)
    block = {"cpp": CPU_TILE, "torch": plain.PIECE}.get(target, 0)
    block = block or gpu.chosen("update", device).block
    tiles, bounds = table(ranges, block, whole, device)
    sums = torch.zeros(0 if whole else len(tiles), 2, dtype=torch.float64, device=device)
    arrays = grad, *states, low, master
    if target == "torch":
        pieces = cut(ranges, block)
        plain_args = pieces, scalars.tolist(), control, grad, states, low, master, norms
        made = plain.update(spec, *plain_args)
        return (sums if made is None else made), bounds
    between = sums if spec.phase == "measure" else norms
    if target == "cpp":
        head = torch.get_num_threads(), len(tiles), tiles, scalars
        _call(_native(spec), *head, control, between, *arrays)
    else:
        if device.type == "cuda":
            assert all(tile[0] % RUN_ALIGN == 0 and tile[1] % RUN_ALIGN == 0 for tile in ranges)
            scalars = scalars.pin_memory().to(device, non_blocking=True)
        given = (tiles, scalars, control, between, *arrays)
        tensors = tuple(tensor for tensor in given if tensor is not None)
        warps = gpu.chosen("update", device).warps
        gpu.launch(gpu.kernel(spec), (len(tiles),), warps, *tensors, BLOCK=block)
    return sums, bounds


def _total(target: Target, spec: Update, sums: Tensor, bounds: Tensor, totals: Tensor) -> None:
    """Sums of tiles to sums of runs, in order."""
    if target == "torch":
        ends = bounds.tolist()
        for run, (first, last) in enumerate(pairwise(ends)):
            totals[run] = sums[first:last].sum(0)
    elif target == "cpp":
        _call(_native(spec, "_total"), len(totals), bounds, sums, totals)
    else:
        own = gpu.chosen("total", sums.device)
        args = gpu.kernel(spec, "_total"), (len(totals),), own.warps, bounds, sums, totals
        gpu.launch(*args, LANES=own.block)


def cut(ranges: Sequence[Tile], block: int) -> list[Tile]:
    """The ranges in pieces of at most `block` elements."""
    return [
        (start, min(start + block, last), *rest)
        for first, last, *rest in ranges
        for start in range(first, last, block)
    ]


@lru_cache(maxsize=1024)
def table(
    ranges: tuple[Tile, ...], block: int, whole: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tiles, int64 [tiles, 3 or 4], and the first tile of each run, int64 [runs + 1].

    Runs seldom change, so a step copies nothing but its scalars.
    """
    tiles = torch.tensor(cut(ranges, block), dtype=torch.int64).view(-1, 4)
    counts = [-(-(stop - start) // block) for start, stop, *_ in ranges]
    bounds = torch.tensor([0, *accumulate(counts)], dtype=torch.int64)
    return (tiles[:, :3] if whole else tiles).contiguous().to(device), bounds.to(device)


# Norms


def norm_partials(grads: Sequence[Tensor], parts: int, target: Target | None = None) -> Tensor:
    """Sums of squares, float64 [parts]: of the r-th of `parts` equal slices of all `grads`.

    The result depends on a slice's contents alone: it has the same bits whether a rank has one slice
    or all of them.
    """
    device = grads[0].device
    target = target or target_of(device)
    sizes = [grad.numel() // parts for grad in grads]
    assert all(size * parts == grad.numel() for size, grad in zip(sizes, grads))
    counts = [-(-size // CHUNK) for size in sizes]
    blocks = sum(counts)
    if target == "torch":
        slices = [[plain.sums_of_squares(s) for s in grad.chunk(parts)] for grad in grads]
        return torch.stack([torch.cat(own).sum() for own in zip(*slices)])
    partials = torch.empty(parts, blocks, dtype=torch.float64, device=device)
    totals = torch.empty(parts, dtype=torch.float64, device=device)
    first = 0
    for grad, size, count in zip(grads, sizes, counts):
        _norm(target, Norm(grad.dtype), grad, partials, parts, size, first)
        first += count
    if target == "cpp":
        _call(_native(Norm(grads[0].dtype), "_total"), parts, blocks, partials, totals)
    else:
        total, settings = gpu.kernel(Norm(grads[0].dtype), "_total"), gpu.chosen("total", device)
        gpu.launch(total, (parts,), settings.warps, partials, totals, blocks, LANES=settings.block)
    return totals


def _norm(
    target: Target, spec: Norm, grad: Tensor, partials: Tensor, parts: int, size: int, first: int
) -> None:
    """The partial sums of one gradient, to its columns of `partials`."""
    blocks = partials.shape[1]
    if target == "cpp":
        threads = torch.get_num_threads()
        _call(_native(spec), threads, parts, size, blocks, first, grad, partials)
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
        _call(_native(spec), len(partials), partials, divided, limit, norm, control)
    else:
        given = tuple(t for t in (partials, divided, limit, norm, control) if t is not None)
        gpu.launch(gpu.kernel(spec), (1,), 1, *given, len(partials))
    return norm, control


@cache
def _limit(max_norm: float, device: torch.device) -> Tensor:
    return torch.tensor(max_norm, dtype=torch.float64, device=device)


# Packing


def pack(
    grad: Tensor, bucket: Tensor, offset: int, scale: float = 1.0, target: Target | None = None
) -> None:
    """Copy `grad` (dense, in memory order) to `bucket[offset:]`, times `scale`, cast."""
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
    if target == "torch":
        real = torch.float64 if spec.double else torch.float32
        given.copy_(source.to(real) * _scale(scale, torch.device("cpu")).to(real))
    elif target == "cpp":
        scaled = _scale(scale, source.device)
        _call(_native(spec), torch.get_num_threads(), size, source, scaled, given)
    else:
        settings = gpu.chosen(spec.kind, source.device)
        grid = (-(-size // settings.block),)
        args = (source, _scale(scale, source.device), given, size)
        gpu.launch(gpu.kernel(spec), grid, settings.warps, *args, BLOCK=settings.block)


@lru_cache(maxsize=256)
def _scale(scale: float, device: torch.device) -> Tensor:
    return torch.tensor(scale, dtype=torch.float32, device=device)
