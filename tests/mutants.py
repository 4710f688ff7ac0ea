"""Optimizer rules with one fault each, which tests have to notice on every target.

    scaled       one host scalar a tenth larger: a changed coefficient, of each column of the table
    dropped      a host scalar without what makes it right: no bias correction, no decay, no first step
    otherwise    a body in another order, or without what a flag asks for

`WRONG` has them by name, "adamw.eps scaled". `register` makes them rules by name, so that a process can
render them. A fault of a scalar leaves the rule its own name, and so its kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zerograph.codegen.expr import Block, fma, sign
from zerograph.codegen.rules import (
    ADAGRAD,
    ADAM,
    ADAMW,
    LAMB,
    LION,
    RULES,
    SGD,
    Described,
    Flags,
    Options,
)

Made = Callable[[Mapping[str, float], Options], Mapping[str, float]]
"""(the right scalars, options) -> those that are wrong."""

# Scalars


def _scaled(rule: Described, name: str) -> Described:
    def host(options: Options, step: int) -> Mapping[str, float]:
        right = rule.host(options, step)
        return {**right, name: 1.1 * right[name]}

    return replace(rule, host=host)


def _dropped(rule: Described, made: Made) -> Described:
    def host(options: Options, step: int) -> Mapping[str, float]:
        right = rule.host(options, step)
        return {**right, **made(right, options)}

    return replace(rule, host=host)


def _no_second(right: Mapping[str, float], options: Options) -> Mapping[str, float]:
    return {"unbias": 1.0}


def _no_decay(right: Mapping[str, float], options: Options) -> Mapping[str, float]:
    return {"weight_decay": 0.0, "keep": 1.0}


def _bare_rate(right: Mapping[str, float], options: Options) -> Mapping[str, float]:
    return {"rate": -options["lr"]}


DROPPED: list[tuple[Described, str, Made]] = [
    (ADAMW, "first correction", _bare_rate),
    (ADAMW, "second correction", _no_second),
    (ADAMW, "decay", _no_decay),
    (ADAM, "first correction", _bare_rate),
    (ADAM, "second correction", _no_second),
    (ADAM, "decay", _no_decay),
    (SGD, "decay", _no_decay),
    (SGD, "whole first gradient", lambda right, options: {"fresh": 1 - options["dampening"]}),
    (ADAGRAD, "decay", _no_decay),
    (ADAGRAD, "decay of the rate", _bare_rate),
    (ADAGRAD, "initial sum", lambda right, options: {"initial": 0.0}),
    (LION, "decay", _no_decay),
    (LAMB, "first correction", lambda right, options: {"correct": 1.0}),
    (LAMB, "second correction", _no_second),
    (LAMB, "decay", _no_decay),
    (LAMB, "lower bound of the ratio", lambda right, options: {"min_coeff": 0.0}),
    (LAMB, "upper bound of the ratio", lambda right, options: {"max_coeff": 1e9}),
]

# Bodies


def _decay_last(k: Block, flags: Flags) -> None:
    k.held = k.keep
    k.keep = 1.0
    ADAMW.body(k, flags)
    k.param = k.param * k.held


def _coupled(k: Block, flags: Flags) -> None:
    k.grad = k.grad - k.param * (k.keep - 1.0)
    k.keep = 1.0
    ADAMW.body(k, flags)


def _decay_after(rule: Described) -> Callable[[Block, Flags], None]:
    """Decay that is no part of the gradient, of the parameter that was updated already."""

    def body(k: Block, flags: Flags) -> None:
        k.held = k.weight_decay
        k.weight_decay = 0.0
        rule.body(k, flags)
        k.param = fma(k.rate, k.held * k.param, k.param)

    return body


def _lion_decay_last(k: Block, flags: Flags) -> None:
    k.direction = fma(k.fresh1, k.grad, k.exp_avg * k.beta1)
    k.param = fma(k.rate, sign(k.direction), k.param) * k.keep
    k.exp_avg = fma(k.fresh2, k.grad, k.exp_avg * k.beta2)


def _lion_momentum_first(k: Block, flags: Flags) -> None:
    k.exp_avg = fma(k.fresh2, k.grad, k.exp_avg * k.beta2)
    k.direction = fma(k.fresh1, k.grad, k.exp_avg * k.beta1)
    k.param = fma(k.rate, sign(k.direction), k.param * k.keep)


def _lamb_norms_first(k: Block, flags: Flags) -> None:
    """Decay comes after the norms were taken: it is in the change that is applied alone."""
    k.weight_decay = 0.0
    LAMB.body(k, flags)


def _lamb_coupled(k: Block, flags: Flags) -> None:
    k.grad = fma(k.weight_decay, k.param, k.grad)
    k.weight_decay = 0.0
    LAMB.body(k, flags)


def _lamb_coupled_apply(k: Block, flags: Flags) -> None:
    assert LAMB.apply is not None
    k.weight_decay = 0.0
    LAMB.apply(k, flags)


def _without(rule: Described, flag: str) -> Callable[[Block, Flags], None]:
    return lambda k, flags: rule.body(k, flags - {flag})


OTHERWISE: list[tuple[Described, str, dict[str, Any]]] = [
    (ADAMW, "decay last", {"body": _decay_last}),
    (ADAMW, "decay in the gradient", {"body": _coupled}),
    (ADAM, "decay after the step", {"body": _decay_after(ADAM)}),
    (SGD, "decay after the step", {"body": _decay_after(SGD)}),
    (ADAGRAD, "decay after the step", {"body": _decay_after(ADAGRAD)}),
    (LION, "decay last", {"body": _lion_decay_last}),
    (LION, "momentum before the direction", {"body": _lion_momentum_first}),
    (LAMB, "decay after the norms", {"body": _lamb_norms_first}),
    (LAMB, "decay in the gradient", {"body": _lamb_coupled, "apply": _lamb_coupled_apply}),
]
FLAGS = [
    (ADAMW, "amsgrad"),
    (ADAMW, "maximize"),
    (SGD, "momentum"),
    (SGD, "nesterov"),
    (ADAGRAD, "maximize"),
]

# All


@dataclass(frozen=True)
class Wrong:
    """A rule with a fault, and what it needs for the fault to be there."""

    rule: Described
    base: str
    """The right rule's name."""
    scalar: str = ""
    """The scalar that is scaled, which the kernel has to read."""
    flag: str = ""
    """The flag that the body does without, which has to be set."""


def _all() -> Iterator[tuple[str, Wrong]]:
    for rule in tuple(RULES.values()):
        for name in rule.scalars:
            yield f"{rule.name}.{name} scaled", Wrong(_scaled(rule, name), rule.name, scalar=name)
    for rule, what, made in DROPPED:
        yield f"{rule.name} without {what}", Wrong(_dropped(rule, made), rule.name)
    for rule, what, change in OTHERWISE:
        own = f"{rule.name}_{what.replace(' ', '_')}"
        yield f"{rule.name}, {what}", Wrong(replace(rule, name=own, **change), rule.name)
    for rule, flag in FLAGS:
        faulty = replace(rule, name=f"{rule.name}_without_{flag}", body=_without(rule, flag))
        yield f"{rule.name} without {flag}", Wrong(faulty, rule.name, flag=flag)


WRONG = dict(_all())


def register() -> None:
    """Make them rules in this process, by their keys here and by their own names."""
    for key, wrong in WRONG.items():
        RULES[key] = wrong.rule
        RULES.setdefault(wrong.rule.name, wrong.rule)


def forget() -> None:
    for key, wrong in WRONG.items():
        RULES.pop(key, None)
        if wrong.rule.name != wrong.base:
            RULES.pop(wrong.rule.name, None)
