"""Rounds in step with the other ranks."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

ROUNDS = 9


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call on the slowest rank, which all ranks make together.

    It is the lower quartile of ROUNDS, behind one that is not timed; the same on every rank.
    """
    function()
    samples = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        function()
        samples.append(_over_ranks(time.perf_counter() - start, dist.ReduceOp.MAX))
    return sorted(samples)[ROUNDS // 4]


def mean(value: float) -> float:
    """The mean over ranks, on every rank."""
    return _over_ranks(value, dist.ReduceOp.SUM) / dist.get_world_size()


def _over_ranks(value: float, how: dist.ReduceOp.RedOpType) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, op=how)
    return float(total)
