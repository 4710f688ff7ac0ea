"""Generated kernels beside torch's: one AdamW step on 16 M elements, and the bandwidth of every kernel.

    python benchmarks/kernels.py [--json FILE] [--rounds 15] [--threads 2]

On the CPU, four contestants take turns, in an order that rotates; ratios are of medians:

    kernel      the generated update: bf16 gradients in, fp32 states, a bf16 copy out
    fused       torch.optim.AdamW(fused=True) on fp32 gradients and parameters
    sequence    what the kernel does, in steps: upcast of gradients, fused AdamW, cast of parameters
    plain       the generated update as plain torch operations, where there is no compiler

Then every kernel's bytes a second beside those of a copy of as many bytes (`Tensor.copy_`). Where there is a
CUDA GPU the same is measured on it, with 256 M elements; the copy is then the device's own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
from torch import Tensor

from zerograph.codegen import dispatch
from zerograph.codegen.rules import ADAMW, RULES, Described, Run
from zerograph.codegen.spec import Update

LIMIT, FASTER = 1.1, 3.0
"""At most this much slower than the fused optimizer; at least this much faster than the sequence."""
BF16, F32 = torch.bfloat16, torch.float32


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def medians(
    device: torch.device, work: dict[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Median seconds of each, taken in turn in a rotating order, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in range(rounds + 2):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            took = timed(device, work[name])
            if turn >= 2:
                seconds[name].append(took)
    return {name: statistics.median(found) for name, found in seconds.items()}


class Shard:
    """A slice of bf16 parameters with fp32 masters, and one optimizer's states."""

    def __init__(self, rule: Described, size: int, device: torch.device, **options: Any) -> None:
        self.rule, self.size, self.step = rule, size, 0
        self.options = {**rule.defaults, **options}
        self.master = torch.randn(size, device=device)
        self.grad = torch.randn(size, device=device).to(BF16)
        self.low = self.master.to(BF16)
        names = rule.states(self.options)
        self.states = {name: torch.zeros(size, device=device) for name in names}
        self.control = torch.ones(2, device=device)

    def update(self, target: dispatch.Target | None = None) -> None:
        self.step += 1
        runs = [Run(0, self.size, 0, self.step)]
        own = self.master, self.grad, self.states, self.low, self.control
        dispatch.update(self.rule, [self.options], runs, *own, target)

    @property
    def nbytes(self) -> int:
        flags = self.rule.flags(self.options)
        return self.size * Update(self.rule.name, flags, BF16, F32, BF16).nbytes


def fused(size: int, device: torch.device) -> tuple[Tensor, torch.optim.AdamW]:
    param = torch.nn.Parameter(torch.randn(size, device=device))
    param.grad = torch.randn(size, device=device)
    return param, torch.optim.AdamW([param], fused=True)


def contest(size: int, device: torch.device, rounds: int) -> dict[str, float]:
    shard = Shard(ADAMW, size, device)
    param, optimizer = fused(size, device)
    low, grad = param.detach().to(BF16), shard.grad

    def sequence() -> None:
        param.grad = grad.to(F32)
        optimizer.step()
        low.copy_(param.detach())

    def alone(kept: Tensor = param.grad) -> None:  # type: ignore[assignment]
        param.grad = kept
        optimizer.step()

    work: dict[str, Callable[[], object]] = {
        "kernel": shard.update,
        "fused": alone,
        "sequence": sequence,
    }
    if device.type == "cpu":
        work["plain"] = lambda: shard.update("torch")
    return medians(device, work, rounds)


def bandwidths(size: int, device: torch.device, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each kernel: seconds, and bytes a second."""
    shards = {name: Shard(rule, size, device) for name, rule in RULES.items() if rule.apply is None}
    work: dict[str, Callable[[], object]] = {n: shard.update for n, shard in shards.items()}
    nbytes = {name: shard.nbytes for name, shard in shards.items()}
    first = next(iter(shards.values()))
    wide, half = first.master, first.low
    other = torch.empty_like(wide)
    work["copy"], nbytes["copy"] = lambda: other.copy_(wide), 8 * size
    work["norm bf16"] = lambda: dispatch.norm_partials([first.grad], 1)
    work["pack f32 -> bf16"] = lambda: dispatch.pack(wide, half, 0, 0.5)
    work["unpack bf16 -> f32"] = lambda: dispatch.unpack(half, 0, other, 0.5)
    nbytes |= {"norm bf16": 2 * size, "pack f32 -> bf16": 6 * size, "unpack bf16 -> f32": 6 * size}
    found = medians(device, work, rounds)
    return {name: (took, nbytes[name] / took) for name, took in found.items()}


def measure(device: torch.device, rounds: int, scale: int = 1) -> dict[str, Any]:
    size = (1 << 28 if device.type == "cuda" else 1 << 24) // scale
    torch.manual_seed(0)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "elements": size,
        "seconds": contest(size, device, rounds),
        "kernels": bandwidths(size, device, rounds),
    }


def show(result: dict[str, Any]) -> None:
    seconds, kernels = result["seconds"], result["kernels"]
    print(f"## AdamW on {result['elements']:,} elements, {result['device']}")
    print("\n| | ms | kernel / it |\n|---|---:|---:|")
    for name, took in seconds.items():
        print(f"| {name} | {1e3 * took:.2f} | {seconds['kernel'] / took:.2f} |")
    copy = kernels["copy"][1]
    print("\n| kernel | ms | GB/s | of a copy |\n|---|---:|---:|---:|")
    for name, (took, rate) in kernels.items():
        print(f"| {name} | {1e3 * took:.2f} | {rate / 1e9:.1f} | {rate / copy:.0%} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smaller", type=int, default=1, help="divide the elements by this")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    results = [measure(device, given.rounds, given.smaller) for device in devices]
    for result in results:
        show(result)
    seconds = results[0]["seconds"]
    slower, faster = (
        seconds["kernel"] / seconds["fused"],
        seconds["sequence"] / seconds["kernel"],
    )
    print(f"kernel / fused {slower:.2f} (at most {LIMIT}); sequence / kernel {faster:.2f}")
    print(f"(at least {FASTER})")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine.describe(), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
