"""Clusters by name: numbers of data sheets, with the efficiencies that are assumed.

Peaks are those of the vendors' data sheets, per GPU, dense (without 2:4 sparsity). "f32" is the rate
without TF32, which is what torch uses for matrix products unless it is told otherwise
(`torch.backends.cuda.matmul.fp32_precision`); "tf32" is listed for reference. Link bandwidths are one
direction: half of what the sheets call total. Networks are the vendors' reference nodes: one adapter of
400 Gbit/s a GPU (200 with the A100). Each GPU has 16 lanes of PCIe to the host: generation 4 (32 GB/s) with
the A100, generation 5 (64 GB/s) with the others.

Assumed, not from a sheet: large products reach 0.7 of the peak, other operators 0.85 of the memory's
bandwidth; collectives reach 0.8 of a link within a node and 0.9 of one between nodes, copies to and from the
host 0.8 of its link; a host starts an operator in 5 us and makes a view in 2 us, a kernel takes 2 us beside
its work. Latencies are NCCL's own for its LL128 protocol (src/graph/tuning.cc: 1.9 us a message over NVLink,
4 us over the network, 14 us to start); RCCL's are taken to be the same. `zerograph.calibrate` measures
instead.
"""

import os

from zerograph.cost.cluster import Cluster, Device, Kind, Link
from zerograph.errors import PlanError, suggestion

TERA, GIGA = 10**12, 10**9
_INTRA: dict[Kind, float] = {"gather": 0.8, "reduce_scatter": 0.8, "all_reduce": 0.8}
_INTER: dict[Kind, float] = {"gather": 0.9, "reduce_scatter": 0.9, "all_reduce": 0.9}


def _gpu(
    name: str, memory: int, bandwidth: float, tflops: dict[str, float], host: float = 64
) -> Device:
    """Gigabytes of `memory`; `bandwidth` in terabytes per second, that to the `host` in gigabytes."""
    return Device(
        name=name,
        memory=memory * GIGA,
        flops={dtype: rate * TERA for dtype, rate in tflops.items()},
        bandwidth=bandwidth * TERA,
        efficiency=0.7,
        memory_efficiency=0.85,
        kernel=2e-6,
        launch=5e-6,
        view=2e-6,
        host_bandwidth=0.8 * host * GIGA,
    )


def _node(name: str, device: Device, within: float, network: float) -> Cluster:
    """Eight GPUs; `within` and `network` are gigabytes per second, direction and GPU."""
    return Cluster(
        name=name,
        device=device,
        per_node=8,
        intra=Link(bandwidth=within * GIGA, latency=1.9e-6, efficiency=_INTRA),
        inter=Link(bandwidth=network * GIGA, latency=4e-6, efficiency=_INTER),
        start=14e-6,
    )


_HOPPER = {"bf16": 989.4, "f16": 989.4, "tf32": 494.7, "f32": 66.9, "f64": 66.9}

_A100 = _gpu(
    "A100 SXM 80GB",
    80,
    2.039,
    {"bf16": 312.0, "f16": 312.0, "tf32": 156.0, "f32": 19.5, "f64": 19.5},
    host=32,
)
"""NVIDIA A100 Tensor Core GPU data sheet, SXM 80GB: f64 on tensor cores; NVLink 3, 600 GB/s in total;
DGX A100 data sheet: eight 200 Gbit/s adapters."""

_H100 = _gpu("H100 SXM 80GB", 80, 3.35, _HOPPER)
"""NVIDIA H100 Tensor Core GPU data sheet and architecture white paper, SXM5: f64 on tensor cores;
NVLink 4, 900 GB/s in total; DGX H100 data sheet: eight 400 Gbit/s adapters."""

_H200 = _gpu("H200 SXM 141GB", 141, 4.8, _HOPPER)
"""NVIDIA H200 Tensor Core GPU data sheet, SXM: compute, NVLink and network as the H100."""

_B200 = _gpu(
    "B200 180GB",
    180,
    8.0,
    {"bf16": 2250.0, "f16": 2250.0, "tf32": 1100.0, "f32": 75.0, "f64": 37.0},
)
"""NVIDIA HGX and DGX B200 data sheets, an eighth of the board: NVLink 5, 1.8 TB/s in total; eight
400 Gbit/s adapters."""

_MI300X = _gpu(
    "MI300X 192GB",
    192,
    5.3,
    {"bf16": 1307.4, "f16": 1307.4, "tf32": 653.7, "f32": 163.4, "f64": 163.4},
)
"""AMD Instinct MI300X data sheet: f32 and f64 as matrix products; seven Infinity Fabric links of 128 GB/s
in both directions, 64 in one; platform with eight 400 Gbit/s adapters."""

_CPU = Device(
    name="CPU core",
    memory=16 * GIGA,
    flops={"f32": 5e10, "f64": 2.5e10, "bf16": 5e9, "f16": 2e9},
    bandwidth=8e9,
    host_bandwidth=4e9,
    launch=5e-6,
    view=2e-6,
    asynchronous=False,
)
"""One core of a server of the 2020s with AVX2: 16 f32 multiply-adds a cycle at about 2 GHz, most of them
reached; 16-bit products as slow as torch's without AMX or AVX512-BF16."""


def _cpu() -> Cluster:
    """Cores of one machine over gloo on its loopback."""
    loopback = Link(bandwidth=1e9, latency=1e-4)
    return Cluster(
        name="cpu",
        device=_CPU,
        per_node=1 << 30,
        intra=loopback,
        inter=loopback,
        backend="gloo",
        start=1e-4,
        slows_compute=0.5,
        slowed_by_compute=0.5,
    )


CLUSTERS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        _node("a100", _A100, 300, 25),
        _node("h100", _H100, 450, 50),
        _node("h200", _H200, 450, 50),
        _node("b200", _B200, 900, 50),
        _node("mi300x", _MI300X, 448, 50),
        _cpu(),
    )
}


def cluster_of(name: str) -> Cluster:
    """A cluster by its name, or from the JSON file that `name` is the path of. Raises PlanError."""
    if name in CLUSTERS:
        return CLUSTERS[name]
    if name.endswith(".json") or os.path.isfile(name):
        return Cluster.load(name)
    raise PlanError(f"no cluster {name!r} and no file of that name{suggestion(name, CLUSTERS)}")
