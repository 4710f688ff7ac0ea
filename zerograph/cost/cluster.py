"""Described machines: a device, the links within and between nodes, and what a collective costs on them.

A collective of `nbytes` (its full buffer) over `world` ranks is priced by alpha-beta: latency times the
steps of its algorithm, and the bytes that its slowest link carries over that link's bandwidth.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zerograph.errors import PlanError

GIGA = 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator (or one rank's share of a CPU)."""

    name: str
    memory: int
    """Bytes."""
    flops: Mapping[str, float]
    """Per second, dense matrix products, by dtype as the plan's text spells it ("bf16", "f32")."""
    bandwidth: float
    """Bytes per second of its memory."""
    launch: float
    """Seconds that each operator takes beside its work."""


@dataclass(frozen=True)
class Link:
    """How a rank reaches others."""

    bandwidth: float
    """Bytes per second and direction, for one rank."""
    latency: float
    """Seconds of one message."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. A world no larger than `per_node` never leaves its node."""

    name: str
    device: Device
    per_node: int
    intra: Link
    inter: Link

    def link(self, world: int) -> Link:
        """The slowest link of a ring over `world` ranks."""
        return self.intra if world <= self.per_node else self.inter

    def collective(self, kind: str, nbytes: int, world: int) -> float:
        """Seconds of a collective named as in the plan's traffic, with a full buffer of `nbytes`."""
        if world == 1:
            return 0.0
        link = self.link(world)
        rounds = 2 if kind in ("all_reduce", "any_rank", "sum_weights") else 1
        share = nbytes * (world - 1) / world
        return rounds * ((world - 1) * link.latency + share / link.bandwidth)


def _h100() -> Cluster:
    flops = {"bf16": 989e12, "f16": 989e12, "f32": 67e12, "f64": 67e12}
    device = Device("H100", 80 * 10**9, flops, 3.35e12, 4e-6)
    return Cluster("h100", device, 8, Link(450 * GIGA, 3e-6), Link(50 * GIGA, 8e-6))


def _cpu() -> Cluster:
    flops = {"bf16": 5e10, "f16": 5e9, "f32": 5e10, "f64": 2.5e10}
    device = Device("CPU core", 16 * 10**9, flops, 1e10, 5e-6)
    return Cluster("cpu", device, 1 << 30, Link(1 * GIGA, 5e-5), Link(1 * GIGA, 5e-5))


CLUSTERS: dict[str, Cluster] = {cluster.name: cluster for cluster in (_h100(), _cpu())}


def cluster_of(name: str) -> Cluster:
    """A cluster by its name. Raises PlanError with the names that there are."""
    if name not in CLUSTERS:
        raise PlanError(f"no cluster {name!r}; there are {', '.join(CLUSTERS)}")
    return CLUSTERS[name]
