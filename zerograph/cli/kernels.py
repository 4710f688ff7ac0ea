"""`zerograph kernels`: the generated kernels of a plan as files, compiled for GPUs that need not be here."""

from pathlib import Path
from typing import Annotated

import typer

from zerograph.cli.app import command
from zerograph.cli.options import Config, Options, Target
from zerograph.cli.planning import document_of
from zerograph.codegen.aot import table
from zerograph.codegen.emit import REPORT, TARGETS, emit
from zerograph.codegen.of_plan import SOURCES
from zerograph.errors import PlanError


@command
def kernels(
    target: Target,
    options: Options,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="The folder to write to.")
    ],
    config: Config = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help=f"One of {', '.join(TARGETS)}, or several; by default the sources.",
        ),
    ] = None,
) -> None:
    """Write the kernels that a plan's step launches, and what they compile to for a GPU."""
    document = document_of(target, config, options)
    if not document.kernels:
        raise PlanError(
            f"the plan of {document.model} launches no generated kernels: it has no optimizer, no gradients, "
            "or was saved by a version without them"
        )
    written, report = emit(document.kernels, targets or SOURCES, Path(output))
    for path in written:
        typer.echo(path)
    if report:
        typer.echo(f"\n{REPORT}\n{table(report)}", nl=False)
