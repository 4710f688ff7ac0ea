"""Hold a config against the table in `support`: what is refused, and what only advises."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from zerograph.config import auto
from zerograph.config.base import Section
from zerograph.config.row import Row
from zerograph.config.support import SUPPORT
from zerograph.errors import ConfigError

if TYPE_CHECKING:
    from zerograph.config.model import ZeroConfig

Leaf = tuple[str, object]
_ALONE = (
    "activation_checkpointing.partition_activations=true: no model-parallel group was given "
    "(zerograph.compile(mpu=...) or mesh=...), so there is nobody to share activations with"
)


def show(value: object) -> str:
    """Write a value as JSON on one short line."""
    text = json.dumps(value, default=lambda other: f"<{type(other).__name__}>")
    return text if len(text) <= 60 else text[:57] + "..."


def given(section: Section, prefix: str = "") -> Iterator[Leaf]:
    """Yield path and value of each key that the user gave, in the order of the fields."""
    names = [*type(section).model_fields, *(section.model_extra or {})]
    for name in names:
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        if value is None and not prefix and name not in SUPPORT:
            continue  # a section that is null is left out
        if isinstance(value, Section):
            yield from given(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def row_for(path: str) -> Row:
    """Find the row of a key: its own, or that of the nearest section around it."""
    while path not in SUPPORT:
        path, dot, _ = path.rpartition(".")
        assert dot, "every key has a row or lies in a section that has one"
    return SUPPORT[path]


def refusals(config: Section) -> list[str]:
    """Say which given values ask for what is not built."""
    problems = []
    for path, value in given(config):
        row = row_for(path)
        if row.kind == "refused" and value not in row.accepts:
            problems.append(f"{path}={show(value)}: not built: {row.here}; {row.mend}")
    return problems


def require_fits(config: "ZeroConfig", model_parallel: int) -> None:
    """Raise ConfigError for what is not built beside a model-parallel group of more than one rank."""
    if model_parallel > 1 and config.compile.update_in_backward:
        raise ConfigError(
            "compile.update_in_backward: the norm over model-parallel ranks is made of whole gradients; "
            f"leave it out, or give no model-parallel group (here of {model_parallel})"
        )


def advisory(config: "ZeroConfig", model_parallel: int = 1) -> tuple[str, ...]:
    """Say what happens instead of each given value that only advises.

    partition_activations does without a model-parallel group, as in DeepSpeed with one of one rank.
    """
    lines = []
    for path, value in given(config):
        row = row_for(path)
        if row.kind == "advises" and value not in row.accepts:
            lines.append(f"{path}={show(value)}: {row.here}")
    lines += [auto.said(path, show(_value(config, path))) for path in config._auto]
    if config.activation_checkpointing.partition_activations and model_parallel == 1:
        lines.append(_ALONE)
    return tuple(sorted(lines))


def _value(config: "ZeroConfig", path: str) -> object:
    value: object = config
    for key in path.replace("bfloat16", "bf16").split("."):
        value = getattr(value, key)
    return value
