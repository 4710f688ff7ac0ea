"""The form of a row in the table of what is built, and the four ways to write one.

    built     the key does here what it does in DeepSpeed; with `here`, which says where, the planned
              graph does not change (a golden diff shows what every other built key changes)
    advises   the key is accepted and changes nothing; `here` says what happens instead, and
              nothing need be said about the values in `accepts`
    refused   only the values in `accepts`, which are what happens anyway, are accepted
    dormant   the key only refines another that is refused, so it has no effect yet

Each writer takes the keys of several rows at once, separated by spaces.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["built", "advises", "refused", "dormant"]


@dataclass(frozen=True)
class Row:
    """What is built of one key, and how to mend a config that asks for more."""

    key: str
    kind: Kind
    here: str = ""
    mend: str = ""
    accepts: tuple[object, ...] = ()


def built(keys: str, here: str = "") -> tuple[Row, ...]:
    return tuple(Row(key, "built", here) for key in keys.split())


def advises(keys: str, here: str, *accepts: object) -> tuple[Row, ...]:
    return tuple(Row(key, "advises", here, "", accepts) for key in keys.split())


def refused(keys: str, here: str, mend: str, *accepts: object) -> tuple[Row, ...]:
    return tuple(Row(key, "refused", here, mend, accepts) for key in keys.split())


def dormant(keys: str) -> tuple[Row, ...]:
    return tuple(Row(key, "dormant") for key in keys.split())


def under(section: str, keys: str) -> str:
    return " ".join(f"{section}.{key}" for key in keys.split())


OFF = "set it to false or leave it out"
