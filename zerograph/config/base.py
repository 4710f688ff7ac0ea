"""What every section of the config is made of: one strict, frozen base and a few field types.

Strict means that JSON types are taken at their word: no numeric strings, no 0 for false. The one
kindness is that a whole float is an int, because DeepSpeed's own examples write `5e8`.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)


def whole(value: object) -> object:
    """Turn `5e8` into `500000000`; leave everything else to the strict check."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def never(value: object) -> object:
    """Read an infinite number of steps, as accelerate writes it, as none given."""
    return None if value == float("inf") else whole(value)


def solved(value: object) -> object:
    """Read a batch key's `"auto"` as absent: batch arithmetic solves it from the others."""
    return None if value == "auto" else whole(value)


def count_or_auto(value: object) -> object:
    """Read a whole number of at least 0, or the word "auto", which stays."""
    number = whole(value)
    if value == "auto" or (type(number) is int and number >= 0):
        return number
    raise ValueError(
        f'must be a whole number of at least 0 or "auto", got {json.dumps(value, default=str)}'
    )


def lower(value: object) -> object:
    """Read a word in any case."""
    return value.lower() if isinstance(value, str) else value


def upper(value: object) -> object:
    """Read a word in any case, for the words that DeepSpeed keeps in capitals."""
    return value.upper() if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(whole)]
Count = Annotated[int, BeforeValidator(whole), Field(ge=0)]
CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(count_or_auto)]
Positive = Annotated[int, BeforeValidator(whole), Field(gt=0)]
BatchSize = Annotated[
    Annotated[int, Field(gt=0)] | None,
    BeforeValidator(solved),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Free = dict[str, Any]


class Section(BaseModel):
    """An object of the config: it forbids unknown keys and cannot be changed.

    `spellings` maps another name that DeepSpeed accepts for a key to the name used here.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", protected_namespaces=())
    spellings: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        for other, key in cls.spellings.items():
            if other in data and key in data:
                raise ValueError(f"{other!r} and {key!r} are the same key; keep one of them")
        return {cls.spellings.get(key, key): value for key, value in data.items()}
