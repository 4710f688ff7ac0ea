"""LAMB's two launches on one slice, for tests: three parameters, the second in two runs, and their gradients.

    problem = Lamb()
    own = problem.run(call, "cpp")                 measure, sums over runs, apply
    assert not differences(own, problem.by_hand(), 2e-6)

Training with LAMB is in test_lamb.py.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests import by_hand
from tests.kernels import BF16, F32, F64, Targets
from tests.updates import Slice
from zerograph.codegen.render import render
from zerograph.codegen.rules import RULES, Described, Run
from zerograph.codegen.spec import Phase, Update

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "min_coeff": 0.1, "max_coeff": 3.0}
SCALES = (1.0, 9.0, 0.0)
"""Of the parameters at first: trust ratios are within and at both bounds."""


@dataclass
class Lamb:
    """A slice and the gradients of some steps, the same at every call."""

    sizes: tuple[int, int, int] = (160, 2048, 16)
    cut: int = 1040
    """Elements of the second parameter's first run."""
    steps: int = 20
    grad: torch.dtype = F32
    factor: float = 0.5
    eps: float = 1e-8

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self.options: dict[str, Any] = {**RULES["lamb"].defaults, **OPTIONS, "eps": self.eps}
        self.params = [s * torch.randn(n, generator=made) for n, s in zip(self.sizes, SCALES)]
        self.grads = [
            [torch.randn(n, generator=made).to(self.grad) for n in self.sizes]
            for _ in range(self.steps)
        ]

    def by_hand(self) -> Slice:
        """What algorithm 2 of the paper makes of it."""
        mean = [[self.factor * grad.double() for grad in given] for given in self.grads]
        return by_hand.lamb(self.params, mean, self.options)

    def run(self, call: Targets, target: str, rule: str = "lamb") -> Slice:
        """After all steps on a target."""
        own = self._slice()
        control = torch.tensor([self.factor, 1.0])
        first, second, third = itertools.accumulate(self.sizes)
        ends = [0, first, first + self.cut, second, third]
        for step, given in enumerate(self.grads, 1):
            runs = [Run(a, b, 0, step) for a, b in itertools.pairwise(ends)]
            args = (rule, [self.options], runs, own.master)
            sums = call(target, "measure", *args, torch.cat(given), own.states, control)
            of_params = torch.stack([sums[0], sums[1] + sums[2], sums[3]])
            call(target, "apply", *args, own.states, own.low, control, of_params[[0, 1, 1, 2]])
        return own

    def reference(self, rule: str = "lamb") -> Slice:
        """The same rule rendered to float64 numpy, on each parameter."""
        described = RULES[rule]
        measure, apply = (_rendered(described, phase) for phase in ("measure", "apply"))
        parts: list[list[Any]] = []
        for i, param in enumerate(self.params):
            param, first, second = param.double().numpy(), *np.zeros((2, len(param)))
            for step, given in enumerate(self.grads, 1):
                row = described.row(self.options, step)
                grad = self.factor * given[i].double().numpy()
                (first, second), change = measure(row, grad, param, first, second)
                trust = _trust(described, row, param, change)
                (param,) = apply(row, trust, param, first, second)
            parts.append([param, first, second])
        master, first, second = (torch.from_numpy(np.concatenate(own)) for own in zip(*parts))
        return Slice(master, {"exp_avg": first, "exp_avg_sq": second})

    def _slice(self) -> Slice:
        master = torch.cat(self.params)
        states = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        return Slice(master, states, master.to(BF16))


def _rendered(rule: Described, phase: Phase) -> Any:
    spec = Update(rule.name, frozenset(), F64, F64, None, False, phase)
    made: dict[str, Any] = {}
    exec(render(spec, "numpy"), made)
    return made[spec.name]


def _trust(rule: Described, row: list[float], param: Any, change: Any) -> float:
    """|param| / |change| within the bounds in the table of scalars; 1 where either is 0."""
    norms = [float(np.linalg.norm(x)) for x in (param, change)]
    if 0.0 in norms:
        return 1.0
    low, high = (row[rule.scalars.index(name)] for name in ("min_coeff", "max_coeff"))
    return min(max(norms[0] / norms[1], low), high)
