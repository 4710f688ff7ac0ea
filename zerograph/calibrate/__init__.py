"""Calibrate: measure this machine and describe it as a Cluster, for predictions of steps on it.

    zerograph.calibrate.calibrate().save("cluster.json")     ->  zerograph plan .. --cluster cluster.json

It measures CPU ranks over gloo, all at once, so that they share what ranks share in training:

    operators.py   rates of matrix products by dtype and of copies to the host, what starting an operator and
                   making a view take
    reference.py   a real step of a small transformer, recorded node by node: FLOPs and bytes per second
    links.py       collectives by kind and size, and how much they and compute slow each other
    timing.py      rounds in step with the other ranks

Nothing reads a calibration but who is given its file, so plans stay the same on every machine.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from zerograph.calibrate.links import interference_of, link_of
from zerograph.calibrate.operators import device_of
from zerograph.cost import Cluster, Link
from zerograph.errors import PlanError
from zerograph.runtime.world import init_distributed

__all__ = ["calibrate"]


def calibrate(ranks: int = 2) -> Cluster:
    """Measure this machine with `ranks` ranks and answer it as the cluster "this machine".

    Under torchrun, or in a process group that exists, its own ranks and links are measured: every rank calls
    this, and all get the same answer. Otherwise processes are spawned, which talk over the loopback, each on
    its share of the cores; a script must then call this under `if __name__ == "__main__":`. It takes about
    a minute.

    Raises PlanError for fewer than two ranks.
    """
    if "RANK" in os.environ or dist.is_initialized():
        init_distributed("gloo")
        ranks = dist.get_world_size()
    if ranks < 2:
        raise PlanError(f"calibrating needs at least 2 ranks to measure a link, got {ranks}")
    if dist.is_initialized():
        return _measure()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_spawned, (ranks, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        return Cluster.load(Path(folder) / "cluster.json")


def _spawned(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    found = _measure()
    if rank == 0:
        found.save(Path(folder) / "cluster.json")
    dist.barrier()
    dist.destroy_process_group()


def _measure() -> Cluster:
    """All measurements, in the process group that there is; the same on every rank."""
    world = dist.get_world_size()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    unknown = Link(bandwidth=1.0, latency=0.0)
    described = Cluster(
        name="this machine",
        device=device_of(pages // world),
        per_node=world,
        intra=unknown,
        inter=unknown,
        backend="gloo",
    )
    link, (slows, slowed) = link_of(described, world), interference_of()
    found = {"intra": link, "inter": link, "slows_compute": slows, "slowed_by_compute": slowed}
    answers = [described.model_copy(update=found)]
    dist.broadcast_object_list(answers)  # two ranks' solvers may differ in the last bit
    return answers[0]
