"""Where a training step's time goes on one rank, for one of the contestants of `step.py`.

    python benchmarks/profile_step.py ["zerograph stage 3"] [--steps 5] [--json FILE]

Every operator that the lowered programs call is counted in one of a few classes by torch's
profiler: waiting for collectives and starting them, copies into gradient buffers, the optimizer,
matrix products, other aten ops; the rest of the step is Python and autograd between the ops. Times
are this rank's own, so waits include the other rank's lateness.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contest
import machine
import peers
import step
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile, record_function

from zerograph.codegen import kernels
from zerograph.runtime.optimizer import ShardedOptimizer

KERNELS = ("grad_buffer", "put", "accumulate", "norm_partials", "grad_norm", "clip")
BETWEEN = "between the ops"
CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("collectives: waiting", ("wait_tensor", "gloo:", "FSDP::")),
    ("collectives: starting", ("_c10d_functional::", "c10d::")),
    ("optimizer", ("fused_adam",)),
    ("matrix products", ("::mm", "::bmm", "::addmm", "matmul")),
    ("attention", ("scaled_dot_product", "flash_attention")),
    ("copies", ("::copy_", "::_to_copy", "::clone", "::cat", "::split_with_sizes_copy")),
    ("allocation", ("::empty", "::new_empty", "::zero_", "::fill_", "::resize_")),
)


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a range of its own in the profile."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"kernel: {function.__name__}"):
            return function(*args, **kwargs)

    return run


def class_of(name: str) -> str:
    """The class of an event: an operator, or what runs between them (Python and autograd nodes)."""
    rest = "other aten" if name.startswith("aten::") else BETWEEN
    return next((label for label, parts in CLASSES if any(p in name for p in parts)), rest)


def breakdown(profiled: Any, wall: float, steps: int) -> dict[str, float]:
    """Milliseconds a step by class; kernels of the package whole, aten ops outside them by self."""
    inside: set[int] = set()
    by_class: dict[str, float] = defaultdict(float)
    main = next(e.thread for e in profiled.events() if e.name == "step")

    def skip(event: Any) -> None:
        for child in event.cpu_children:
            inside.add(child.id)
            skip(child)

    for event in profiled.events():
        if event.name.startswith("kernel: ") and event.thread == main:
            by_class[event.name] += event.cpu_time_total
            skip(event)
    threads = {e.thread for e in profiled.events() if e.name.startswith("aten::mm")} | {main}
    for event in profiled.events():
        counted = event.thread in threads and not event.name.startswith(("kernel: ", "step"))
        if counted and event.id not in inside:
            by_class[class_of(event.name)] += event.self_cpu_time_total
    found = {name: micros / 1e3 / steps for name, micros in by_class.items()}
    found[BETWEEN] = found.get(BETWEEN, 0.0) + 1e3 * wall / steps - sum(found.values())
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def run(rank: int, store: str, options: argparse.Namespace) -> None:
    """Profile `options.steps` steps behind a warm-up."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in KERNELS:
        setattr(kernels, name, traced(getattr(kernels, name)))
    ShardedOptimizer.update = traced(ShardedOptimizer.update)  # type: ignore[method-assign]
    train = contestant(options.contestant)
    for index in range(contest.WARM_UP):
        train(contest.batch_of(index, rank))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        for index in range(options.steps):
            with record_function("step"):
                train(contest.batch_of(index, rank))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if rank == 0:
        show(profiled, wall, cpu, options)
    dist.destroy_process_group()


def contestant(name: str) -> contest.Step:
    """One contestant alone, by the name that `step.py` prints."""
    if name.startswith("zerograph stage "):
        return step.zerograph_step(int(name[-1]))
    makers = {
        "ddp": peers.ddp_step,
        "fully_shard": peers.fully_shard_step,
        "alone": peers.alone_step,
    }
    return makers[name]()


def show(profiled: Any, wall: float, cpu: float, options: argparse.Namespace) -> None:
    """Print the classes and the heaviest operators; write JSON if asked."""
    found = breakdown(profiled, wall, options.steps)
    total = 1e3 * wall / options.steps
    print(f"{options.contestant}: {total:.0f} ms a step, CPU {1e3 * cpu / options.steps:.0f} ms")
    for name, milliseconds in found.items():
        print(f"  {name:<28}{milliseconds:>9.1f} ms {milliseconds / total:>6.1%}")
    if options.ops:
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=options.ops))
    if options.json:
        content = {
            "benchmark": "profile_step",
            "machine": machine.describe(),
            "contestant": options.contestant,
            "milliseconds": found,
            "step_ms": total,
            "cpu_ms": 1e3 * cpu / options.steps,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("contestant", nargs="?", default="zerograph stage 3")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ops", type=int, default=0, metavar="N", help="also the N heaviest ops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (f"{folder}/store", options), nprocs=2)


if __name__ == "__main__":
    main()
