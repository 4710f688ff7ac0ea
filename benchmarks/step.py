"""One training step of zerograph at ZeRO stages 0 to 3, beside DDP and `fully_shard`, on CPU.

    python benchmarks/step.py [--json FILE] [--rounds 15] [--ranks 2]
    torchrun --nproc-per-node 2 benchmarks/step.py

All contestants live in the same processes, one thread a rank, start from the same weights and see
the same batches. They take turns, one step at a time, in an order that rotates, so that whatever
else the machine does falls on all of them alike. A step's time is that of the slowest rank; its CPU
time is the mean over ranks of all threads' work, gloo's included. Ratios are medians of the ratios
within a round, where contestants ran next to each other. Losses must agree to 5 digits.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import zerograph

BATCH, SEQUENCE, LAYERS = 4, 128, 7
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
WARM_UP = 2
DIGITS = 5
STAGES = (0, 1, 2, 3)
PEERS = ("ddp", "fully_shard")

Run = Callable[[argparse.Namespace], None]
Step = Callable[[Mapping[str, Tensor]], Tensor]
"""Trains on one batch and answers the loss."""


@dataclass
class Times:
    """One contestant: seconds of every measured step, and the loss of every step on this rank."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def llama() -> LlamaForCausalLM:
    """A Llama of 29.4 million fp32 parameters, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1440,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def config_of(stage: int) -> dict[str, Any]:
    """The DeepSpeed config of one stage; prefetch of about two layers, nothing persistent."""
    layer = sum(p.numel() for p in llama().model.layers[0].parameters())
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY},
        },
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 2 * layer + layer // 20,
        },
    }


# Contestants


def zerograph_step(stage: int) -> Step:
    """A step of zerograph's engine."""
    engine = zerograph.compile(llama(), config_of(stage))

    def step(batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def ddp_step() -> Step:
    """Replicated: DistributedDataParallel, its gradients views of its buckets."""
    return _torch_step(DistributedDataParallel(llama(), gradient_as_bucket_view=True))


def fully_shard_step() -> Step:
    """FSDP2: `fully_shard` on each layer and on the root, parameters freed after the forward."""
    model = llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _torch_step(model)


def alone_step() -> Step:
    """No communication at all: what computing costs while the other ranks compute as well."""
    return _torch_step(llama())


def _torch_step(model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )

    def step(batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def contestants(stages: Sequence[int]) -> dict[str, Step]:
    """All that are compared, ready to step."""
    steps = {"alone": alone_step(), "ddp": ddp_step(), "fully_shard": fully_shard_step()}
    return steps | {f"zerograph stage {stage}": zerograph_step(stage) for stage in stages}


# Measuring


def batch_of(step: int, rank: int) -> dict[str, Tensor]:
    """The batch of one rank at one step, the same for every contestant."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    ids = torch.randint(0, 8192, (BATCH, SEQUENCE), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def measure(steps: Mapping[str, Step], rounds: int) -> dict[str, Times]:
    """Take turns for `rounds` rounds behind `WARM_UP` rounds that are not timed."""
    times = {name: Times(name) for name in steps}
    names = list(steps)
    for index in range(WARM_UP + rounds):
        shift = index % len(names)
        batch = batch_of(index, dist.get_rank())
        for name in names[shift:] + names[:shift]:
            seconds, cpu_seconds, loss = _one(steps[name], batch)
            times[name].losses.append(loss)
            if index >= WARM_UP:
                times[name].seconds.append(seconds)
                times[name].cpu_seconds.append(cpu_seconds)
        if dist.get_rank() == 0:
            print(f"round {index + 1} of {WARM_UP + rounds}", end="\r", file=sys.stderr)
    return times


def _one(step: Step, batch: Mapping[str, Tensor]) -> tuple[float, float, float]:
    """One step, started together: seconds of the slowest rank, mean CPU seconds, this loss."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = step(batch)
    slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    worked = torch.tensor(time.process_time() - cpu_start, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(worked)
    return float(slowest), float(worked) / dist.get_world_size(), float(loss)


def require_agreement(times: Mapping[str, Times]) -> None:
    """Every contestant that communicates has the same losses, to `DIGITS` digits, at every step."""
    expected = times["ddp"].losses
    for name, own in times.items():
        for index, (loss, other) in enumerate(zip(own.losses, expected, strict=True)):
            if name != "alone" and abs(loss - other) > 0.5 * 10 ** (1 - DIGITS) * abs(other):
                raise SystemExit(f"{name} has loss {loss} at step {index}, ddp {other}")


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of the ratio of two contestants' steps of the same round."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


# Reporting


def table(times: Mapping[str, Times]) -> str:
    """Markdown: the median step, its range, and ratios to the peers, in elapsed and in CPU time."""
    heads = ["", "median", "min", "max", *(f"x {p}" for p in PEERS)]
    heads += ["CPU", *(f"CPU x {p}" for p in PEERS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in times.items():
        cells = [own.median, min(own.seconds), max(own.seconds)]
        row = [name, *(f"{1e3 * s:.0f} ms" for s in cells)]
        row += [f"{ratio(own.seconds, times[p].seconds):.2f}" for p in PEERS]
        row += [f"{1e3 * statistics.median(own.cpu_seconds):.0f} ms"]
        row += [f"{ratio(own.cpu_seconds, times[p].cpu_seconds):.2f}" for p in PEERS]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def report(times: Mapping[str, Times]) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    return {
        "benchmark": "step",
        "machine": machine.describe(),
        "ranks": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "backend": "gloo",
        "parameters": sum(p.numel() for p in llama().parameters()),
        "batch_per_rank": [BATCH, SEQUENCE],
        "config_stage_3": config_of(3),
        "results": [
            {
                "name": name,
                "median_s": own.median,
                "min_s": min(own.seconds),
                "max_s": max(own.seconds),
                "median_cpu_s": statistics.median(own.cpu_seconds),
                "ratio": {p: ratio(own.seconds, times[p].seconds) for p in PEERS},
                "cpu_ratio": {p: ratio(own.cpu_seconds, times[p].cpu_seconds) for p in PEERS},
                "seconds": own.seconds,
                "cpu_seconds": own.cpu_seconds,
                "losses_rank0": own.losses,
            }
            for name, own in times.items()
        ],
    }


def run(options: argparse.Namespace) -> None:
    """One rank, in a process group that exists."""
    torch.set_num_threads(1)
    times = measure(contestants(options.stages), options.rounds)
    require_agreement(times)
    if dist.get_rank() == 0:
        print(table(times))
        print(f"all losses agree to {DIGITS} digits over {WARM_UP + options.rounds} steps")
        if options.json:
            options.json.write_text(json.dumps(report(times), indent=2) + "\n")


def launch(run: Run, options: argparse.Namespace) -> None:
    """`run(options)` in the process group of torchrun, else on `options.ranks` spawned ranks."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        run(options)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_spawned, (f"{folder}/store", run, options), nprocs=options.ranks)


def _spawned(rank: int, store: str, run: Run, options: argparse.Namespace) -> None:
    init = f"file://{store}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=options.ranks)
    run(options)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each contestant")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to spawn (not with torchrun)")
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    launch(run, parser.parse_args())


if __name__ == "__main__":
    main()
