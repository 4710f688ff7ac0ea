"""Is communication hidden? Steps of zerograph beside DDP, `fully_shard` and DeepSpeed, and their bounds.

    python benchmarks/overlap.py [--rounds 9] [--ranks 2] [--dtype bf16] [--json FILE]
    python benchmarks/overlap.py --deepspeed DIR/bin/python      (deepspeed_env.sh makes DIR)
    benchmarks/link.sh 1gbit python benchmarks/overlap.py
    python benchmarks/overlap.py --only "stage 2" "stage 2, updating in backward"
    python benchmarks/overlap.py --memory

`contest.py` says how contestants take turns and what is compared, `peers.py` who the peers are,
`bounds.py` what is held. Stages 1, 2 and 3 have the default config; "freed" is with
`stage3_max_reuse_distance` 0: released after the forward and gathered again for the backward; "updating in
backward" is with `compile.update_in_backward`. "alone" is
all ranks computing at once without communication. Exits 1 if a bound is not held, once it has printed all
of them.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bounds
import live
import machine
import torch
import torch.distributed as dist
import wire
from away import Away
from bounds import FREED
from contest import (
    BATCH,
    DIGITS,
    DTYPES,
    SEQUENCE,
    Times,
    launch,
    llama,
    measure,
    require_agreement,
)
from contestants import Zerograph, configs, contestants, sent_by
from peers import ddp_step, fully_shard_step


def run(options: argparse.Namespace) -> None:
    """One rank, in a process group that exists."""
    torch.set_num_threads(1)
    failed = memory(options) if options.memory else time(options)
    if failed and dist.get_rank() == 0:
        sys.exit(1)


def time(options: argparse.Namespace) -> bool:
    """Measure and judge steps; whether a bound is not held."""
    loopback = wire.address().startswith("127.")
    rate = options.line_rate or wire.line_rate()
    steps = contestants(options)
    times = measure(steps, options.rounds)
    sent = sent_by(steps)
    for step in steps.values():
        if isinstance(step, Away):
            step.close()
    require_agreement(times, options.dtype)
    least = {name: bounds.least_seconds(times["alone"], sent[name], rate) for name in sent}
    verdicts = bounds.judged(bounds.LOOPBACK if loopback else bounds.LINK, times, least)
    if dist.get_rank() == 0:
        print(bounds.table(times, sent, least))
        print(f"\nline rate {rate / 1e6:.1f} MB/s each way\n")
        print(bounds.table_of_verdicts(verdicts))
        print(
            f"all losses agree to {DIGITS[options.dtype]} digits over {len(times['ddp'].losses)} steps"
        )
        facts = {"link": "loopback" if loopback else "network", "line_rate": rate}
        write(options, facts | {"results": results(times, sent, least), "bounds": said(verdicts)})
    return any(verdict.held is False for verdict in verdicts)


def memory(options: argparse.Namespace) -> bool:
    """The peak of each contestant, one after another; whether "freed" needs more than `fully_shard`."""
    rows = {}
    for name, make in {"ddp": ddp_step, "fully_shard": fully_shard_step}.items():
        peer = make(options.dtype)
        rows[name] = live.of_peer(name, peer)
    for name, config in configs(options).items():
        ours = Zerograph(config)
        rows[name] = live.of_engine(name, ours, ours.engine)
        ours.engine.destroy()
    ratio = rows[FREED].peak / rows[bounds.MEMORY.against].peak
    verdict = bounds.Verdict(bounds.MEMORY, ratio)
    if dist.get_rank() == 0:
        print(live.table(rows, bounds.MEMORY.against))
        print(f"\npeak of a step\n\n{bounds.table_of_verdicts([verdict])}")
        found = [dataclasses.asdict(row) for row in rows.values()]
        write(options, {"live": found, "bounds": said([verdict])})
    return verdict.held is False


# Reporting


def results(
    times: Mapping[str, Times], sent: Mapping[str, float], least: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """Everything that was measured."""
    return [
        {
            "name": name,
            "median_s": own.median,
            "seconds": own.seconds,
            "cpu_seconds": own.cpu_seconds,
            "ratio": {o: bounds.ratio_to(name, o, times, least) for o in (*times, "bound")},
            "least_bytes": sent.get(name),
            "least_s": least.get(name),
            "losses_rank0": own.losses,
        }
        for name, own in times.items()
    ]


def said(verdicts: list[bounds.Verdict]) -> list[dict[str, Any]]:
    return [{"ratio": v.ratio, "held": v.held, **dataclasses.asdict(v.bound)} for v in verdicts]


def write(options: argparse.Namespace, content: Mapping[str, Any]) -> None:
    if not options.json:
        return
    head = {
        "benchmark": "overlap",
        "machine": machine.describe(),
        "ranks": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "dtype": options.dtype,
        "parameters": sum(p.numel() for p in llama().parameters()),
        "batch_per_rank": [BATCH, SEQUENCE],
        "configs": configs(options),
    }
    options.json.write_text(json.dumps({**head, **content}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=9, help="measured steps of each contestant")
    add("--ranks", type=int, default=2, help="ranks to spawn (not with torchrun or link.sh)")
    add("--dtype", choices=list(DTYPES), default="fp32")
    add("--deepspeed", metavar="PYTHON", help="the Python that has DeepSpeed")
    add("--line-rate", type=float, metavar="BYTES", help="a second, each way; else it is measured")
    add(
        "--zero",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more keys for zerograph's stage 3",
    )
    add("--only", nargs="+", metavar="NAME", help="these, with ddp and alone, instead of all")
    add("--memory", action="store_true", help="peak memory of a step instead of its time")
    add("--json", type=Path, metavar="FILE", help="write the results here")
    launch(run, parser.parse_args())


if __name__ == "__main__":
    main()
