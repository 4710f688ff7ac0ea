"""Lion: the sign of a mean of gradient and momentum.

param    <- (1 - lr weight_decay) param - lr sign(beta1 exp_avg + (1 - beta1) grad)
exp_avg  <- beta2 exp_avg + (1 - beta2) grad
"""

from zerograph.codegen.expr import Block, fma, sign
from zerograph.codegen.rules.rule import Described, Flags, Options


def _host(options: Options, step: int) -> dict[str, float]:
    beta1, beta2 = options["betas"]
    return {
        "keep": 1 - options["lr"] * options["weight_decay"],
        "beta1": beta1,
        "fresh1": 1 - beta1,
        "beta2": beta2,
        "fresh2": 1 - beta2,
        "rate": -options["lr"],
    }


def _body(k: Block, flags: Flags) -> None:
    k.direction = fma(k.fresh1, k.grad, k.exp_avg * k.beta1)
    k.param = fma(k.rate, sign(k.direction), k.param * k.keep)
    k.exp_avg = fma(k.fresh2, k.grad, k.exp_avg * k.beta2)


LION = Described(
    "lion",
    {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0},
    lambda options: ("exp_avg",),
    ("keep", "beta1", "fresh1", "beta2", "fresh2", "rate"),
    host=_host,
    body=_body,
    source="Lion with decoupled weight decay, arXiv:2302.06675 algorithm 2",
)
