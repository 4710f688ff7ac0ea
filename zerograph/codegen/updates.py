"""Optimizer updates of a flat slice: from groups and runs to the tables that a kernel takes, and its launch.

    update(rule, groups, runs, master, grad, states, low, control)     one launch a set of flags
    measure(..), then apply(..)                                        rules with norms of parameters

Runs are cut in tiles, each a row of a table: start, stop, row of the table of scalars. Both tables
are small; the one of tiles is kept on the device from step to step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from zerograph.codegen import gpu, plain
from zerograph.codegen.rules import Described, Flags, Options, Run
from zerograph.codegen.spec import RUN_ALIGN, Phase, Update
from zerograph.codegen.targets import Target, call, native, target_of

Tile = tuple[int, ...]
"""(start, stop, row of the table of scalars, run)"""

CPU_TILE = 1 << 14
"""Elements of a tile on the CPU: what one thread takes at a time."""


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
    arrays = _Arrays(master, states, control, grad, low)
    for launch in _launches(rule, groups, runs, arrays, "whole"):
        _run(launch, arrays, target or target_of(master.device))


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
    arrays = _Arrays(master, states, control, grad)
    totals = torch.zeros(len(runs), 2, dtype=torch.float64, device=master.device)
    for launch in _launches(rule, groups, runs, arrays, "measure"):
        sums, bounds = _run(launch, arrays, target)
        own = torch.empty(len(launch.ranges), 2, dtype=torch.float64, device=master.device)
        _total(target, launch.spec, sums, bounds, own)
        if len(launch.ranges) == len(runs):
            return own
        for place, (*_, run) in enumerate(launch.ranges):
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
    arrays = _Arrays(master, states, control, low=low, norms=norms)
    for launch in _launches(rule, groups, runs, arrays, "apply"):
        _run(launch, arrays, target or target_of(master.device))


# Launches


@dataclass(frozen=True)
class _Arrays:
    """The tensors of a slice that launches take, flat and of one length but `control` and `norms`."""

    master: Tensor
    states: Mapping[str, Tensor]
    control: Tensor | None
    grad: Tensor | None = None
    low: Tensor | None = None
    norms: Tensor | None = None

    def spec(self, rule: Described, flags: Flags, phase: Phase) -> Update:
        """The kernel for them; one that takes no gradient is named by the master's dtype."""
        grad = self.master if self.grad is None else self.grad
        low = self.low.dtype if self.low is not None else None
        controlled = self.control is not None
        return Update(rule.name, flags, grad.dtype, self.master.dtype, low, controlled, phase)


@dataclass(frozen=True)
class _Launch:
    """A kernel, the ranges that it updates, and their table of scalars [rows, columns]."""

    spec: Update
    ranges: tuple[Tile, ...]
    rows: list[list[float]]


def _launches(
    rule: Described, groups: Sequence[Options], runs: Sequence[Run], arrays: _Arrays, phase: Phase
) -> Iterator[_Launch]:
    """One for each set of flags."""
    for flags in dict.fromkeys(rule.flags(groups[run.group]) for run in runs):
        own = [(i, run) for i, run in enumerate(runs) if rule.flags(groups[run.group]) == flags]
        pairs = list(dict.fromkeys((run.group, run.step) for _, run in own))
        index = {pair: row for row, pair in enumerate(pairs)}
        ranges = tuple((r.start, r.stop, index[r.group, r.step], i) for i, r in own)
        rows = [rule.row(groups[group], step) for group, step in pairs]
        yield _Launch(arrays.spec(rule, flags, phase), ranges, rows)


def _run(launch: _Launch, arrays: _Arrays, target: Target) -> tuple[Tensor, Tensor]:
    """Run it; of "measure" the answer is its sums and the first tile of each run."""
    spec, device = launch.spec, arrays.master.device
    whole = spec.phase == "whole"
    scalars = torch.tensor(launch.rows, dtype=torch.float64).to(arrays.master.dtype)
    block = {"cpp": CPU_TILE, "torch": plain.PIECE}.get(target, 0)
    block = block or gpu.chosen("update", device).block
    tiles, bounds = table(launch.ranges, block, whole, device)
    sums = torch.zeros(0 if whole else len(tiles), 2, dtype=torch.float64, device=device)
    control, grad, low, master = arrays.control, arrays.grad, arrays.low, arrays.master
    states = [arrays.states[name] for name in spec.states]
    if target == "torch":
        pieces, rows = cut(launch.ranges, block), scalars.tolist()
        made = plain.update(spec, pieces, rows, control, grad, states, low, master, arrays.norms)
        return (sums if made is None else made), bounds
    between = sums if spec.phase == "measure" else arrays.norms
    given = control, between, grad, *states, low, master
    if target == "cpp":
        call(native(spec), torch.get_num_threads(), len(tiles), tiles, scalars, *given)
    else:
        if device.type == "cuda":
            assert all(end % RUN_ALIGN == 0 for tile in launch.ranges for end in tile[:2])
            scalars = scalars.pin_memory().to(device, non_blocking=True)
        tensors = tuple(tensor for tensor in (tiles, scalars, *given) if tensor is not None)
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
        call(native(spec, "_total"), len(totals), bounds, sums, totals)
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
