"""Optimizer rules: their options, scalars and states, and the torch implementation behind `update`.

A rule works on a flat slice in runs. A run is a range of the slice whose parameters share one group
and one step count; usually that is the whole slice, so that one launch updates a bucket.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """A range of a slice that one launch updates."""

    start: int
    stop: int
    group: int
    step: int
    """The number of this update for the range's parameters, from 1."""


@dataclass(frozen=True)
class Rule:
    """One optimizer. `scalars` names the columns of the table of scalars."""

    name: str
    defaults: Mapping[str, Any]
    states: Callable[[Mapping[str, Any]], tuple[str, ...]]
    """State slices that the rule keeps with the given options."""
    scalars: tuple[str, ...]
    apply: Callable[[Tensor, Tensor, Sequence[Tensor], Mapping[str, Any], int, Tensor | None], None]
    """(master, grad, states, options, step, inverse factor) of one run, in place."""


def _adam(kernel: Callable[..., None]) -> Callable[..., None]:
    def apply(
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        options: Mapping[str, Any],
        step: int,
        divisor: Tensor | None,
    ) -> None:
        beta1, beta2 = options["betas"]
        count = torch.tensor(float(step), device=master.device)
        kernel(
            [master],
            [grad],
            [states[0]],
            [states[1]],
            [],
            [count],
            lr=options["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )

    return apply


def _sgd(
    master: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    options: Mapping[str, Any],
    step: int,
    divisor: Tensor | None,
) -> None:
    torch._fused_sgd_(
        [master],
        [grad],
        list(states),
        weight_decay=options["weight_decay"],
        momentum=options["momentum"],
        lr=options["lr"],
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        maximize=False,
        is_first_step=step == 1,
        grad_scale=divisor,
    )


_ADAM_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_ADAM_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay")

ADAMW = Rule(
    "adamw",
    _ADAM_DEFAULTS,
    lambda options: ("exp_avg", "exp_avg_sq"),
    _ADAM_SCALARS,
    _adam(torch._fused_adamw_),
)
"""Decoupled weight decay, arXiv:1711.05101 algorithm 2."""

ADAM = Rule(
    "adam",
    _ADAM_DEFAULTS,
    lambda options: ("exp_avg", "exp_avg_sq"),
    _ADAM_SCALARS,
    _adam(torch._fused_adam_),
)
"""Adam with L2 regularisation, arXiv:1412.6980 algorithm 1."""

SGD = Rule(
    "sgd",
    {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    lambda options: ("momentum_buffer",) if options["momentum"] else (),
    ("lr", "momentum", "dampening", "weight_decay"),
    _sgd,
)
"""SGD with momentum as torch.optim.SGD defines it (momentum times buffer plus gradient)."""

RULES = {rule.name: rule for rule in (ADAMW, ADAM, SGD)}


def scalar_row(rule: Rule, options: Mapping[str, Any]) -> list[float]:
    """One group's row of the table of scalars, float64 on the host."""
    flat = dict(options)
    if "betas" in flat:
        flat["beta1"], flat["beta2"] = flat["betas"]
    return [float(flat[name]) for name in rule.scalars]


def update(
    rule: Rule,
    groups: Sequence[Mapping[str, Any]],
    runs: Sequence[Run],
    master: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    low: Tensor | None,
    factor: Tensor | None,
) -> None:
    """Apply `rule` to the runs of one slice in place, and store the low-precision copy.

    `grad` is consumed (fused kernels may write it). `factor` multiplies the gradient (clipping).
    """
    divisor = None if factor is None else factor.reciprocal()
    for run in runs:
        part = slice(run.start, run.stop)
        own = [state[part] for state in states]
        rule.apply(master[part], grad[part], own, groups[run.group], run.step, divisor)
        if low is not None:
            low[part].copy_(master[part])
