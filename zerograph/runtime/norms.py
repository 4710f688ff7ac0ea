"""Sums of squares by parameter of a bucket, from and to those of the runs that a rank has of them.

    by_parameter([run of %1, run of %2], (1, 2), 4)    [0, run of %1, run of %2, 0]
    by_run([p0, p1, p2, p3], (1, 2))                   [p1, p2]

Both are float64 [.., 2]. A run belongs to one parameter; its place is the parameter's in the bucket.
"""

from functools import lru_cache

import torch
from torch import Tensor


def by_parameter(sums: Tensor, places: tuple[int, ...], count: int) -> Tensor:
    """float64 [count, 2] from the sums of runs; 0 for parameters without one."""
    if len(places) == count:
        return sums
    return sums.new_zeros(count, 2).index_copy_(0, _index(places, sums.device), sums)


def by_run(norms: Tensor, places: tuple[int, ...]) -> Tensor:
    """float64 [runs, 2] from those of a bucket's parameters."""
    return norms if len(places) == len(norms) else norms[_index(places, norms.device)]


@lru_cache(maxsize=1024)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept on the device, since places seldom change."""
    return torch.tensor(places, dtype=torch.int64).to(device)
