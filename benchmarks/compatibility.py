"""Which model families work: each tiny model of tests/zoo beside eager and DistributedDataParallel.

    python benchmarks/compatibility.py [names...] [--write docs/models.md] [--json FILE]

For each model, on one process: the loss and every gradient in fp32 beside eager's, and the seconds to
capture and plan. On two ranks with different data, at stages 0 to 3: the loss and every mean gradient beside
DDP's, and one step of the optimizer. Every model has processes of its own with a deadline, so that one which
hangs costs one row. A failure stays in the table with its reason.
"""

import argparse
import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zerograph
from benchmarks.machine import describe
from tests.oracle import config_for, differing, gradient_error
from tests.ranks import RankError, run_ranks
from tests.zoo import SECTIONS, ZOO
from zerograph.runtime import planner
from zerograph.runtime.world import World

DEADLINE = 240.0
"""Seconds that one model may take, on one process and on two."""
HEAD = Path(__file__).with_name("compatibility_head.md")


def compare(rank: int, world: int, name: str) -> dict[str, Any]:
    """What each rank of a pair reports; errors are as of `_error`."""
    warnings.simplefilter("ignore")
    return {**_alone(name), "stages": _together(name, rank)}


def _alone(name: str) -> dict[str, Any]:
    """One process beside eager: the error, and the seconds to capture and plan.

    Both ranks do the same here: engines are numbered, and all ranks must make the same ones.
    """
    family = ZOO[name]
    model = family.make()
    eager = copy.deepcopy(model)
    size = sum(p.numel() for p in model.parameters())
    expected = family.loss(eager(**family.batch(0)))
    expected.backward()
    one = World(0, 1, torch.device("cpu"), None)
    engine = zerograph.Engine(model, zerograph.load_config(config_for(3)), one)
    start = time.perf_counter()
    loss = family.loss(engine(**family.batch(0)))
    seconds = time.perf_counter() - start
    engine.backward(loss)
    error = _error(loss, engine.gradients(), expected, _gradients(eager))
    return {"parameters": size, "seconds": seconds, "error": error}


def _together(name: str, rank: int) -> dict[str, float]:
    """The ranks with different data beside DDP: the error of each stage."""
    family = ZOO[name]
    model = family.make()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    expected = family.loss(wrapped(**family.batch(rank)))
    expected.backward()
    gradients = _gradients(model)
    stages = {}
    with _one_capture():
        for stage in range(4):
            engine = zerograph.compile(family.make(), config_for(stage))
            loss = family.loss(engine(**family.batch(rank)))
            engine.backward(loss)
            stages[str(stage)] = _error(loss, engine.gradients(), expected, gradients)
            engine.step()
    return stages


@contextmanager
def _one_capture() -> Iterator[None]:
    """Within, all engines share the first one's capture: it depends on the model, not on the stage.

    Capturing is most of the work for a tiny model, and every stage would make the same again.
    """
    capture, made = planner.trace, []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(capture(*args, **kwargs))
        return made[0]

    planner.trace = once
    try:
        yield
    finally:
        planner.trace = capture


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _error(
    loss: Tensor, found: dict[str, Tensor | None], expected: Tensor, gradients: dict[str, Tensor]
) -> float:
    """0.0 if all is bitwise equal, else the largest error in units of the oracle's bound.

    Of a gradient that only one side has, the other side's is zero: DDP gives zeros to a parameter
    that no rank used.
    """
    ours = {n: g for n, g in found.items() if g is not None}
    zeros = {n: torch.zeros_like(g) for n, g in {**ours, **gradients}.items()}
    ours, theirs = {**zeros, **ours}, {**zeros, **gradients}
    if torch.equal(loss, expected) and not differing(ours, theirs):
        return 0.0
    losses = gradient_error({"loss": loss.detach()}, {"loss": expected.detach()})
    return max(losses, gradient_error(ours, theirs))


def check(name: str) -> dict[str, Any]:
    """All that the table says of one model; `failure` holds the reason if a part failed."""
    row: dict[str, Any] = {"name": name, "note": ZOO[name].note}
    try:
        first, second = run_ranks(2, compare, name, timeout=DEADLINE)
    except RankError as error:
        return {**row, "failure": _reason(str(error))}
    stages = {s: max(first["stages"][s], second["stages"][s]) for s in first["stages"]}
    return {**row, **first, "stages": stages}


def passed(row: dict[str, Any]) -> bool:
    """Captured, trained, and every error within the bound."""
    return "failure" not in row and max(row["error"], *row["stages"].values()) <= 1.0


def _reason(text: str) -> str:
    """The first line of the first rank's error, and what to change, out of the ranks' tracebacks."""
    lines = text.partition("\nrank 1:")[0].splitlines()
    errors = [i for i, line in enumerate(lines) if line[:1].strip() and "Error: " in line]
    if not errors:
        return lines[-1].strip()
    first = lines[errors[-1]].partition("Error: ")[2]
    changes = [line.partition("change:")[2] for line in lines[errors[-1] :] if "change:" in line]
    return f"{first}; change:{changes[0]}" if changes else first


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each section, and how many passed."""
    by_name = {row["name"]: row for row in rows}
    parts = [f"{sum(map(passed, rows))} of {len(rows)} models pass."]
    for section, families in SECTIONS.items():
        found = [by_name[f.name] for f in families if f.name in by_name]
        if found:
            parts.append(f"## {section}\n\n" + "\n".join([*_HEADER, *map(_line, found)]))
    return "\n\n".join(parts)


_HEADER = (
    "| model | parameters | capture | beside eager | stage 0, 1, 2, 3 beside DDP | note |",
    "|---|---|---|---|---|---|",
)


def _line(row: dict[str, Any]) -> str:
    size = f"{row['parameters']:,}" if "parameters" in row else ""
    seconds = f"{row['seconds']:.1f} s" if "seconds" in row else ""
    eager = _shown(row["error"]) if "error" in row else "fails"
    notes = [row["note"], row.get("failure", "").replace("|", "\\|")]
    note = "; ".join(n for n in notes if n)
    return f"| {row['name']} | {size} | {seconds} | {eager} | {_stages(row)} | {note} |"


def _stages(row: dict[str, Any]) -> str:
    shown = [_shown(error) for error in row.get("stages", {}).values()]
    return ", ".join(shown if len(set(shown)) > 1 else shown[:1]) or "fails"


def _shown(error: float) -> str:
    return "bitwise" if error == 0.0 else f"{error:.2g}"


def document(rows: list[dict[str, Any]]) -> str:
    machine = describe()
    where = (
        f"Measured on {machine['cores']} cores ({machine['cpu']}), {machine['system']}, "
        f"Python {machine['python']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, {machine['date']}."
    )
    return f"{HEAD.read_text()}\n{where}\n\n{table(rows)}\n"


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run, by name, of models that still exist."""
    if path is None or not path.exists():
        return {}
    return {r["name"]: r for r in json.loads(path.read_text())["rows"] if r["name"] in ZOO}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models of tests/zoo; all if none is given")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the page of markdown here"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep the rows here, those of models that are not named too",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(ZOO))
    if unknown:
        parser.error(f"no model {unknown[0]!r} in the zoo; there are: {', '.join(ZOO)}")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    kept = _read(options.json)
    for name in options.names or list(ZOO):
        kept[name] = check(name)
        print(_line(kept[name]), file=sys.stderr, flush=True)
        if options.json:
            saved = {"machine": describe(), "rows": list(kept.values())}
            options.json.write_text(json.dumps(saved, indent=1) + "\n")
    rows = list(kept.values())
    if options.write:
        options.write.write_text(document(rows))
    print(table(rows))
    return 0 if all(map(passed, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
