"""One training step of zerograph at ZeRO stages 0 to 3, beside DDP and `fully_shard`, on CPU.

    python benchmarks/step.py [--json FILE] [--rounds 15] [--ranks 2]
    torchrun --nproc-per-node 2 benchmarks/step.py

`contest.py` says how contestants take turns and what is compared. Losses must agree to 5 digits.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
from contest import (
    BATCH,
    BETAS,
    DIGITS,
    EPS,
    LR,
    SEQUENCE,
    WEIGHT_DECAY,
    Step,
    Times,
    launch,
    llama,
    measure,
    ratio,
    require_agreement,
)
from peers import alone_step, ddp_step, fully_shard_step
from torch import Tensor

import zerograph

STAGES = (0, 1, 2, 3)
PEERS = ("ddp", "fully_shard")


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


def contestants(stages: Sequence[int]) -> dict[str, Step]:
    """All that are compared, ready to step."""
    steps = {"alone": alone_step(), "ddp": ddp_step(), "fully_shard": fully_shard_step()}
    return steps | {f"zerograph stage {stage}": zerograph_step(stage) for stage in stages}


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
        print(f"all losses agree to {DIGITS['fp32']} digits over {len(times['ddp'].losses)} steps")
        if options.json:
            options.json.write_text(json.dumps(report(times), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each contestant")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to spawn (not with torchrun)")
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    launch(run, parser.parse_args())


if __name__ == "__main__":
    main()
