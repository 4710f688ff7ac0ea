"""Optimizer rules, each described once: options, states, host scalars and the body on elements.

    ADAMW.scalars            names of the columns of the table of scalars
    ADAMW.host(options, 3)   one row of it for the third step, float64 on the host
    ADAMW.body(k, flags)     what happens to each element; see expr.py

Options that change the code (amsgrad, nesterov, maximize, whether there is momentum) are `flags`; every
other option is a number in the table, so that a schedule changes no kernel. Operations are in the
order of torch's unfused CPU loop, with its fused multiply-adds. Printing is expr.py's, kernels are spec.py's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zerograph.codegen.expr import Block, fma, lerp, maximum, sign, sqrt

Options = Mapping[str, Any]
Flags = frozenset[str]
TINY = 2.0**-126
"""The smallest normal number of fp32: smaller ones may be 0 in a kernel."""


@dataclass(frozen=True)
class Run:
    """A range of a slice whose parameters share one group and one step count."""

    start: int
    stop: int
    group: int
    step: int
    """The number of this update for the range's parameters, from 1."""


@dataclass(frozen=True)
class Kind:
    """What a plan says of an optimizer. `scalars` names the columns of the table of scalars."""

    name: str
    defaults: Mapping[str, Any]
    states: Callable[[Mapping[str, Any]], tuple[str, ...]]
    """State slices that it keeps with the given options."""
    scalars: tuple[str, ...]


@dataclass(frozen=True)
class Described(Kind):
    """A rule of which kernels are made. States are named as torch names them."""

    host: Callable[[Options, int], Mapping[str, float]]
    """(options, step number from 1) -> scalars by name, in float64."""
    body: Callable[[Block, Flags], None]
    """Reads `param`, `grad`, the states and scalars; assigns `param` and the states."""
    flags: Callable[[Options], Flags]
    """Options that change the code."""
    source: str
    """Where the rule is defined."""
    apply: Callable[[Block, Flags], None] | None = None
    """Of a rule that needs norms of whole parameters: a second launch, which has `trust`, a scalar, and
    assigns `param`; the first assigns the states and `change`, whose norms and the parameters' are taken."""

    divides_by: tuple[str, ...] = ()
    """Options that would make 0 / 0 where gradients are zero, padding included, if they were 0 in fp32."""

    def refused(self, options: Options) -> str:
        """Why a group cannot have these options; empty if it can."""
        for name in self.divides_by:
            if not float(options[name]) >= TINY:
                return (
                    f"{name}={float(options[name])}, and {self.name} needs at least {TINY:.1e} (fp32's "
                    f"smallest normal number): where gradients are zero its change would be 0 / 0, and "
                    f"the norm of all of them NaN; the default is {self.defaults[name]}"
                )
        return ""

    def row(self, options: Options, step: int) -> list[float]:
        """One row of the table of scalars."""
        made = self.host(options, step)
        return [made[name] for name in self.scalars]

    def states_of(self, flags: Flags) -> tuple[str, ...]:
        """The states that a kernel with these flags takes."""
        return self.states({name: name in flags for name in self.defaults})


def _set(*names: str) -> Callable[[Options], Flags]:
    """The names among these whose options are not zero or false."""
    return lambda options: frozenset(name for name in names if options.get(name))


# Adam and AdamW


def _adam_states(options: Options) -> tuple[str, ...]:
    peak = ("max_exp_avg_sq",) if options["amsgrad"] else ()
    return ("exp_avg", "exp_avg_sq", *peak)


def _adam_host(options: Options, step: int) -> dict[str, float]:
    beta1, beta2 = options["betas"]
    unbiased = options.get("bias_correction", True)
    return {
        "keep": 1 - options["lr"] * options["weight_decay"],
        "weight_decay": options["weight_decay"],
        "weight": 1 - beta1,
        "beta2": beta2,
        "fresh": 1 - beta2,
        "unbias": (1 - beta2**step) ** 0.5 if unbiased else 1.0,
        "eps": options["eps"],
        "rate": -options["lr"] / (1 - beta1**step if unbiased else 1.0),
    }


def _moments(k: Block, flags: Flags) -> None:
    """Both moments, and the step from them."""
    k.exp_avg = lerp(k.exp_avg, k.grad, k.weight)
    k.exp_avg_sq = fma(k.fresh * k.grad, k.grad, k.exp_avg_sq * k.beta2)
    k.square = k.exp_avg_sq
    if "amsgrad" in flags:
        k.max_exp_avg_sq = maximum(k.max_exp_avg_sq, k.exp_avg_sq)
        k.square = k.max_exp_avg_sq
    k.root = sqrt(k.square) / k.unbias + k.eps
    k.param = k.param + k.rate * k.exp_avg / k.root


def _adamw(k: Block, flags: Flags) -> None:
    if "maximize" in flags:
        k.grad = -k.grad
    k.param = k.param * k.keep
    _moments(k, flags)


def _adam(k: Block, flags: Flags) -> None:
    if "maximize" in flags:
        k.grad = -k.grad
    k.grad = fma(k.weight_decay, k.param, k.grad)
    _moments(k, flags)


_ADAM_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
}
_ADAM_SCALARS = ("weight", "beta2", "fresh", "unbias", "eps", "rate")

ADAMW = Described(
    "adamw",
    _ADAM_DEFAULTS,
    _adam_states,
    ("keep", *_ADAM_SCALARS),
    host=_adam_host,
    body=_adamw,
    flags=_set("amsgrad", "maximize"),
    source="decoupled weight decay, arXiv:1711.05101 algorithm 2",
)
ADAM = Described(
    "adam",
    _ADAM_DEFAULTS,
    _adam_states,
    ("weight_decay", *_ADAM_SCALARS),
    host=_adam_host,
    body=_adam,
    flags=_set("amsgrad", "maximize"),
    source="Adam with L2 regularisation, arXiv:1412.6980 algorithm 1",
)


# SGD


def _sgd_host(options: Options, step: int) -> dict[str, float]:
    """At the first step the buffer becomes the gradient: nothing is kept, all is fresh."""
    first = step == 1
    return {
        "weight_decay": options["weight_decay"],
        "kept": 0.0 if first else options["momentum"],
        "fresh": 1.0 if first else 1 - options["dampening"],
        "momentum": options["momentum"],
        "rate": -options["lr"],
    }


def _sgd(k: Block, flags: Flags) -> None:
    if "maximize" in flags:
        k.grad = -k.grad
    k.grad = fma(k.weight_decay, k.param, k.grad)
    if "momentum" in flags:
        k.momentum_buffer = fma(k.fresh, k.grad, k.momentum_buffer * k.kept)
        if "nesterov" in flags:
            k.grad = fma(k.momentum, k.momentum_buffer, k.grad)
        else:
            k.grad = k.momentum_buffer
    k.param = fma(k.rate, k.grad, k.param)


SGD = Described(
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
    ("weight_decay", "kept", "fresh", "momentum", "rate"),
    host=_sgd_host,
    body=_sgd,
    flags=_set("momentum", "nesterov", "maximize"),
    source="SGD as torch.optim.SGD defines it: momentum times buffer plus gradient",
)


# Adagrad


def _adagrad_host(options: Options, step: int) -> dict[str, float]:
    """At the first step the sum starts from its initial value, whatever it was."""
    first = step == 1
    return {
        "weight_decay": options["weight_decay"],
        "kept": 0.0 if first else 1.0,
        "initial": options["initial_accumulator_value"] if first else 0.0,
        "eps": options["eps"],
        "rate": -options["lr"] / (1 + (step - 1) * options["lr_decay"]),
    }


def _adagrad(k: Block, flags: Flags) -> None:
    if "maximize" in flags:
        k.grad = -k.grad
    k.grad = fma(k.weight_decay, k.param, k.grad)
    k.sum = fma(k.grad, k.grad, k.sum * k.kept + k.initial)
    k.root = sqrt(k.sum) + k.eps
    k.param = k.param + k.rate * k.grad / k.root


ADAGRAD = Described(
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
    ("weight_decay", "kept", "initial", "eps", "rate"),
    host=_adagrad_host,
    body=_adagrad,
    flags=_set("maximize"),
    source="Adagrad as torch.optim.Adagrad defines it, with L2 regularisation",
)


# Lion


def _lion_host(options: Options, step: int) -> dict[str, float]:
    beta1, beta2 = options["betas"]
    return {
        "keep": 1 - options["lr"] * options["weight_decay"],
        "beta1": beta1,
        "fresh1": 1 - beta1,
        "beta2": beta2,
        "fresh2": 1 - beta2,
        "rate": -options["lr"],
    }


def _lion(k: Block, flags: Flags) -> None:
    k.direction = fma(k.fresh1, k.grad, k.exp_avg * k.beta1)
    k.param = fma(k.rate, sign(k.direction), k.param * k.keep)
    k.exp_avg = fma(k.fresh2, k.grad, k.exp_avg * k.beta2)


LION = Described(
    "lion",
    {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0},
    lambda options: ("exp_avg",),
    ("keep", "beta1", "fresh1", "beta2", "fresh2", "rate"),
    host=_lion_host,
    body=_lion,
    flags=_set(),
    source="Lion with decoupled weight decay, arXiv:2302.06675 algorithm 2",
)

# LAMB


def _lamb_host(options: Options, step: int) -> dict[str, float]:
    beta1, beta2 = options["betas"]
    unbiased = options["bias_correction"]
    return {
        "weight_decay": options["weight_decay"],
        "weight": 1 - beta1,
        "beta2": beta2,
        "fresh": 1 - beta2,
        "correct": 1 / (1 - beta1**step) if unbiased else 1.0,
        "unbias": (1 - beta2**step) ** 0.5 if unbiased else 1.0,
        "eps": options["eps"],
        "rate": -options["lr"],
        "min_coeff": options["min_coeff"],
        "max_coeff": options["max_coeff"],
    }


def _lamb_change(k: Block) -> None:
    k.root = sqrt(k.exp_avg_sq) / k.unbias + k.eps
    k.change = fma(k.weight_decay, k.param, k.correct * k.exp_avg / k.root)


def _lamb(k: Block, flags: Flags) -> None:
    k.exp_avg = lerp(k.exp_avg, k.grad, k.weight)
    k.exp_avg_sq = fma(k.fresh * k.grad, k.grad, k.exp_avg_sq * k.beta2)
    _lamb_change(k)


def _lamb_apply(k: Block, flags: Flags) -> None:
    """Computes the change again from the new states, rather than store and read it."""
    _lamb_change(k)
    k.param = fma(k.rate, k.trust * k.change, k.param)


LAMB = Described(
    "lamb",
    {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "max_coeff": 10.0,
        "min_coeff": 0.01,
        "bias_correction": True,
    },
    lambda options: ("exp_avg", "exp_avg_sq"),
    (
        *("weight_decay", "weight", "beta2", "fresh", "correct", "unbias", "eps", "rate"),
        *("min_coeff", "max_coeff"),
    ),
    host=_lamb_host,
    body=_lamb,
    flags=_set(),
    source="LAMB, arXiv:1904.00962 algorithm 2, with bounds of the trust ratio",
    apply=_lamb_apply,
    divides_by=("eps",),
)
"""The trust ratio of a parameter is |param| / |change| within [min_coeff, max_coeff], 1 where either is 0."""

RULES = {rule.name: rule for rule in (ADAMW, ADAM, SGD, ADAGRAD, LION, LAMB)}


def rule_of(label: str) -> Described | None:
    """The rule that a plan names with its flags ("sgd|sgd.momentum"); None for a user's own class."""
    return RULES.get(label.partition("|")[0].partition(".")[0])
