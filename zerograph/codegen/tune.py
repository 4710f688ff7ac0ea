"""Tune: measure launch settings of every family of kernels on a GPU.

    found = tune(torch.device("cuda"), 1 << 26)
    launch.write(path, gpu.architecture(device), rows(found))

Kernels run as a step runs them, on slices that no cache holds. A setting replaces the one in use if its
median is faster by more than MARGIN; else noise would change tables, and with them the last bits of norms.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zerograph.codegen import dispatch, gpu
from zerograph.codegen.launch import Settings, settings, trying
from zerograph.codegen.rules import ADAMW, Run
from zerograph.codegen.spec import LANES, Norm
from zerograph.errors import KernelError

MARGIN = 0.02
REPEATS, WARM = 20, 3
BYTES = 20
"""Of device memory, an element of the slice that is measured."""
WARP = 32

Measure = Callable[[Callable[[], object]], float]
"""Seconds of a launch."""


@dataclass(frozen=True)
class Work:
    """What is measured for one family."""

    family: str
    blocks: tuple[int, ...]
    warps: tuple[int, ...]
    launch: Callable[[], object]
    """Runs it once, as `settings` says."""

    def candidates(self, current: Settings) -> list[Settings]:
        """The setting in use, and those that give every thread at least one element."""
        pairs = (Settings(block, warps) for block in self.blocks for warps in self.warps)
        fit = {own for own in pairs if own.block == 1 or own.block >= WARP * own.warps}
        return sorted(fit | {current})


@dataclass(frozen=True)
class Tuned:
    """What was found for a family."""

    family: str
    before: Settings
    chosen: Settings
    seconds: Mapping[Settings, float]
    """Median seconds of every setting that was measured."""


def tune(device: torch.device, size: int, measure: Measure | None = None) -> list[Tuned]:
    """Measure every family on slices of `size` elements; answers what to write to the table.

    Raises KernelError if the device has too little memory for it.
    """
    measure = measure or Timer(device, size)
    architecture, found = gpu.architecture(device), []
    for work in works(device, size):
        before = settings(work.family, architecture)
        seconds = {}
        for own in work.candidates(before):
            with trying(work.family, own):
                seconds[own] = measure(work.launch)
        found.append(Tuned(work.family, before, best(seconds, before), seconds))
    return found


def best(seconds: Mapping[Settings, float], current: Settings) -> Settings:
    """The fastest setting, the smaller of equals; the current one if it is as fast within MARGIN."""
    fastest = min(seconds, key=lambda own: (seconds[own], own))
    enough = seconds[current] <= seconds[fastest] * (1 + MARGIN)
    return current if enough else fastest


def works(device: torch.device, size: int) -> Iterator[Work]:
    """One for every family: bf16 gradients and parameters beside fp32 masters, as most training has."""
    master, states = torch.randn(size, device=device), torch.zeros(2, size, device=device)
    grad = master.to(torch.bfloat16)
    low = torch.empty_like(grad)
    control = torch.tensor([0.5, 1.0], device=device)
    options, runs = dict(ADAMW.defaults), [Run(0, size, 0, 1)]
    named = dict(zip(ADAMW.states(options), states, strict=True))

    def update() -> None:
        dispatch.update(ADAMW, [options], runs, master, grad, named, low, control, "triton")

    wide = (512, 1024, 2048, 4096)
    yield Work("update", wide, (2, 4, 8, 16), update)
    yield Work("norm", (LANES,), (2, 4, 8, 16), lambda: dispatch.norm_partials([grad], 1, "triton"))
    blocks = max(size >> 10, 1)
    partials = torch.rand(1, blocks, dtype=torch.float64, device=device)
    yield Work("total", (256, 512, 1024), (1, 2, 4, 8), lambda: _total(partials))
    ranks, divided = partials[0, :1].expand(64).contiguous(), torch.ones((), device=device)
    yield Work(
        "finish", (1,), (1, 2, 4), lambda: dispatch.finish(ranks, divided, 1.0, True, "triton")
    )
    yield Work("pack", wide, (4, 8, 16), lambda: dispatch.pack(master, low, 0, 0.5, "triton"))
    yield Work("unpack", wide, (4, 8, 16), lambda: dispatch.unpack(low, 0, master, 0.5, "triton"))


def _total(partials: Tensor) -> Tensor:
    """The second stage of a norm alone."""
    own = gpu.chosen("total", partials.device)
    totals = torch.empty(len(partials), dtype=torch.float64, device=partials.device)
    kernel = gpu.kernel(Norm(torch.bfloat16), "_total")
    args = partials, totals, partials.shape[1]
    gpu.launch(kernel, (len(partials),), own.warps, *args, LANES=own.block)
    return totals


class Timer:
    """Median seconds of a launch on the device alone, by CUDA events.

    Before each the device is given other work, behind which the launch is queued: what the host needs for it
    is not measured, and nothing that it reads is in a cache.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        free, _ = torch.cuda.mem_get_info(device)
        if free < BYTES * size:
            raise KernelError(
                f"measuring on {size:,} elements takes {BYTES * size:,} bytes, and {free:,} are free on the "
                "GPU; give fewer --elements"
            )
        self._other = torch.zeros(size, device=device)

    def __call__(self, launch: Callable[[], object]) -> float:
        for _ in range(WARM):
            launch()
        return statistics.median(self._once(launch) for _ in range(REPEATS))

    def _once(self, launch: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._other.add_(1.0)
        start.record()  # type: ignore[no-untyped-call]
        launch()
        stop.record()  # type: ignore[no-untyped-call]
        stop.synchronize()  # type: ignore[no-untyped-call]
        return float(start.elapsed_time(stop)) / 1e3  # type: ignore[no-untyped-call]


def rows(found: Iterable[Tuned]) -> dict[str, Settings]:
    """What `launch.write` takes."""
    return {each.family: each.chosen for each in found}
