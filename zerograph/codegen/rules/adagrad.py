"""Adagrad, as torch has it.

sum    <- sum + grad^2
param  <- param - lr / (1 + (step - 1) lr_decay) grad / (sqrt(sum) + eps)
"""

from zerograph.codegen.expr import Block, fma, sqrt
from zerograph.codegen.rules.rule import Described, Flags, Options, turn_and_decay


def _host(options: Options, step: int) -> dict[str, float]:
    """At the first step the sum starts from its initial value, whatever it was."""
    first = step == 1
    return {
        "weight_decay": options["weight_decay"],
        "kept": 0.0 if first else 1.0,
        "initial": options["initial_accumulator_value"] if first else 0.0,
        "eps": options["eps"],
        "rate": -options["lr"] / (1 + (step - 1) * options["lr_decay"]),
    }


def _body(k: Block, flags: Flags) -> None:
    turn_and_decay(k, flags)
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
    host=_host,
    body=_body,
    switches=("maximize",),
    source="Adagrad as torch.optim.Adagrad defines it, with L2 regularisation",
)
