"""AdamW's rule with one fault each, which tests have to notice for every target.

`register` makes them rules by name, so that a process can render them.
"""

import dataclasses
from collections.abc import Mapping

from zerograph.codegen.expr import Block
from zerograph.codegen.rules import ADAMW, RULES, Described, Flags, Options


def _coefficient(options: Options, step: int) -> Mapping[str, float]:
    made = dict(ADAMW.host(options, step))
    return {**made, "fresh": 1.01 * made["fresh"]}


def _no_first_correction(options: Options, step: int) -> Mapping[str, float]:
    return {**ADAMW.host(options, step), "rate": -options["lr"]}


def _no_second_correction(options: Options, step: int) -> Mapping[str, float]:
    return {**ADAMW.host(options, step), "unbias": 1.0}


def _decay_last(k: Block, flags: Flags) -> None:
    k.held = k.keep
    k.keep = 1.0
    ADAMW.body(k, flags)
    k.param = k.param * k.held


def _no_decay(options: Options, step: int) -> Mapping[str, float]:
    return {**ADAMW.host(options, step), "keep": 1.0}


def _coupled(k: Block, flags: Flags) -> None:
    k.grad = k.grad - k.param * (k.keep - 1.0)
    k.keep = 1.0
    ADAMW.body(k, flags)


def _mutant(name: str, **change: object) -> Described:
    return dataclasses.replace(ADAMW, name=f"adamw_{name}", **change)  # type: ignore[arg-type]


MUTANTS = [
    _mutant("coefficient", host=_coefficient),
    _mutant("nofirst", host=_no_first_correction),
    _mutant("nosecond", host=_no_second_correction),
    _mutant("nodecay", host=_no_decay),
    _mutant("decaylast", body=_decay_last),
    _mutant("coupled", body=_coupled),
]


def register() -> None:
    """Make them rules by name in this process."""
    RULES.update((rule.name, rule) for rule in MUTANTS)


def forget() -> None:
    for rule in MUTANTS:
        RULES.pop(rule.name, None)
