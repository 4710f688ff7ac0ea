"""`zerograph plan`: plan a model, print what the plan costs, save it; with --fit, find what fits."""

from typing import Annotated

import typer

from zerograph.cli import fits, tables
from zerograph.cli.app import command
from zerograph.cli.options import Config, Json, Model, Options, Output
from zerograph.cli.planning import planned


@command
def plan(
    model: Model,
    options: Options,
    config: Config = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", metavar="BYTES", help="Find the settings that fit: 80GB, 512MiB."),
    ] = None,
    json: Json = False,
    output: Output = None,
) -> None:
    """Plan a training step of MODEL: buckets, communication, memory and time of a rank."""
    if fit is not None:
        fits.search(model, config, options, fit, json, output)
        return
    document = planned(model, config, options)
    if output is not None:
        document.save(output)
    if json:
        typer.echo(document.dumps(), nl=False)
    else:
        tables.show(tables.plan_parts(document))
