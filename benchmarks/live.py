"""Peak memory of a step: the bytes of the storages that are alive, on the rank that holds most.

The tracker (tests/storages.py) counts what lives from step to step, the batch, and whatever an operator
makes, until it is freed; it sees `fully_shard` free and fill its parameters. What an operator, or gloo,
uses inside and frees before it returns is in nobody's figure.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import WARM_UP, Step, batch_of
from peers import Plain
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.storages import Storages, held_by


@dataclass(frozen=True)
class Live:
    """Bytes that one contestant holds on the rank that holds most."""

    name: str
    between: int
    """Before a step: what lives from step to step, and the batch."""
    peak: int
    """At most during the step."""
    planned: int | None = None
    """The plan's peak, of zerograph."""


def of_peer(name: str, step: Plain) -> Live:
    """A peer of torch."""
    return _live(name, step, step.held)


def of_engine(name: str, step: Step, engine: Any) -> Live:
    """A step of zerograph."""
    found = _live(name, step, lambda: held_by(engine))
    return replace(found, planned=engine.plan.memory.peak)


def _live(name: str, step: Step, held: Callable[[], list[Tensor]]) -> Live:
    """Train `WARM_UP` steps, then one under the tracker."""
    rank = dist.get_rank()
    for index in range(WARM_UP):
        step(batch_of(index, rank))
    batch = batch_of(WARM_UP, rank)
    with Storages([*held(), *batch.values()]) as seen:
        between = seen.alive
        step(batch)
    most = torch.tensor([between, seen.peak])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return Live(name, int(most[0]), int(most[1]))


def table(rows: Mapping[str, Live], peer: str) -> str:
    """Markdown, with the ratio of each peak to that of `peer`."""
    lines = [f"| | between steps | peak of a step | x {peer} | planned |", "|---" * 5 + "|"]
    for name, row in rows.items():
        planned = "" if row.planned is None else f"{row.planned / 1e6:.1f} MB"
        sizes = f"{row.between / 1e6:.1f} MB | {row.peak / 1e6:.1f} MB"
        lines.append(f"| {name} | {sizes} | {row.peak / rows[peer].peak:.3f} | {planned} |")
    return "\n".join(lines)
