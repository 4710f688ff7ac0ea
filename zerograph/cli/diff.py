"""`zerograph diff`: what differs between two plans, and what it costs."""

from typing import Annotated

import typer
from rich.text import Text

from zerograph.cli.app import command
from zerograph.cli.options import Options, Skeleton
from zerograph.cli.planning import document_of, is_saved
from zerograph.cli.tables import show
from zerograph.diff import difference
from zerograph.document import Document
from zerograph.errors import PlanError


@command
def diff(
    before: Annotated[
        str, typer.Argument(metavar="A", help="A saved plan, or what `zerograph plan` takes.")
    ],
    options: Options,
    after: Annotated[
        str | None, typer.Argument(metavar="[B]", help="Another; by default A again.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", metavar="JSON", help="The config of A, and that of B."),
    ] = None,
    skeleton: Skeleton = False,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Compare plans of different models, too.")
    ] = False,
) -> None:
    """Compare two saved plans, or one model under two configs. Exit code 1 if they differ."""
    (one, other), names = _documents(before, after, config or [], options)
    found = difference(one, other, names, skeleton=skeleton, any_model=any_model)
    if found:
        show(map(_coloured, str(found).splitlines()))
        raise typer.Exit(1)


def _documents(
    before: str, after: str | None, configs: list[str], options: Options
) -> tuple[tuple[Document, Document], tuple[str, str]]:
    """Both documents, and how the diff calls them: what tells them apart."""
    targets = [before, after or before]
    planned = [target for target in targets if not is_saved(target)]
    if after is None and len(configs) != 2:
        raise PlanError("two plans are compared: A and B, or one model and --config twice")
    if len(configs) not in ((1, 2) if len(planned) == 2 else (len(planned),)):
        raise PlanError(f"--config is given {len(configs)} times for {len(planned)} models to plan")
    rest = iter(configs if len(configs) == 2 else configs * 2)
    given = [None if is_saved(target) else next(rest) for target in targets]
    names = targets if before != targets[1] else [str(config) for config in given]
    one, other = (document_of(target, config, options) for target, config in zip(targets, given))
    return (one, other), (names[0], names[1])


def _coloured(line: str) -> Text:
    styles = {"---": "bold", "+++": "bold", "@@ ": "cyan"}
    signs = {"+": "green", "-": "red"}
    return Text(line, style=styles.get(line[:3], signs.get(line[:1], "")))
