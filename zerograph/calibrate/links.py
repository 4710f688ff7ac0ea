"""The link between this process group's ranks, and how collectives and compute slow each other."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from zerograph import collectives
from zerograph.calibrate.timing import timed
from zerograph.cost import Cluster, Link
from zerograph.cost.cluster import Kind
from zerograph.runtime.world import current_world

KINDS: tuple[Kind, ...] = ("gather", "reduce_scatter", "all_reduce")
SIZES = (1 << 16, 1 << 20, 1 << 22, 1 << 24)
"""Bytes of the full buffers."""
IN_FLIGHT = 2
"""Collectives under way at once, as a step has them; gloo moves more so than one by one."""


def link_of(cluster: Cluster, world: int) -> Link:
    """Latency and bandwidth, fitted to collectives of each kind and of all sizes.

    `cluster` gives the device, the hops and the bytes of each; the fastest kind sets the bandwidth.
    """
    fits = {kind: _fit(cluster, kind, world) for kind in KINDS}
    bandwidth = max(rate for _, rate in fits.values())
    return Link(
        bandwidth=bandwidth,
        latency=median(latency for latency, _ in fits.values()),
        efficiency={kind: rate / bandwidth for kind, (_, rate) in fits.items()},
    )


def _fit(cluster: Cluster, kind: Kind, world: int) -> tuple[float, float]:
    """(seconds of a hop, bytes per second): least squares of the relative error over SIZES."""
    rows, times = [], []
    for nbytes in SIZES:
        took = timed(_several(kind, nbytes)) / IN_FLIGHT
        for touched in (cluster.copied, cluster.summed):
            took -= cluster.device.seconds(0, touched(kind, nbytes, world), "f32")
        rows.append((cluster.hops(kind, world), cluster.bytes_per_link(kind, nbytes, world)))
        times.append(took)
    return _solve(rows, times)


def _solve(rows: Sequence[tuple[float, float]], times: Sequence[float]) -> tuple[float, float]:
    weights = 1 / torch.tensor(times, dtype=torch.float64)
    system = torch.tensor(rows, dtype=torch.float64) * weights[:, None]
    latency, pace = torch.linalg.lstsq(system, torch.ones(len(times), 1).double()).solution[:, 0]
    return max(0.0, float(latency)), 1 / max(float(pace), 1e-12)


def _several(kind: Kind, nbytes: int) -> Callable[[], None]:
    start = _starter(kind, nbytes)

    def run() -> None:
        for finish in [start() for _ in range(IN_FLIGHT)]:
            finish()

    return run


def _starter(kind: Kind, nbytes: int) -> Callable[[], Callable[[], Tensor]]:
    """A function that starts a collective as a lowered program does, and answers its wait."""
    world = current_world("cpu")
    full, shard = torch.ones(nbytes // 4), torch.ones(nbytes // 4 // world.size)
    functional = torch.ops._c10d_functional

    def all_reduce() -> Callable[[], Tensor]:
        return partial(collectives.wait, functional.all_reduce(full, "avg", world.name_of()), kind)

    def gather() -> Callable[[], Tensor]:
        out = torch.empty(shard.numel() * world.size)
        return world.channel("gathers").gather(shard, out, "of ones").wait

    def reduce_scatter() -> Callable[[], Tensor]:
        sent = full[: shard.numel() * world.size]
        return world.channel("reductions").reduce_scatter(sent, "of ones", mean=True).wait

    starters: dict[Kind, Callable[[], Callable[[], Tensor]]] = {
        "gather": gather,
        "reduce_scatter": reduce_scatter,
        "all_reduce": all_reduce,
    }
    return starters[kind]


def interference_of() -> tuple[float, float]:
    """(the share of its speed that compute loses to a collective, and a collective to compute).

    With shares s and d, compute C longer than a collective T makes both take C + T s / (1 - d); a shorter one
    makes them take T + C d / (1 - s). Both are measured, for a gather and an all-reduce.
    """
    found = [_interference(kind) for kind in ("gather", "all_reduce")]
    slows, slowed = (sum(column) / len(found) for column in zip(*found, strict=True))
    return slows, slowed


def _interference(kind: Kind) -> tuple[float, float]:
    collective = _several(kind, SIZES[2])
    start = _starter(kind, SIZES[2])
    alone = timed(collective)
    unit = timed(_products(1))
    long, short = (_products(max(1, round(part * alone / unit))) for part in (1.5, 0.5))

    def both(products: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            pending = [start() for _ in range(IN_FLIGHT)]
            products()
            for finish in pending:
                finish()

        return run

    late = (timed(both(long)) - timed(long)) / alone
    stretched = (timed(both(short)) - alone) / timed(short)
    return shares(late, stretched)


def shares(late: float, stretched: float) -> tuple[float, float]:
    """(s, d) of late = s / (1 - d) and stretched = d / (1 - s), each within [0, 0.9].

    Where both are about 1 (two threads on one core) only s + d = 1 is known, and halves are taken.
    """
    late, stretched = max(0.0, late), max(0.0, stretched)
    if abs(1 - late * stretched) < 0.1:
        return 0.5, 0.5
    slows = late * (1 - stretched) / (1 - late * stretched)
    slowed = stretched * (1 - late) / (1 - late * stretched)
    return min(max(slows, 0.0), 0.9), min(max(slowed, 0.0), 0.9)


def _products(count: int) -> Callable[[], None]:
    square = torch.ones(192, 192)

    def run() -> None:
        for _ in range(count):
            square @ square

    return run
