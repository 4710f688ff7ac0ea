"""Peak memory of a step: the bytes of the storages that are alive, on the rank that holds most.

The tracker (tests/storages.py) counts what lives from step to step, the batch, and whatever an operator
makes, until it is freed; it sees `fully_shard` free and fill its parameters. What an operator, or gloo,
uses inside is not in it, but in what torch's allocator says of one more step.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import WARM_UP, Step, batch_of
from peers import Plain
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

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
    allocated: int
    """The same by torch's allocator, with what operators and gloo use inside."""
    planned: int | None = None
    """The plan's peak, of zerograph."""


def of_peer(name: str, step: Plain) -> Live:
    """A peer of torch."""
    return _live(name, step, step.held)


def of_engine(name: str, step: Step, engine: Any) -> Live:
    """A step of zerograph."""
    found = _live(name, step, lambda: held_by(engine))
    return replace(found, planned=engine.plan.memory.peak)


def allocated(step: Step, held: Callable[[], list[Tensor]]) -> int:
    """Most bytes of a step on this rank by torch's allocator alone, for steps that run under no tracker."""
    for index in range(WARM_UP):
        step(batch_of(index, dist.get_rank()))
    batch = batch_of(WARM_UP, dist.get_rank())
    return Storages([*held(), *batch.values()]).alive + _allocated(lambda: step(batch))


def _live(name: str, step: Step, held: Callable[[], list[Tensor]]) -> Live:
    """Train `WARM_UP` steps, then one under the tracker."""
    rank = dist.get_rank()
    for index in range(WARM_UP):
        step(batch_of(index, rank))
    batch = batch_of(WARM_UP, rank)
    with Storages([*held(), *batch.values()]) as seen:
        between = seen.alive
        step(batch)
    most = torch.tensor([between, seen.peak, between + _allocated(lambda: step(batch))])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return Live(name, *map(int, most))


def _allocated(train: Callable[[], object]) -> int:
    """Most bytes beyond those before `train`, by torch's allocator, on all threads."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    changes.sort(key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    return max(accumulate((e["args"]["Bytes"] for e in changes), initial=0))


def table(rows: Mapping[str, Live], peer: str) -> str:
    """Markdown, with the ratio of each peak to that of `peer`."""
    heads = [
        "",
        "between steps",
        "peak of a step",
        f"x {peer}",
        "allocated",
        f"x {peer}",
        "planned",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    most = rows[peer]
    for name, row in rows.items():
        planned = "" if row.planned is None else f"{row.planned / 1e6:.1f} MB"
        cells = [name, f"{row.between / 1e6:.1f} MB"]
        cells += [f"{row.peak / 1e6:.1f} MB", f"{row.peak / most.peak:.3f}"]
        cells += [f"{row.allocated / 1e6:.1f} MB", f"{row.allocated / most.allocated:.3f}"]
        lines.append(f"| {' | '.join([*cells, planned])} |")
    return "\n".join(lines)
