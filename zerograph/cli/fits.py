"""`zerograph plan --fit 80GB`: the settings that fit, the fastest first, and why the others do not."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from rich.console import RenderableType
from rich.text import Text

from zerograph.cli.options import Options
from zerograph.cli.planning import config_from, trace_for
from zerograph.cli.tables import show, table, title
from zerograph.cost import cluster_of
from zerograph.errors import PlanError
from zerograph.fit import Candidate, Fit, fit, micro_batches_of, parse_bytes
from zerograph.levers import ACTIVATIONS
from zerograph.planning import plan_of
from zerograph.units import duration, size


def search(
    model: str, path: str | None, options: Options, given: str, as_json: bool, output: str | None
) -> None:
    """Search and print; save the plan of the best in `output`. Exit code 1 if nothing fits."""
    budget, cluster = parse_bytes(given), cluster_of(options.cluster)
    config = config_from(path, options)
    micros = micro_batches_of(config, options.data_parallel, options.batch)
    if len(micros) > 1 and options.input:
        raise PlanError("--fit tries several micro-batches, and --input says one; give --batch too")
    found = fit(
        lambda micro: trace_for(model, config, options, micro),
        config,
        budget,
        cluster,
        options.data_parallel,
        micros,
    )
    if output is not None and found.fits:
        best = found.fits[0]
        plan_of(trace_for(model, config, options, best.micro), best.config).save(output, cluster)
    if as_json:
        typer.echo(json.dumps(_record(found), indent=2))
    else:
        show(_parts(found, given, cluster.name))
    if not found.fits:
        raise typer.Exit(1)


def _parts(found: Fit, given: str, cluster: str) -> Iterator[RenderableType]:
    yield title(f"fits in {given}, the fastest on {cluster} first")
    if found.fits:
        names = (">step", ">slower by", ">waiting", ">computing again", ">peak")
        yield _table(found.fits, names, lambda c: _times(c, found.fits[0]))
    else:
        yield Text("  nothing")
    if found.exceeds:
        yield Text()
        yield title("does not fit")
        yield _table(
            found.exceeds, (">peak", "at the peak"), lambda c: (size(c.memory.peak), c.why())
        )
    notes = {"fewer activations were not tried": found.untried, "cannot be planned": found.refused}
    for name, lines in notes.items():
        if lines:
            yield Text()
            yield title(name)
            yield from (Text(f"  {line}") for line in lines)
    yield Text()
    yield Text(f"{found.plans} plans; with fewer activations where a stage does not fit otherwise")


def _table(candidates: Sequence[Candidate], names: Sequence[str], last: Any) -> RenderableType:
    """The choices, without levers of activations that none of them uses, and what `last` says of each."""
    used = {name for c in candidates for name, value in c.choice.items() if value is not None}
    choice = [name for name in candidates[0].choice if name in used or name not in ACTIVATIONS]
    rows = [[*(_shown(c.choice[name]) for name in choice), *last(c)] for c in candidates]
    return table([*(f">{name}" for name in choice), *names], rows)


def _times(candidate: Candidate, best: Candidate) -> Sequence[str]:
    """Seconds of a step, how much more than the best for as many rows, what is lost in them, and the peak."""
    rows = (candidate.rows or 1) / (best.rows or 1)
    slower = 100 * (candidate.seconds / (best.seconds * rows) - 1) if best.seconds else 0.0
    lost = (duration(s) if s else "-" for s in (candidate.waited, candidate.repeating))
    percent = f"{slower:.1f} %" if candidate is not best else "-"
    return duration(candidate.seconds), percent, *lost, size(candidate.memory.peak)


def _shown(value: Any) -> str:
    return "-" if value is None else str(value).lower() if value is True else str(value)


def _record(found: Fit) -> dict[str, Any]:
    def entry(candidate: Candidate) -> dict[str, Any]:
        return {
            **candidate.choice,
            "peak": candidate.memory.peak,
            "seconds": candidate.seconds,
            "waiting": candidate.waited,
            "computing_again": candidate.repeating,
            "at_peak": candidate.alive,
        }

    return {
        "budget": found.budget,
        "fits": [entry(c) for c in found.fits],
        "exceeds": [entry(c) for c in found.exceeds],
        "refused": list(found.refused),
        "untried": list(found.untried),
        "plans": found.plans,
    }
