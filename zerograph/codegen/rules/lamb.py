"""LAMB: Adam's change of each parameter, in proportion to the parameter's norm.

    change  = exp_avg / (1 - beta1^step) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps) + weight_decay param
    trust   = |param| / |change| within [min_coeff, max_coeff], 1 where either is 0
    param  <- param - lr trust change

The norms are those of whole parameters, so it has two bodies: the second computes the change again from
the new states, rather than store and read it.
"""

from zerograph.codegen.expr import Block, fma, sqrt
from zerograph.codegen.rules.adam import first_correction, moment_scalars, moments
from zerograph.codegen.rules.rule import Described, Flags, Options


def _host(options: Options, step: int) -> dict[str, float]:
    return {
        **moment_scalars(options, step),
        "correct": 1 / first_correction(options, step),
        "rate": -options["lr"],
        "min_coeff": options["min_coeff"],
        "max_coeff": options["max_coeff"],
    }


def _change(k: Block) -> None:
    k.root = sqrt(k.exp_avg_sq) / k.unbias + k.eps
    k.change = fma(k.weight_decay, k.param, k.correct * k.exp_avg / k.root)


def _body(k: Block, flags: Flags) -> None:
    moments(k)
    _change(k)


def _apply(k: Block, flags: Flags) -> None:
    _change(k)
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
    host=_host,
    body=_body,
    apply=_apply,
    divides_by=("eps",),
    source="LAMB, arXiv:1904.00962 algorithm 2, with bounds of the trust ratio",
)
