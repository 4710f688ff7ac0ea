"""Updates of one slice, for tests: rules with options, gradients of some steps, results of each target.

    problem = Problem(CASES[0], size=17, steps=20)
    own = problem.run(call, "cpp")                  what the kernels make of it
    expected = problem.reference()                  what the same rule does, rendered to float64 numpy
    assert not differences(own, expected, 1e-6)

What torch.optim or a paper's formula make of a problem is in by_hand.py, bounds are in bounds.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels import F32, F64, Targets, unlike
from zerograph.codegen.render import render
from zerograph.codegen.rules import RULES, Described, Run
from zerograph.codegen.spec import Update


@dataclass(frozen=True)
class Case:
    """A rule with options that reach all of its code."""

    rule: str
    options: dict[str, Any]
    optimizer: str = ""
    """torch's class; empty where torch has none."""
    name: str = ""

    @property
    def described(self) -> Described:
        return RULES[self.rule]

    @property
    def full(self) -> dict[str, Any]:
        return {**self.described.defaults, **self.options}


_DECAY = {"lr": 1e-2, "weight_decay": 0.1}
CASES = [
    Case("adamw", _DECAY, "AdamW"),
    Case("adamw", {**_DECAY, "amsgrad": True, "maximize": True}, "AdamW", "adamw-amsgrad-maximize"),
    Case("adam", {**_DECAY, "betas": (0.4, 0.9)}, "Adam", "adam-short"),
    Case("sgd", _DECAY, "SGD"),
    Case("sgd", {**_DECAY, "momentum": 0.9, "dampening": 0.2}, "SGD", "sgd-momentum"),
    Case("sgd", {**_DECAY, "momentum": 0.9, "nesterov": True}, "SGD", "sgd-nesterov"),
    Case(
        "adagrad",
        {**_DECAY, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "maximize": True},
        "Adagrad",
    ),
    Case("lion", {**_DECAY, "betas": (0.9, 0.99)}),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name or case.rule)
ODD = [0.0, -0.0, 1e-40, -1e-45, 1e-30, 1e-12, 3e4, np.nan, np.inf, -np.inf]


@dataclass
class Slice:
    """The tensors of one slice."""

    master: Tensor
    states: dict[str, Tensor]
    low: Tensor | None = None

    def clone(self) -> "Slice":
        low = self.low.clone() if self.low is not None else None
        return Slice(self.master.clone(), {k: v.clone() for k, v in self.states.items()}, low)

    def named(self) -> dict[str, Tensor]:
        low = {} if self.low is None else {"low": self.low}
        return {"master": self.master, **self.states, **low}


def differences(own: Slice, expected: Slice, bound: float = 0.0) -> dict[str, Any]:
    """By tensor, elements further away than bound * (1 + |expected|); with no bound, all other bits."""
    pairs, others = own.named(), expected.named()
    assert pairs.keys() == others.keys()
    found = {name: unlike(value, others[name], bound) for name, value in pairs.items()}
    return {name: wrong for name, wrong in found.items() if wrong}


@dataclass
class Problem:
    """A slice and the gradients of some steps, the same at every call."""

    case: Case
    size: int
    steps: int
    grad: torch.dtype = F32
    low: torch.dtype | None = None
    master: torch.dtype = F32
    odd: bool = False
    factor: float = 0.5
    grads: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(self.size)
        self.first = torch.randn(self.size, generator=made, dtype=self.master)
        for _ in range(self.steps):
            grad = torch.randn(self.size, generator=made, dtype=self.master).to(self.grad)
            if self.odd:
                grad[: len(ODD)] = torch.tensor(ODD, dtype=F64).to(self.grad)[: self.size]
            self.grads.append(grad)

    def slice(self) -> Slice:
        """As it is before the first step."""
        names = self.case.described.states(self.case.full)
        low = None if self.low is None else self.first.to(self.low)
        return Slice(self.first.clone(), {n: torch.zeros_like(self.first) for n in names}, low)

    def walk(
        self, call: Targets, target: str, rule: str = "", block: int = 0
    ) -> Iterator[tuple[int, Slice, Slice]]:
        """Of each step its number from 1, the slice before it and the slice after it."""
        own, control = self.slice(), torch.tensor([self.factor, 1.0])
        for step, grad in enumerate(self.grads, 1):
            before, runs = own.clone(), [Run(0, self.size, 0, step)]
            args = ([self.case.full], runs, own.master, grad, own.states, own.low, control)
            call(target, "update", rule or self.case.rule, *args, block=block)
            yield step, before, own

    def run(self, call: Targets, target: str, rule: str = "", block: int = 0) -> Slice:
        """After all steps."""
        *_, (_, _, own) = self.walk(call, target, rule, block)
        return own

    def step(
        self, step: int, before: Slice, rule: str = "", scalars: torch.dtype = F64, way: int = 0
    ) -> Slice:
        """One step in float64 by numpy, with scalars rounded to a dtype.

        `way`, 1 or -1, moves the momentum that it reads by a unit in the last place of fp32, and so by no
        more than what storing it and multiplying it in fp32 may.
        """
        described = RULES[rule or self.case.rule]
        spec = Update(described.name, described.flags(self.case.full), F64, F64)
        made: dict[str, Any] = {}
        exec(render(spec, "numpy"), made)
        row = torch.tensor(described.row(self.case.full, step), dtype=F64).to(scalars).tolist()
        read = {name: value.double() for name, value in before.states.items()}
        if way:
            kept = read["exp_avg"]
            read["exp_avg"] = kept + way * (kept != 0) * (2**-23 * kept.abs() + 2**-148)
        values = [t.numpy() for t in (before.master.double(), *read.values())]
        with np.errstate(all="ignore"):
            mean = self.grads[step - 1].double().numpy() * self.factor
            master, *states = map(torch.from_numpy, made[spec.name](row, mean, *values))
        return Slice(master, dict(zip(spec.states, states)))

    def reference(self, rule: str = "", scalars: torch.dtype = F64, way: int = 0) -> Slice:
        """All steps in float64 by numpy."""
        own = replace(self.slice(), low=None)
        for step in range(1, self.steps + 1):
            own = self.step(step, own, rule, scalars, way)
        return own
