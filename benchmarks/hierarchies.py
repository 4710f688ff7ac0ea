"""What groups of ranks save at large worlds: plain stage 3, hpZ and MiCS, as the planner predicts them.

    python benchmarks/hierarchies.py [--layers 32] [--tokens 2048] [--json FILE]

A Llama of 7 B parameters in bf16 with AdamW, on the meta device: no rank exists, no weight is allocated. Each
rank has one row of `--tokens`; buckets are released after the forward (max_reuse_distance 0). The clusters
have nodes of eight A100; what differs is the network of a node: one adapter of 100 Gbit/s, four of 100 (the
cloud's nodes on which MiCS was measured, arXiv:2205.00119 section 5.1), eight of 200 (the profile `a100`).
One trace a world serves all rows.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zerograph.config import load_config
from zerograph.cost import Cluster, Timeline, cluster_of
from zerograph.planning import plan_of, trace_of
from zerograph.units import duration, size

WORLDS = (64, 1024)
MICRO_BATCHES = (1, 4)
NETWORKS = {"100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9, "1600 Gbit/s": 200e9}
"""Bytes per second of a node of eight, in each direction."""
GROUPS: dict[str, dict[str, int]] = {
    "stage 3": {},
    "hpZ 8": {"zero_hpz_partition_size": 8},
    "MiCS 8": {"mics_shard_size": 8},
}


@dataclass(frozen=True)
class Row:
    """One predicted step of a rank."""

    world: int
    network: str
    groups: str
    micro_batches: int
    seconds: float
    peak: int
    """Bytes."""


def config_for(groups: dict[str, int], micro_batches: int = 1) -> dict[str, Any]:
    zero = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 500_000_000}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": True},
        "zero_optimization": {**zero, **groups},
    }


def network(rate: float) -> Cluster:
    """Nodes of eight A100 that share a network of `rate`."""
    cluster = cluster_of("a100")
    inter = cluster.inter.model_copy(update={"bandwidth": rate / cluster.per_node})
    return cluster.model_copy(update={"inter": inter})


def rows(layers: int, tokens: int) -> Iterator[Row]:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False)).train()
        ids = torch.empty(1, tokens, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids}
    for world in WORLDS:
        traced = trace_of(model, load_config(config_for({})), inputs, world)
        for (name, groups), micros in product(GROUPS.items(), MICRO_BATCHES):
            plan = plan_of(traced, load_config(config_for(groups, micros)))
            for words, rate in NETWORKS.items():
                seconds = step(plan.timeline(network(rate)), micros)
                yield Row(world, words, name, micros, seconds, plan.memory.peak)


def step(timeline: Timeline, micro_batches: int) -> float:
    """Seconds of a step: all but the last of its micro-batches have no update."""
    ends = (span.end for span in timeline.spans if span.region != "step")
    return timeline.seconds + (micro_batches - 1) * max(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json")
    given = parser.parse_args()
    found = list(rows(given.layers, given.tokens))
    print(f"| ranks | network of a node | micro-batches | {' | '.join(GROUPS)} |")
    print("|" + "---|" * (3 + len(GROUPS)))
    for about in product(WORLDS, NETWORKS, MICRO_BATCHES):
        same = [r for r in found if (r.world, r.network, r.micro_batches) == about]
        print(f"| {' | '.join([*map(str, about), *(duration(r.seconds) for r in same)])} |")
    for world, micros in product(WORLDS, MICRO_BATCHES):
        peaks = {r.groups: r.peak for r in found if (r.world, r.micro_batches) == (world, micros)}
        shown = ", ".join(f"{name} {size(peak)}" for name, peak in peaks.items())
        print(f"peak at {world} ranks, {micros} micro-batches: {shown}")
    if given.json:
        Path(given.json).write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
