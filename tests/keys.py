"""Every key of the config, from its pydantic models; shared by the tests of the config and of the knobs."""

import functools
from collections.abc import Mapping
from typing import Any

from zerograph.config import ZeroConfig
from zerograph.config.base import Section
from zerograph.config.optimizer import OPTIMIZER_TAGS
from zerograph.config.problems import nested
from zerograph.config.scheduler import SCHEDULER_TAGS


def nest(path: str, value: object) -> dict[str, Any]:
    """Build the config in which one key has one value, with whatever it needs beside it."""
    config: Any = value
    for key in reversed(path.split(".")):
        config = {key: config}
    if path.startswith("optimizer.params"):
        config["optimizer"]["type"] = "Adam"
    if path.startswith("scheduler.params"):
        config["scheduler"]["type"] = "WarmupLR"
    return config  # type: ignore[no-any-return]


def leaves(model: type[Section], prefix: str = "") -> dict[str, Any]:
    """Every key path of the schema, with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = nested(field)
        if inner is None:
            found[prefix + name] = field.default
        else:
            found |= leaves(inner, f"{prefix}{name}.")
    return found


@functools.cache
def all_leaves() -> Mapping[str, Any]:
    """Every key path of the config, with its default; of all types of optimizers and schedulers."""
    found = leaves(ZeroConfig)
    del found["optimizer"], found["scheduler"]
    for cls in OPTIMIZER_TAGS.values():
        found |= leaves(cls, "optimizer.")
    for cls in SCHEDULER_TAGS.values():
        found |= leaves(cls, "scheduler.")
    return found
