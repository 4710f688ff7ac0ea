"""What it saves that operators write gradients into their bucket: backwards of a Llama, with and without.

    python benchmarks/in_place.py [--rounds 15] [--dtype bf16] [--stage 2]

One rank and one thread, so that no communication hides or slows the copies. The two take turns, and the
ratio is the median of those within a round, of CPU time. Peaks are those of the plans.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contest import batch_of, llama, ratio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zerograph
from zerograph.codegen.in_place import can_write
from zerograph.passes import in_place

WARM_UP = 2


def engine_of(writes: bool, options: argparse.Namespace) -> zerograph.Engine:
    """An engine whose first call has been made, so that its programs are fixed."""
    config: dict[str, Any] = {
        "zero_optimization": {"stage": options.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": options.dtype == "bf16"},
    }
    in_place.can_write = can_write if writes else lambda put: False
    engine = zerograph.compile(llama(), config)
    seconds_of(engine, 0)
    return engine


def seconds_of(engine: zerograph.Engine, index: int) -> float:
    """CPU seconds of the backward of one step."""
    loss = engine(**batch_of(index, 0)).loss
    start = time.process_time()
    engine.backward(loss)
    seconds = time.process_time() - start
    engine.step()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--stage", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engines = {name: engine_of(name == "in place", options) for name in ("in place", "copied")}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(WARM_UP + options.rounds):
        names = list(engines)[:: 1 if index % 2 else -1]
        for name in names:
            took = seconds_of(engines[name], index)
            seconds[name] += [took] if index >= WARM_UP else []
    for name, engine in engines.items():
        median, peak = statistics.median(seconds[name]), engine.plan.memory.peak
        did = next(r.did for r in engine.plan.history.records if r.name == "in_place")
        print(f"{name:8}  backward {median * 1e3:6.1f} ms  peak {peak / 1e6:6.1f} MB  {did}")
    print(f"ratio {ratio(seconds['in place'], seconds['copied']):.3f}")


if __name__ == "__main__":
    main()
