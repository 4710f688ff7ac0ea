"""`zerograph show`: the canonical text of a plan, or a part of it."""

from typing import Annotated

import typer

from zerograph.cli.app import command
from zerograph.cli.options import Config, Options, Skeleton, Target
from zerograph.cli.planning import document_of
from zerograph.cli.tables import show as show_parts
from zerograph.cli.tables import table


@command
def show(
    target: Target,
    options: Options,
    config: Config = None,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="The text after this pass.")
    ] = None,
    skeleton: Skeleton = False,
    region: Annotated[
        str | None, typer.Option(help="The lines of forward, backward or step.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="The lines of a module with all in it, or of a bucket.")
    ] = None,
    passes: Annotated[
        bool, typer.Option("--passes", help="List the passes and what they did.")
    ] = False,
) -> None:
    """Print the canonical text of a plan."""
    document = document_of(target, config, options)
    if passes:
        rows = [(p.name, f"{len(p.full):,}", p.did) for p in document.passes]
        show_parts([table(("pass", ">lines", "did"), rows)])
        return
    text = document.text(after, skeleton=skeleton, region=region, layer=layer)
    typer.echo(text, nl=False)
