"""What it costs to put one scaled gradient into its bucket: copy_ and mul_, or one `pack` kernel.

    nice python benchmarks/packing.py

Medians of nine, in microseconds, of one thread on the CPU. `LEAST` of codegen/packing.py is read off it.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from zerograph.codegen import kernels

CASES = [
    (torch.float32, torch.bfloat16, 1.0),
    (torch.bfloat16, torch.float32, 1.0),
    (torch.float32, torch.float32, 0.5),
    (torch.bfloat16, torch.bfloat16, 0.5),
    (torch.float32, torch.bfloat16, 0.5),
    (torch.bfloat16, torch.float32, 0.5),
]
SIZES = [1 << power for power in (12, 16, 17, 18, 20, 24)]


def timed(function: Callable[[], object], times: int) -> float:
    """Microseconds a call."""
    function()
    found = []
    for _ in range(9):
        begin = time.perf_counter()
        for _ in range(times):
            function()
        found.append((time.perf_counter() - begin) / times)
    return statistics.median(found) * 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{'gradient':10} {'bucket':10} {'scale':>5} {'elements':>10} {'copy_':>9} {'pack':>9}  gain"
    )
    for source, target, scale in CASES:
        for size in SIZES:
            grad, buffer = torch.randn(size).to(source), torch.zeros(size, dtype=target)
            given = buffer, grad, 0, [size], [1], scale
            times = min(300, max(3, (1 << 22) // size))
            old, new = (timed(partial(way, *given), times) for way in (kernels.put, kernels.pack))
            names = f"{str(source)[6:]:10} {str(target)[6:]:10}"
            print(f"{names} {scale:5} {size:10,} {old:9.1f} {new:9.1f}  {old / new:.2f}")


if __name__ == "__main__":
    main()
