"""Optimizer rules: their options, scalars and states, and the torch implementation behind `update`.

A rule works on a flat slice in runs. A run is a range of the slice whose parameters share one group
and one step count; usually that is the whole slice, so that one launch updates a bucket.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zerograph.codegen.rules import Kind, Run

Apply = Callable[[Tensor, Tensor, Sequence[Tensor], Mapping[str, Any], int], None]
"""(master, grad, states, options, step number), in place; all slices of one length."""

CHUNK = 1 << 15
"""Elements updated at a time, so that a rule's several passes over them stay in the cache."""


@dataclass(frozen=True)
class Rule(Kind):
    """An optimizer that `update` applies. States are named as torch names them."""

    apply: Apply
    temporaries: int
    """Pieces of CHUNK elements that `apply` makes and holds at once at most, with weight decay."""


def _adam(decoupled: bool) -> Apply:
    """Adam in the operation order of torch's unfused loop, whose bits it then has."""

    def apply(
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        options: Mapping[str, Any],
        step: int,
    ) -> None:
        beta1, beta2 = options["betas"]
        lr, decay = options["lr"], options["weight_decay"]
        mean, square, *peak = states
        grad = -grad if options["maximize"] else grad
        if decay and decoupled:
            master.mul_(1 - lr * decay)
        elif decay:
            grad = grad.add(master, alpha=decay)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if options["amsgrad"]:
            square = torch.maximum(peak[0], square, out=peak[0])
        unbias = (1 - beta2**step) ** 0.5
        root = (square.sqrt() / unbias).add_(options["eps"])
        master.addcdiv_(mean, root, value=-lr / (1 - beta1**step))

    return apply


def _sgd(
    master: Tensor, grad: Tensor, states: Sequence[Tensor], options: Mapping[str, Any], step: int
) -> None:
    momentum, decay = options["momentum"], options["weight_decay"]
    grad = -grad if options["maximize"] else grad
    if decay:
        grad = grad.add(master, alpha=decay)
    if momentum:
        (buffer,) = states
        if step == 1:
            buffer.copy_(grad)
        else:
            buffer.mul_(momentum).add_(grad, alpha=1 - options["dampening"])
        grad = grad.add(buffer, alpha=momentum) if options["nesterov"] else buffer
    master.add_(grad, alpha=-options["lr"])


def _adagrad(
    master: Tensor, grad: Tensor, states: Sequence[Tensor], options: Mapping[str, Any], step: int
) -> None:
    (total,) = states
    grad = -grad if options["maximize"] else grad
    if step == 1:
        total.fill_(options["initial_accumulator_value"])
    if options["weight_decay"]:
        grad = grad.add(master, alpha=options["weight_decay"])
    rate = options["lr"] / (1 + (step - 1) * options["lr_decay"])
    total.addcmul_(grad, grad, value=1)
    master.addcdiv_(grad, total.sqrt().add_(options["eps"]), value=-rate)


def _lion(
    master: Tensor, grad: Tensor, states: Sequence[Tensor], options: Mapping[str, Any], step: int
) -> None:
    (mean,) = states
    (beta1, beta2), lr = options["betas"], options["lr"]
    direction = mean.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
    master.mul_(1 - lr * options["weight_decay"]).add_(direction, alpha=-lr)
    mean.mul_(beta2).add_(grad, alpha=1 - beta2)


def _adam_states(options: Mapping[str, Any]) -> tuple[str, ...]:
    peak = ("max_exp_avg_sq",) if options["amsgrad"] else ()
    return ("exp_avg", "exp_avg_sq", *peak)


_ADAM_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
}
_ADAM_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay")

ADAMW = Rule(
    "adamw",
    _ADAM_DEFAULTS,
    _adam_states,
    _ADAM_SCALARS,
    _adam(decoupled=True),
    temporaries=2,
)
"""Decoupled weight decay, arXiv:1711.05101 algorithm 2."""

ADAM = Rule(
    "adam",
    _ADAM_DEFAULTS,
    _adam_states,
    _ADAM_SCALARS,
    _adam(decoupled=False),
    temporaries=3,
)
"""Adam with L2 regularisation, arXiv:1412.6980 algorithm 1."""

SGD = Rule(
    "sgd",
    {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "maximize": False,
    },
    lambda options: ("momentum_buffer",) if options["momentum"] else (),
    ("lr", "momentum", "dampening", "weight_decay"),
    _sgd,
    temporaries=1,
)
"""SGD with momentum as torch.optim.SGD defines it (momentum times buffer plus gradient)."""

ADAGRAD = Rule(
    "adagrad",
    {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "eps": 1e-10,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "maximize": False,
    },
    lambda options: ("sum",),
    ("lr", "lr_decay", "eps", "weight_decay"),
    _adagrad,
    temporaries=2,
)
"""Adagrad as torch.optim.Adagrad defines it, with L2 regularisation."""

LION = Rule(
    "lion",
    {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0},
    lambda options: ("exp_avg",),
    ("lr", "beta1", "beta2", "weight_decay"),
    _lion,
    temporaries=1,
)
"""Lion with decoupled weight decay, arXiv:2302.06675 algorithm 2."""

RULES = {rule.name: rule for rule in (ADAMW, ADAM, SGD, ADAGRAD, LION)}


def scalar_row(rule: Kind, options: Mapping[str, Any]) -> list[float]:
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

    Gradients are multiplied by `factor` (clipping, loss scale) in the master's dtype.
    """
    for run in runs:
        for start in range(run.start, run.stop, CHUNK):
            part = slice(start, min(start + CHUNK, run.stop))
            own = [state[part] for state in states]
            mean = grad[part].to(master.dtype)
            if factor is not None:
                mean.mul_(factor)
            rule.apply(master[part], mean, own, groups[run.group], run.step)
            if low is not None:
                low[part].copy_(master[part])
