"""`zerograph export`: a plan for Perfetto (chrome trace) or graphviz (DOT)."""

from pathlib import Path
from typing import Annotated

import typer

from zerograph.cli.app import command
from zerograph.cli.options import Config, Options, Target
from zerograph.cli.planning import document_of, recording_from
from zerograph.errors import PlanError


@command
def export(
    target: Target,
    options: Options,
    config: Config = None,
    chrome: Annotated[
        str | None, typer.Option(metavar="FILE", help="A chrome trace, which Perfetto shows.")
    ] = None,
    dot: Annotated[str | None, typer.Option(metavar="FILE", help="A graph for graphviz.")] = None,
    run: Annotated[
        str | None, typer.Option(metavar="JSON", help="A recording, for the chrome trace.")
    ] = None,
) -> None:
    """Write a plan in the form of another tool."""
    if chrome is None and dot is None:
        raise PlanError("nothing to write: give --chrome trace.json, --dot graph.dot, or both")
    from zerograph.export import chrome_trace
    from zerograph.export import dot as graph

    document = document_of(target, config, options)
    if chrome is not None:
        Path(chrome).write_text(chrome_trace(document, recording_from(run)), encoding="utf-8")
    if dot is not None:
        Path(dot).write_text(graph(document), encoding="utf-8")
