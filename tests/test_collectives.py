"""Channels: what they gather and sum, to the bit, and what a rank hears of one that died or stands still."""

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import zerograph
from tests import tiny
from tests.oracle import config_for
from tests.ranks import outcomes_of, run_ranks
from zerograph import collectives
from zerograph.collectives import CHUNK
from zerograph.errors import CommunicationError
from zerograph.runtime.world import current_world

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
SHARDS = (0, 1, 7, CHUNK // 4 - 1, CHUNK // 4, CHUNK // 4 + 1, 5 * CHUNK // 8 + 3)
"""Elements of a rank's part: around one fp32 chunk, and several of two and eight bytes."""


def values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 100
    return made.to(dtype)


def _gathers(rank: int, world: int) -> None:
    channel = current_world().channel("gathers")
    for dtype in DTYPES:
        for numel in SHARDS:
            shards = [values(r, numel, dtype) for r in range(world)]
            full = torch.empty(world * numel, dtype=dtype)
            pending = channel.gather(shards[rank], full, "b0")
            assert pending.wait() is full
            assert torch.equal(full, torch.cat(shards)), (dtype, numel)
            full = torch.zeros(world * numel, dtype=dtype)
            own = full[rank * numel : (rank + 1) * numel]
            own.copy_(shards[rank])
            channel.gather(own, full, "b0").wait()
            assert torch.equal(full, torch.cat(shards)), "a shard that lies in its bucket"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_gather_is_the_concatenation(world: int) -> None:
    run_ranks(world, _gathers)


def in_rank_order(buffers: list[Tensor], mean: bool, factor: float) -> Tensor:
    """The sum as it is promised: in rank order, 16-bit values in fp32 and rounded once."""
    dtype = buffers[0].dtype
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    total = buffers[0].to(wide)
    for buffer in buffers[1:]:
        total = total + buffer.to(wide)
    total = total / len(buffers) if mean else total
    return (total * factor if factor != 1.0 else total).to(dtype)


def _reductions(rank: int, world: int) -> None:
    channel = current_world().channel("reductions")
    for dtype in DTYPES[:4]:
        for numel in SHARDS:
            buffers = [values(r, world * numel, dtype) for r in range(world)]
            for mean, factor in ((True, 1.0), (False, 1.0), (False, 0.3)):
                mine = buffers[rank].clone()
                got = channel.reduce_scatter(mine, "b0", mean, factor).wait()
                want = in_rank_order(buffers, mean, factor)[rank * numel : (rank + 1) * numel]
                assert torch.equal(got, want), (dtype, numel, mean, factor)
                assert torch.equal(mine, buffers[rank]), "what is sent is not changed"
                shared = got.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
                assert numel == 0 or not shared, "the slice would keep the whole buffer alive"
                whole = channel.all_reduce(mine, "b0", mean, factor).wait()
                assert whole is mine and torch.equal(whole, in_rank_order(buffers, mean, factor))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_reduction_is_the_sum_in_rank_order(world: int) -> None:
    run_ranks(world, _reductions)


def _as_gloo(rank: int, world: int) -> None:
    channel = current_world().channel("reductions")
    buffers = [values(r, 1 << 20, torch.float32) for r in range(world)]
    functional = torch.ops._c10d_functional
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    pending = functional.reduce_scatter_tensor(buffers[rank], "avg", world, name)
    want = collectives.wait(pending, "the reference")
    got = channel.reduce_scatter(buffers[rank], "b0", mean=True).wait()
    assert torch.equal(got, want)


def test_of_two_ranks_the_mean_is_gloos_bit_for_bit() -> None:
    run_ranks(2, _as_gloo)


def _many(rank: int, world: int) -> None:
    """Twelve gathers and reductions under way at once, waited for in another order than they began."""
    gathers, reductions = (current_world().channel(name) for name in ("gathers", "reductions"))
    pending: list[tuple[Any, Tensor]] = []
    for index in range(6):
        numel = (index + 1) * CHUNK // 7
        shards = [values(100 * index + r, numel, torch.float32) for r in range(world)]
        full = torch.empty(world * numel)
        pending.append((gathers.gather(shards[rank], full, f"b{index}"), torch.cat(shards)))
        buffers = [values(100 * index + r, world * numel, torch.float32) for r in range(world)]
        want = in_rank_order(buffers, True, 1.0)[rank * numel : (rank + 1) * numel]
        pending.append((reductions.reduce_scatter(buffers[rank], f"b{index}", True), want))
    del shards, buffers, full
    order = sorted(range(12), key=lambda index: (index * 5 + rank) % 12)
    for index in order:
        exchange, want = pending[index]
        assert torch.equal(exchange.wait(), want), index


def test_many_are_under_way_at_once() -> None:
    run_ranks(3, _many)


# Faults


PATIENCE = 5.0
"""Seconds that a collective may take in these tests."""


def _lost(rank: int, world: int, stage: int, lost_by: int) -> dict[str, Any]:
    """Train until the last rank is gone; what this rank then hears, and after how long."""
    engine = zerograph.compile(tiny.Blocks(), config_for(stage))
    batch = tiny.batch()
    for step in range(100):
        if rank == world - 1 and step == 2:
            os.kill(os.getpid(), lost_by)
        since = time.monotonic()
        try:
            engine.backward(engine(**batch)["loss"])
            engine.step()
        except CommunicationError as error:
            return {"error": str(error), "took": time.monotonic() - since}
    return {"error": "none"}


@pytest.mark.parametrize(
    "stage, lost_by, named",
    [
        (0, signal.SIGKILL, "the reduction of bucket b"),
        (1, signal.SIGKILL, "the reduction of bucket b"),
        (2, signal.SIGSTOP, "the reduction of bucket b"),
        (3, signal.SIGKILL, "the gather of bucket b0"),
        (3, signal.SIGSTOP, "the gather of bucket b0"),
    ],
)
def test_a_rank_that_dies_or_stands_still_is_heard_of(stage: int, lost_by: int, named: str) -> None:
    outcomes = outcomes_of(
        3, _lost, stage, int(lost_by), timeout=90, collectives=PATIENCE, lost=[2]
    )
    assert outcomes[2][0] == "timeout", "the last rank was lost"
    for rank, (kind, found) in enumerate(outcomes[:2]):
        assert kind == "value", found
        named = re.match(
            rf"rank {rank}: the (gather|reduction) of bucket b\d+ failed", found["error"]
        )
        assert named, found
        assert "timeout" in found["error"], "how long ranks wait, and where that is set"
        assert found["took"] < 4 * PATIENCE, found


def _left_alone(rank: int, world: int) -> float:
    """After an error on one channel, what is under way on the other is not waited for at the end."""
    gathers, reductions = (current_world().channel(name) for name in ("gathers", "reductions"))
    if rank:
        time.sleep(3 * PATIENCE)
        return 0.0
    pending = gathers.gather(torch.ones(8), torch.empty(8 * world), "b0")
    with pytest.raises(CommunicationError, match="the reduction of bucket b1"):
        reductions.reduce_scatter(torch.ones(8 * world), "b1", mean=True).wait()
    since = time.monotonic()
    del pending
    return time.monotonic() - since


def test_a_rank_that_heard_of_a_loss_stands_still_no_more() -> None:
    outcomes = outcomes_of(2, _left_alone, timeout=60, collectives=PATIENCE)
    assert outcomes[0][0] == "value" and outcomes[0][1] < PATIENCE / 2, outcomes[0]
