"""Doctor: what this machine has, and what of zerograph will work on it. Each check looks for itself.

for finding in examine():  finding.name, finding.state, finding.found, finding.means
"""

import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from zerograph.nvme import measure
from zerograph.units import size

State = Literal["ok", "limited", "no"]
SEEN = ((2, 11), (2, 15))
"""The oldest and the newest torch that zerograph was tested on."""
OPEN_FILES = 4096
SHARED_MEMORY = 2**30

_PROGRAM = """
#include <omp.h>
extern "C" int threads() {
    int count = 0;
    #pragma omp parallel reduction(+ : count)
    count += 1;
    return count;
}
"""


@dataclass(frozen=True)
class Finding:
    """One check: what was found, and what it means for a run, each in one line."""

    name: str
    state: State
    found: str
    means: str


def examine(nvme: str | None = None) -> Iterator[Finding]:
    """Run all checks; that of a disk only for a path. None of them raises."""
    yield _torch()
    yield _transformers()
    yield _compiler()
    yield _triton()
    yield _processors()
    yield from _accelerators()
    yield from _backends()
    yield _open_files()
    yield _shared_memory()
    if nvme is not None:
        yield _nvme(nvme)


def _torch() -> Finding:
    version, build = torch.__version__, "CPU build"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda} build"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip} build"
    found = f"torch {version}, {build}, Python {platform.python_version()}"
    release = tuple(int(part) for part in version.split(".")[:2])
    if SEEN[0] <= release <= SEEN[1]:
        return Finding("torch", "ok", found, "capture, plans and training work")
    seen = " to ".join(".".join(map(str, each)) for each in SEEN)
    return Finding("torch", "limited", found, f"tested on {seen} only")


def _transformers() -> Finding:
    version = _version("transformers")
    if version is None:
        means = "models of your own work; configs of transformers do not (zerograph[transformers])"
        return Finding("transformers", "no", "not installed", means)
    means = "MODEL may be a config of transformers"
    return Finding("transformers", "ok", f"transformers {version}", means)


def _compiler() -> Finding:
    """Compile, load and run a few lines with OpenMP."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        means = "generated C++ kernels cannot be built; CPU training uses torch's operators"
        return Finding("C++ compiler", "no", "none of $CXX, c++, g++, clang++", means)
    try:
        threads = _compiled_threads(path)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        means = f"no C++ kernels with OpenMP: {said.strip().splitlines()[0]}"
        return Finding("C++ compiler", "no", path, means)
    found = f"{path}, OpenMP with {threads} threads"
    return Finding("C++ compiler", "ok", found, "C++ kernels can be built")


def _compiled_threads(compiler: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_PROGRAM)
        command = [compiler, "-O2", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return int(ctypes.CDLL(str(library)).threads())


def _triton() -> Finding:
    version = _version("triton")
    if version is None:
        return Finding("triton", "no", "not installed", "generated GPU kernels cannot be compiled")
    if torch.cuda.is_available():
        return Finding("triton", "ok", f"triton {version}", "generated GPU kernels compile and run")
    means = "GPU kernels can be compiled and interpreted here, and not run"
    return Finding("triton", "limited", f"triton {version}", means)


def _processors() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{cores} cores, {size(memory)}, {torch.get_num_threads()} threads for torch"
    return Finding("CPU", "ok", found, "plans, and training with gloo")


def _accelerators() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        means = "plans for --device cpu; training runs on the CPU"
        yield Finding("GPU", "no", "none that torch can use", means)
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found = f"{about.name}, {size(about.total_memory)}"
        means = "plans for --device cuda; training on it is written and not tested"
        yield Finding(f"GPU {index}", "limited", found, means)


def _backends() -> Iterator[Finding]:
    if not distributed.is_available():
        means = "one process only: this torch was built without torch.distributed"
        yield Finding("distributed", "no", "not built in", means)
        return
    gpu = torch.cuda.is_available()
    yield _backend("gloo", distributed.is_gloo_available(), "ranks on CPUs can train together")
    if distributed.is_nccl_available() and not gpu:
        yield Finding("nccl", "limited", "built in", "needs a GPU that torch can use")
    else:
        yield _backend(
            "nccl", distributed.is_nccl_available(), "ranks on GPUs, written and not tested"
        )
    yield _backend(
        "mpi", distributed.is_mpi_available(), "not used: gloo or nccl carry collectives"
    )


def _backend(name: str, there: bool, means: str) -> Finding:
    if there:
        return Finding(name, "ok", "built in", means)
    lost = {"gloo": "no training on several CPU ranks", "nccl": "no training on several GPUs"}
    return Finding(name, "no", "not built in", lost.get(name, "nothing is lost: it is not used"))


def _open_files() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return Finding("open files", "ok", _limit(limit), "enough for loaders and many ranks")
    means = f"many ranks or loader workers may run out; ulimit -n {OPEN_FILES}"
    return Finding("open files", "limited", _limit(limit), means)


def _limit(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"at most {limit}"


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        means = "loader workers and ranks share memory through files instead"
        return Finding("shared memory", "limited", "no /dev/shm", means)
    if free >= SHARED_MEMORY:
        means = "enough for loader workers and NCCL"
        return Finding("shared memory", "ok", f"{size(free)} free in /dev/shm", means)
    means = "loader workers and NCCL may fail; in a container, --shm-size=8g"
    return Finding("shared memory", "limited", f"{size(free)} free in /dev/shm", means)


def _nvme(path: str) -> Finding:
    try:
        speed = measure(path)
    except OSError as error:
        return Finding("NVMe", "no", f"{path}: {error.strerror}", "cannot hold what is offloaded")
    free = size(shutil.disk_usage(path).free)
    found = f"{free} free, writes {size(int(speed.write))}/s, reads {size(int(speed.read))}/s"
    if speed.direct:
        return Finding("NVMe", "ok", found, "can hold what is offloaded; direct I/O works")
    means = "no direct I/O here: the speeds are those of the page cache"
    return Finding("NVMe", "limited", found, means)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
