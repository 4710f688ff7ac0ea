"""`zerograph report`: a plan, and what was recorded of running it, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from zerograph.cli.app import command
from zerograph.cli.options import Config, Options, Target
from zerograph.cli.planning import document_of, recording_from


@command
def report(
    target: Target,
    options: Options,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The HTML file.")],
    config: Config = None,
    run: Annotated[
        str | None, typer.Option(metavar="JSON", help="A recording of a run of this plan.")
    ] = None,
) -> None:
    """Write a report of a plan: one HTML file that needs no network."""
    from zerograph.report import render

    document = document_of(target, config, options)
    Path(output).write_text(render(document, recording_from(run)), encoding="utf-8")
