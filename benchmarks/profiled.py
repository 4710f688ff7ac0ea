"""What `engine.profile` costs: profiled steps beside plain ones of the same engine, in turns.

    python benchmarks/profiled.py [--stage 3] [--rounds 8] [--ranks 2]
    benchmarks/link.sh 1gbit python benchmarks/profiled.py

The model and the config are those of `step.py`. Prints the last profile, and the median of paired ratios.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from contest import batch_of, launch, llama
from step import config_of

import zerograph

STEPS = 2
"""Of each turn."""


def run(options: argparse.Namespace) -> None:
    """One rank, in a process group that exists."""
    torch.set_num_threads(1)
    engine = zerograph.compile(llama(), config_of(options.stage))
    batch = batch_of(0, dist.get_rank())

    def turn() -> float:
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(STEPS):
            engine.backward(engine(**batch).loss)
            engine.step()
        dist.barrier()
        return time.perf_counter() - begin

    turn()
    ratios = []
    for index in range(options.rounds):
        plain = turn() if index % 2 else 0.0
        profile = engine.profile(STEPS)
        profiled = turn()
        ratios.append(profiled / (plain or turn()))
        dist.barrier()
    if dist.get_rank() == 0:
        print(profile)
        print(
            f"a profiled step takes {statistics.median(ratios):.3f} times a plain one "
            f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs of {STEPS} steps)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    launch(run, parser.parse_args())
