"""Adam and AdamW, and the moments and scalars that LAMB shares with them.

exp_avg     <- beta1 exp_avg + (1 - beta1) grad
exp_avg_sq  <- beta2 exp_avg_sq + (1 - beta2) grad^2
param       <- param - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
"""

from zerograph.codegen.expr import Block, fma, lerp, maximum, sqrt
from zerograph.codegen.rules.rule import Described, Flags, Options, turn, turn_and_decay


def moment_scalars(options: Options, step: int) -> dict[str, float]:
    """Scalars of both moments; `unbias` corrects the second, by which its root is divided."""
    beta1, beta2 = options["betas"]
    return {
        "weight_decay": options["weight_decay"],
        "weight": 1 - beta1,
        "beta2": beta2,
        "fresh": 1 - beta2,
        "unbias": (1 - beta2**step) ** 0.5 if options.get("bias_correction", True) else 1.0,
        "eps": options["eps"],
    }


def first_correction(options: Options, step: int) -> float:
    """What the first moment is divided by."""
    beta1, _ = options["betas"]
    return 1 - beta1**step if options.get("bias_correction", True) else 1.0


def moments(k: Block) -> None:
    """Both moments, from `grad`."""
    k.exp_avg = lerp(k.exp_avg, k.grad, k.weight)
    k.exp_avg_sq = fma(k.fresh * k.grad, k.grad, k.exp_avg_sq * k.beta2)


def _host(options: Options, step: int) -> dict[str, float]:
    return {
        **moment_scalars(options, step),
        "keep": 1 - options["lr"] * options["weight_decay"],
        "rate": -options["lr"] / first_correction(options, step),
    }


def _states(options: Options) -> tuple[str, ...]:
    peak = ("max_exp_avg_sq",) if options["amsgrad"] else ()
    return ("exp_avg", "exp_avg_sq", *peak)


def _step(k: Block, flags: Flags) -> None:
    moments(k)
    k.square = k.exp_avg_sq
    if "amsgrad" in flags:
        k.max_exp_avg_sq = maximum(k.max_exp_avg_sq, k.exp_avg_sq)
        k.square = k.max_exp_avg_sq
    k.root = sqrt(k.square) / k.unbias + k.eps
    k.param = k.param + k.rate * k.exp_avg / k.root


def _adamw(k: Block, flags: Flags) -> None:
    turn(k, flags)
    k.param = k.param * k.keep
    _step(k, flags)


def _adam(k: Block, flags: Flags) -> None:
    turn_and_decay(k, flags)
    _step(k, flags)


_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
}
_SCALARS = ("weight", "beta2", "fresh", "unbias", "eps", "rate")
_SWITCHES = ("amsgrad", "maximize")

ADAMW = Described(
    "adamw",
    _DEFAULTS,
    _states,
    ("keep", *_SCALARS),
    host=_host,
    body=_adamw,
    switches=_SWITCHES,
    source="decoupled weight decay, arXiv:1711.05101 algorithm 2",
)
ADAM = Described(
    "adam",
    _DEFAULTS,
    _states,
    ("weight_decay", *_SCALARS),
    host=_host,
    body=_adam,
    switches=_SWITCHES,
    source="Adam with L2 regularisation, arXiv:1412.6980 algorithm 1",
)
