"""`zerograph doctor`: what this machine has, and what of zerograph will work on it."""

import json as jsonlib
from dataclasses import asdict
from typing import Annotated

import typer

from zerograph.cli.app import command
from zerograph.cli.options import Json, Output
from zerograph.cli.tables import show, table
from zerograph.doctor import examine
from zerograph.errors import PlanError


@command
def doctor(
    nvme: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Measure the disk that holds this folder.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine as a cluster, into --output.")
    ] = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Say what this machine has, and what will work on it."""
    if calibrate:
        _calibrate(output)
        return
    if output is not None:
        raise PlanError("--output is for --calibrate")
    findings = list(examine(nvme))
    if json:
        typer.echo(jsonlib.dumps([asdict(f) for f in findings], indent=2))
    else:
        rows = [(f.name, f.state, f.found, f.means) for f in findings]
        show([table(("check", "state", "found", "what it means"), rows)])


def _calibrate(output: str | None) -> None:
    """Measure and write the cluster that `--cluster` reads."""
    if output is None:
        raise PlanError("--calibrate writes a cluster: -o cluster.json")
    from zerograph.calibrate import calibrate

    cluster = calibrate(ranks=2)
    cluster.save(output)
    typer.echo(f"{cluster.name} is in {output}; zerograph plan --cluster {output} predicts with it")
