"""Say what is wrong with a config, one line per problem, from what pydantic found.

{"type": "extra_forbidden", "loc": ("zero_optimization", "stage3_prefetch_bucket_sise"), ...}
-> zero_optimization.stage3_prefetch_bucket_sise: unknown key; did you mean
   'stage3_prefetch_bucket_size'?
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from zerograph.config.base import Section
from zerograph.config.check import show
from zerograph.config.known import (
    MEANING,
    OPTIMIZER_TYPES,
    RETIRED,
    SCHEDULER_TYPES,
    UNBUILT_TYPES,
)
from zerograph.config.optimizer import OPTIMIZER_TAGS
from zerograph.config.scheduler import SCHEDULER_TAGS

Model = type[Section]
Context = dict[str, Any]

_TAGS: dict[str, Model] = OPTIMIZER_TAGS | SCHEDULER_TAGS
_TYPES = {"optimizer": OPTIMIZER_TYPES, "scheduler": SCHEDULER_TYPES}

_EXPECTED: dict[str, Callable[[Context], str]] = {
    "int_type": lambda _: "a whole number",
    "int_from_float": lambda _: "a whole number",
    "float_type": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "bool_type": lambda _: "true or false",
    "string_type": lambda _: "a string",
    "tuple_type": lambda _: "a list",
    "dict_type": lambda _: "an object {...}",
    "model_type": lambda _: "an object {...}",
    "model_attributes_type": lambda _: "an object {...}",
    "union_tag_not_found": lambda _: "an object {...} with a type",
    "literal_error": lambda ctx: f"one of {ctx['expected']}",
    "greater_than": lambda ctx: f"above {ctx['gt']:g}",
    "greater_than_equal": lambda ctx: f"at least {ctx['ge']:g}",
    "less_than": lambda ctx: f"below {ctx['lt']:g}",
    "less_than_equal": lambda ctx: f"at most {ctx['le']:g}",
    "too_long": lambda ctx: f"a list of {ctx['max_length']}",
}


def nested(field: FieldInfo | None) -> Model | None:
    """Return the section class that a field holds, if it holds just one."""
    if field is None:
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    return models[0] if models else None


def locate(root: Model, loc: tuple[int | str, ...]) -> tuple[str, Model | None, FieldInfo | None]:
    """Turn a pydantic location into a key path, its parent section and its field."""
    names: list[str] = []
    parent: Model | None = None
    model: Model | None = root
    field: FieldInfo | None = None
    for part in loc:
        if model is None and part in _TAGS:
            model = _TAGS[str(part)]
            continue
        names.append(str(part))
        parent, field = model, model.model_fields.get(str(part)) if model else field
        model = nested(field) if parent else None
    return ".".join(names), parent, field


def nearest(key: str, names: list[str] | tuple[str, ...]) -> str | None:
    """Return the name most like a key, in any case of letters, or None when none is near."""
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(key.lower(), folded, n=1)
    return folded[close[0]] if close else None


def homes(root: Model, key: str, prefix: str = "") -> Iterator[str]:
    """Yield the path of every section below `root` that has this key."""
    for name, field in root.model_fields.items():
        model = nested(field)
        if model is None:
            continue
        if key in model.model_fields or key in model.spellings:
            yield f"{prefix}{name}"
        yield from homes(model, key, f"{prefix}{name}.")


def _unknown(root: Model, path: str, parent: Model | None) -> str:
    key = path.rpartition(".")[2]
    if path in RETIRED:
        return f"{path}: not a key (any more); {RETIRED[path]}"
    if key.startswith(("_", "#", "//")) or "comment" in key.lower():
        return f"{path}: unknown key; JSON has no comments, so take it out"
    names = [*parent.model_fields, *parent.spellings] if parent else []
    found = nearest(key, names)
    if found is not None:
        return f"{path}: unknown key; did you mean {found!r}?"
    elsewhere = [*homes(root, key), *([""] if key in root.model_fields else [])]
    if len(elsewhere) == 1:
        return f"{path}: unknown key; it belongs in {elsewhere[0] or 'the top level'}"
    if len(names) > 20:
        return f"{path}: unknown key, and none here is like it"
    return f"{path}: unknown key; the keys here are {', '.join(sorted(names))}"


def _auto(path: str, field: FieldInfo | None) -> str:
    meaning = f" ({MEANING[path]})" if path in MEANING else ""
    if field is None or field.default in (PydanticUndefined, None):
        return f'{path}: "auto" is not solved here; give the value itself{meaning}'
    return (
        f'{path}: "auto" is not solved here; give the value itself{meaning}, for example '
        f"DeepSpeed's default {show(field.default)}"
    )


def _unbuilt_type(section: str, kind: object) -> str:
    built = ", ".join(_TYPES[section])
    if not isinstance(kind, str):
        return f"{section}.type: missing or not a string; give one of {built}"
    known = UNBUILT_TYPES[section]
    match = {name.lower(): name for name in known}.get(kind.lower())
    if match is not None:
        return (
            f"{section}.type={show(kind)}: not built: the types that are built are {built}; "
            f"{known[match]} comes nearest"
        )
    found = nearest(kind, _TYPES[section])
    guess = f"; did you mean {found!r}?" if found else f"; give one of {built}"
    return f"{section}.type={show(kind)}: unknown type{guess}"


def describe(root: Model, error: ErrorDetails) -> str:
    """Put one error of pydantic into one line."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    path, parent, field = locate(root, error["loc"])
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(root, path, parent)
    if path in _TYPES and kind.startswith("union_tag") and isinstance(value, dict):
        return _unbuilt_type(path, value.get("type"))
    if kind == "missing":
        return f"{path}: missing; give {MEANING.get(path, 'it a value')}"
    if kind == "value_error":
        return f"{path}: {context['error']}" if path else str(context["error"])
    if value == "auto":
        return _auto(path, field)
    expected = _EXPECTED.get(kind)
    wanted = f"must be {expected(context)}" if expected else error["msg"]
    return f"{path}: {wanted}, got {show(value)}"


def problems(root: Model, error: ValidationError) -> list[str]:
    """Put every error of pydantic into a line of its own, in the order of the config's fields."""
    lines = (describe(root, one) for one in error.errors(include_url=False))
    return list(dict.fromkeys(lines))
