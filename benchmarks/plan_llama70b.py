"""How long it takes to plan a Llama-70B for 1024 ranks on a laptop, and how that grows with depth.

    python benchmarks/plan_llama70b.py [--json FILE] [--depths 8 80] [--profile FILE]

The model is on the meta device: nothing is allocated and no rank exists. Each depth is planned in a
process of its own, so that none profits from what another has compiled or cached, and so that peak
memory is its own. The columns are seconds; growth is the last depth over the first, and is linear
when it is about the ratio of the depths.
"""

import argparse
import cProfile
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zerograph
from zerograph import compat

WORLD = 1024
SEQUENCE = 4096
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 4_000_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 900_000_000,
        "stage3_param_persistence_threshold": 0,
    },
}
CAPTURE = ("dynamo capture", "joint export")
"""Stages that are torch's own work; all others are zerograph's."""


@dataclass
class Measured:
    """One planning: seconds by stage in order of running, and what came out."""

    layers: int
    seconds: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    peak_rss_bytes: int = 0
    nodes: int = 0
    text_lines: int = 0
    summary: str = ""

    @property
    def own(self) -> float:
        """Seconds in zerograph's own code: passes, checks and what lies between."""
        return self.total - sum(self.seconds[stage] for stage in CAPTURE)


def llama70b(layers: int) -> LlamaForCausalLM:
    """Llama-70B's widths with `layers` layers, on the meta device, in training."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).train()


def measure(layers: int, profile: str | None = None) -> Measured:
    """Plan once in this process, with a stopwatch on every stage."""
    model = llama70b(layers)
    batch = {
        name: torch.empty(1, SEQUENCE, dtype=torch.int64, device="meta")
        for name in ("input_ids", "labels")
    }
    result = Measured(layers)
    profiler = cProfile.Profile()
    with stopwatches(result.seconds):
        start = time.perf_counter()
        if profile:
            profiler.enable()
        plan = zerograph.plan(model, CONFIG, example_inputs=batch, world_size=WORLD)
        profiler.disable()
        result.total = time.perf_counter() - start
    if profile:
        profiler.dump_stats(profile)
    for record in plan.history.records:
        if record.name != "trace":
            result.seconds[f"pass {record.name}"] = record.seconds
            result.seconds[f"check {record.name}"] = record.check_seconds
    rest = result.total - sum(result.seconds.values())
    result.seconds["layout, naming and the rest"] = rest
    result.peak_rss_bytes = machine.peak_rss_bytes()
    result.nodes = len(plan.graph.nodes())
    lines = str(plan).splitlines()
    result.text_lines, result.summary = len(lines), lines[-1]
    return result


@contextmanager
def stopwatches(seconds: dict[str, float]) -> Iterator[None]:
    """Time the stages that leave no record: torch's two."""
    watched = [
        (compat, "capture", CAPTURE[0]),
        (compat, "export_joint", CAPTURE[1]),
    ]
    with ExitStack() as stack:
        for owner, name, stage in watched:
            seconds[stage] = 0.0
            timed = _timed(getattr(owner, name), stage, seconds)
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield


def _timed(
    function: Callable[..., Any], stage: str, seconds: dict[str, float]
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] += time.perf_counter() - start

    return timed


def in_own_process(layers: int, profile: str | None) -> Measured:
    """`measure` in a fresh interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, layers, profile).result()


def table(results: Sequence[Measured]) -> str:
    """A markdown table: one row a stage, one column a depth, and the growth."""
    depths = [f"{r.layers} layers" for r in results]
    lines = [f"| stage | {' | '.join(depths)} | growth |", "|---" * (len(results) + 2) + "|"]
    rows = {name: [r.seconds.get(name, 0.0) for r in results] for name in results[-1].seconds}
    rows["**total**"] = [r.total for r in results]
    rows["of it zerograph's own"] = [r.own for r in results]
    for name, row in rows.items():
        growth = f"{row[-1] / row[0]:.1f}x" if row[0] > 0.005 else "-"
        lines.append(f"| {name} | {' | '.join(f'{s:.2f} s' for s in row)} | {growth} |")
    peaks = [f"{r.peak_rss_bytes / 2**30:.2f} GiB" for r in results]
    lines.append(f"| peak RSS | {' | '.join(peaks)} | |")
    lines.append(f"| nodes | {' | '.join(f'{r.nodes:,}' for r in results)} | |")
    return "\n".join(lines)


def report(results: Sequence[Measured]) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    return {
        "benchmark": "plan_llama70b",
        "machine": machine.describe(),
        "world_size": WORLD,
        "batch": [1, SEQUENCE],
        "config": CONFIG,
        "results": [{**asdict(r), "own": r.own} for r in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 80], metavar="LAYERS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--profile", metavar="FILE", help="cProfile statistics of the last depth")
    options = parser.parse_args()
    last = options.depths[-1]
    results = [in_own_process(d, options.profile if d == last else None) for d in options.depths]
    print(table(results))
    print(f"\n{results[-1].summary}")
    share = results[-1].own / results[-1].total
    print(f"total {results[-1].total:.1f} s, zerograph's own share {share:.0%}")
    if options.json:
        options.json.write_text(json.dumps(report(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
