"""The typer application: how a command is registered, and how its errors end."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any

import typer

from zerograph.errors import ZerographError

app = typer.Typer(
    help="ZeRO as a compiler pass: plan a training step, read it, compare it. No GPU, no ranks, no weights.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_TRACEBACK = inspect.Parameter(
    "traceback",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--traceback",
            envvar="ZEROGRAPH_TRACEBACK",
            help="Show where an error comes from.",
        ),
    ],
)


@app.callback()
def _root() -> None:
    """Keeps a single command a command."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register `function` under its name, with its dataclass parameters spread into options.

    An error that the user can mend becomes one line on stderr and exit code 2.
    """
    given = inspect.signature(function, eval_str=True).parameters
    parameters = [each for p in given.values() for each in _spread(p)]

    @functools.wraps(function)
    def run(*, traceback: bool, **values: Any) -> None:
        with_options = {name: _gathered(p, values) for name, p in given.items()}
        try:
            function(**with_options)
        except BrokenPipeError:
            raise
        except (ZerographError, OSError) as error:
            if traceback:
                raise
            typer.echo(f"zerograph: {_message(error)}", err=True)
            raise typer.Exit(2) from None

    run.__signature__ = inspect.Signature([*parameters, _TRACEBACK])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*parameters, _TRACEBACK]}
    del run.__wrapped__  # type: ignore[attr-defined]
    app.command(function.__name__)(run)
    return function


def _spread(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """The parameter, or the fields of the dataclass that it takes; all of them by keyword."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    if not is_dataclass(parameter.annotation):
        yield parameter.replace(kind=keyword)
        return
    for each in fields(parameter.annotation):
        yield inspect.Parameter(each.name, keyword, default=_default(each), annotation=each.type)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _gathered(parameter: inspect.Parameter, values: dict[str, Any]) -> Any:
    kind = parameter.annotation
    if is_dataclass(kind) and isinstance(kind, type):
        return kind(**{each.name: values[each.name] for each in fields(kind)})
    return values[parameter.name]


def _message(error: ZerographError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)
