"""What `engine.profile` costs: profiled steps beside plain ones of the same engine, in turns.

    python benchmarks/profiled.py [--stage 3] [--rounds 15] [--ranks 2]
    benchmarks/link.sh 1gbit python benchmarks/profiled.py

The model and the config are those of `step.py`. Prints the last profile, and medians of paired ratios.
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

    def turn() -> tuple[float, float]:
        """Seconds of some steps, and CPU seconds of all threads of this rank."""
        dist.barrier()
        begin, worked = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            engine.backward(engine(**batch).loss)
            engine.step()
        worked = time.process_time() - worked
        dist.barrier()
        return time.perf_counter() - begin, worked

    turn()
    pairs = []
    for index in range(options.rounds):
        first = turn() if index % 2 else None
        profile = engine.profile(STEPS)
        pairs.append((turn(), first or turn()))
    if dist.get_rank() == 0:
        print(profile)
        for what, at in (("step", 0), ("step in CPU time", 1)):
            found = [profiled[at] / plain[at] for profiled, plain in pairs]
            middle = f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"
            print(f"a profiled {what} takes {middle} times a plain one, {len(found)} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", type=int, default=3, help="of ZeRO")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of turns")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to spawn (not with torchrun)")
    launch(run, parser.parse_args())


if __name__ == "__main__":
    main()
