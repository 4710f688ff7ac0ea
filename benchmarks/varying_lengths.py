"""Batches of varying length beside batches of one length: time a token, one process of one thread.

    python benchmarks/varying_lengths.py [--json FILE] [--rounds 24]

Three contestants train the Llama of `step.py` at ZeRO stage 3, in turn, in an order that rotates:

    fixed      a static program, every batch of LENGTH tokens
    same       a dynamic program, every batch of LENGTH tokens as well: what symbols cost
    varying    a dynamic program, another length in every batch, with LENGTH as their mean

The ratios are those of the medians of seconds a token. Each varying engine must have traced twice: once for
its first length, once with a symbol.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import torch
from step import BATCH, config_of, llama

import zerograph

LENGTH, SPREAD = 96, 32
WARM_UP = 3
LIMIT = 1.1


class Contestant:
    """One engine, and its seconds a token in every measured step."""

    def __init__(self, name: str, first: tuple[int, ...]) -> None:
        self.name = name
        self.engine = zerograph.compile(llama(), config_of(3))
        self.seconds: list[float] = []
        for length in first:
            self.step(length)
        self.seconds.clear()

    def step(self, length: int) -> None:
        ids = torch.randint(0, 8192, (BATCH, length))
        start = time.perf_counter()
        self.engine.backward(self.engine(input_ids=ids, labels=ids.clone()).loss)
        self.engine.step()
        self.seconds.append((time.perf_counter() - start) / ids.numel())

    @property
    def dynamic(self) -> bool:
        """Whether the last step ran a program with symbols."""
        return bool(self.engine.plan.graph.sizes.symbols)


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shortest, longest = LENGTH - SPREAD, LENGTH + SPREAD
    contestants = [
        Contestant("fixed", (LENGTH,) * WARM_UP),
        Contestant("same", (shortest, longest) + (LENGTH,) * WARM_UP),
        Contestant("varying", (shortest, longest) + (LENGTH,) * WARM_UP),
    ]
    half = [LENGTH - d for d in range(1, SPREAD)]
    random.Random(0).shuffle(half)
    lengths = [n for low in half for n in (low, 2 * LENGTH - low)]
    for index in range(rounds):
        turn = index % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            varying = contestant.name == "varying"
            contestant.step(lengths[index % len(lengths)] if varying else LENGTH)
    assert [c.dynamic for c in contestants] == [False, True, True]
    assert [len(c.engine._programs) for c in contestants] == [1, 2, 2]
    medians = {c.name: statistics.median(c.seconds) for c in contestants}
    return {
        "machine": machine.describe(),
        "batch": BATCH,
        "length": LENGTH,
        "lengths": [shortest + 1, longest - 1],
        "rounds": rounds,
        "microseconds_a_token": {name: round(1e6 * value, 1) for name, value in medians.items()},
        "ratio_to_fixed": {n: round(v / medians["fixed"], 3) for n, v in medians.items()},
        "limit": LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rounds", type=int, default=24)
    options = parser.parse_args()
    result = measure(options.rounds)
    print("| | us a token | x fixed |\n|---|---|---|")
    for name, microseconds in result["microseconds_a_token"].items():
        print(f"| {name} | {microseconds} | {result['ratio_to_fixed'][name]:.3f} |")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
