"""A gather and a reduce-scatter by themselves, beside the line: 64 MB over the ranks, fp32.

    python benchmarks/collectives.py [--ranks 2] [--rounds 9] [--megabytes 64] [--json FILE]
    RANKS=4 benchmarks/link.sh 1gbit python benchmarks/collectives.py

Each through gloo's own collective, and over zerograph's channels; and the line, which is the bytes that each
rank must send, (ranks - 1) / ranks of the buffer, sent round the ranks over plain sockets (`wire.py`). They
take turns; a time is that of the slowest rank; ratios are medians of those within a round. Every result is
checked. Behind a link it exits 1 if zerograph's takes more than 1.1 times the line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contest
import machine
import torch
import torch.distributed as dist
import wire
from torch import Tensor

from zerograph.runtime.world import current_world

LINE, GATHER, REDUCE = "line", "gather", "reduce-scatter"
MOST = 1.1
WARM_UP = 1

Start = Callable[[Tensor, Tensor], Any]
"""Starts a collective from its input to its output, on every rank; what it answers has a `wait`."""


@dataclass
class Contestant:
    """`run` answers its seconds; `check` raises unless the result is right."""

    name: str
    run: Callable[[], float]
    check: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Buffers:
    """What the collectives read and write; whole numbers below 2^24, so that any order of a sum is exact."""

    shard: Tensor
    full: Tensor
    expected_full: Tensor
    buffer: Tensor
    out: Tensor
    expected_out: Tensor

    @classmethod
    def of(cls, nbytes: int) -> "Buffers":
        rank, world = dist.get_rank(), dist.get_world_size()
        values = (torch.arange(nbytes // 4 // world * world) % 1024).float()
        own = values.chunk(world)[rank]
        total = world * (world + 1) // 2
        empty = torch.empty_like
        buffer = values * (rank + 1)
        return cls(own.clone(), empty(values), values, buffer, empty(own), own * total)

    def require_full(self) -> None:
        require(GATHER, self.full, self.expected_full)

    def require_out(self) -> None:
        require(REDUCE, self.out, self.expected_out)


def require(name: str, found: Tensor, expected: Tensor) -> None:
    """Raise unless they are equal, and forget what was found."""
    if not torch.equal(found, expected):
        raise SystemExit(f"rank {dist.get_rank()}: the {name} has a wrong result")
    found.fill_(torch.nan)


def timed(start: Start, source: Tensor, target: Tensor) -> float:
    """Seconds of the slowest rank from the start of a collective to the end of its wait."""
    source = source.clone()  # a collective may use up what it sends
    dist.barrier()
    begin = time.perf_counter()
    start(source, target).wait()
    return wire.slowest(time.perf_counter() - begin)


def contestants(b: Buffers, ring: wire.Ring) -> list[Contestant]:
    """The line, gloo's own, and zerograph's."""
    world = dist.get_world_size()
    moved = b.full.nbytes * (world - 1) // world
    # The group's own methods: the functions' names differ between versions of torch.
    group: Any = dist.group.WORLD

    def gather(shard: Tensor, full: Tensor) -> Any:
        return group._allgather_base(full, shard)

    def reduce_scatter(buffer: Tensor, out: Tensor) -> Any:
        return group._reduce_scatter_base(out, buffer)

    return [
        Contestant(LINE, lambda: ring.exchange(moved)),
        *pair("gloo", gather, reduce_scatter, b),
        *pair("zerograph", *ours(), b),
    ]


def pair(
    whose: str,
    gather: Start,
    reduce_scatter: Start,
    b: Buffers,
) -> list[Contestant]:
    """Both collectives of one maker."""
    return [
        Contestant(f"{whose} {GATHER}", lambda: timed(gather, b.shard, b.full), b.require_full),
        Contestant(
            f"{whose} {REDUCE}", lambda: timed(reduce_scatter, b.buffer, b.out), b.require_out
        ),
    ]


def ours() -> tuple[Start, Start]:
    """zerograph's own, as a lowered program starts them."""
    world = current_world("cpu")
    gathers, reductions = world.channel("gathers"), world.channel("reductions")

    def gather(shard: Tensor, full: Tensor) -> Any:
        return gathers.gather(shard, full, "of the benchmark")

    def reduce_scatter(buffer: Tensor, out: Tensor) -> Any:
        return Into(out, reductions.reduce_scatter(buffer, "of the benchmark", mean=False))

    return gather, reduce_scatter


@dataclass(frozen=True)
class Into:
    """A pending tensor that will be `out`."""

    out: Tensor
    pending: Any

    def wait(self) -> None:
        self.out.set_(self.pending.wait())  # no copy


def measure(found: list[Contestant], rounds: int) -> None:
    """Take turns, in an order that rotates."""
    for index in range(WARM_UP + rounds):
        shift = index % len(found)
        for one in found[shift:] + found[:shift]:
            seconds = one.run()
            one.check()
            if index >= WARM_UP:
                one.seconds.append(seconds)


def run(options: argparse.Namespace) -> None:
    """One rank, in a process group that exists."""
    torch.set_num_threads(1)
    loopback = wire.address().startswith("127.")
    ring = wire.Ring()
    found = contestants(Buffers.of(options.megabytes * 1_000_000), ring)
    measure(found, options.rounds)
    ring.close()
    line = found[0].seconds
    ratios = {one.name: contest.ratio(one.seconds, line) for one in found}
    ours = [name for name in ratios if name.startswith("zerograph")]
    late = [name for name in ours if ratios[name] > MOST and not loopback]
    if dist.get_rank() == 0:
        print(table(found, ratios, {name: name not in late for name in ours if not loopback}))
        write(options, found, ratios, loopback)
        if late:
            sys.exit(f"more than {MOST} times the line: {', '.join(late)}")


def table(found: list[Contestant], ratios: dict[str, float], held: dict[str, bool]) -> str:
    lines = ["| | median | min | max | x line | at most | |", "|---" * 7 + "|"]
    for one in found:
        seconds = (statistics.median(one.seconds), min(one.seconds), max(one.seconds))
        cells = [one.name, *(f"{1e3 * s:.0f} ms" for s in seconds), f"{ratios[one.name]:.2f}"]
        bound = ["", ""]
        if one.name in held:
            bound = [f"{MOST:.2f}", "held" if held[one.name] else "**not held**"]
        lines.append(f"| {' | '.join([*cells, *bound])} |")
    return "\n".join(lines)


def write(
    options: argparse.Namespace, found: list[Contestant], ratios: dict[str, float], loopback: bool
) -> None:
    if not options.json:
        return
    content = {
        "benchmark": "collectives",
        "machine": machine.describe(),
        "ranks": dist.get_world_size(),
        "link": "loopback" if loopback else "network",
        "megabytes": options.megabytes,
        "results": [
            {"name": one.name, "ratio_to_line": ratios[one.name], "seconds": one.seconds}
            for one in found
        ],
    }
    options.json.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="measured runs of each")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to spawn (not with link.sh)")
    parser.add_argument("--megabytes", type=int, default=64, help="of the full buffer, 10^6 bytes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    contest.launch(run, parser.parse_args())


if __name__ == "__main__":
    main()
