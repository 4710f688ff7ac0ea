"""What a rank computes in a second: products by dtype, memory, copies to the host, starting an operator."""

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from zerograph import transfers
from zerograph.calibrate.reference import step_rates
from zerograph.calibrate.timing import timed
from zerograph.cost import Device
from zerograph.precision import short

SIZES = (128, 256, 512)
SLOW_SIZES = (64, 128)
"""Of products in dtypes that many CPUs have no instructions for."""
COPIES = (1 << 22, 1 << 24, 1 << 25)
"""Bytes of the values that are copied to the host and back."""
DTYPES = {
    torch.float32: SIZES,
    torch.float64: SIZES,
    torch.bfloat16: SLOW_SIZES,
    torch.float16: SLOW_SIZES,
}


def device_of(memory: int) -> Device:
    """This rank's share of the CPU, `memory` bytes of it.

    The rate of f32 products is that of a real step; the others keep their ratio to it in products alone.
    """
    rates = {dtype: _products(dtype, sizes) for dtype, sizes in DTYPES.items()}
    small = torch.ones(16)
    launch, view = _each(lambda: small * small), _each(lambda: small.view(4, 4))
    step = step_rates(launch)
    scale = step.products / rates[torch.float32]
    return Device(
        name=f"CPU rank, threads: {torch.get_num_threads()}",
        memory=memory,
        flops={short(dtype): rate * scale for dtype, rate in rates.items()},
        bandwidth=step.streamed,
        cache=step.cache,
        cache_bandwidth=step.cached,
        launch=launch,
        view=view,
        host_bandwidth=_copied(),
        asynchronous=False,
    )


def _copied() -> float:
    """Bytes per second of copies to the host and back, as a step makes them; on a CPU into new memory."""
    rates = []
    for nbytes in COPIES:
        value = torch.ones(nbytes // 4)
        host = transfers.wait(transfers.offload(value))
        away, back = (
            partial(transfers.offload, value),
            partial(transfers.reload, host, value.device),
        )
        rates += [nbytes / timed(copy) for copy in (away, back)]
    return float(median(rates))


def _products(dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """FLOPs per second of square products, the median over sizes."""
    return median(_product(torch.ones(size, size, dtype=dtype)) for size in sizes)


def _product(square: torch.Tensor) -> float:
    return float(2 * square.shape[0] ** 3 / timed(lambda: square @ square))


def _each(function: Callable[[], object], calls: int = 1000) -> float:
    """Seconds of one of many short calls."""

    def loop() -> None:
        for _ in range(calls):
            function()

    return timed(loop) / calls
