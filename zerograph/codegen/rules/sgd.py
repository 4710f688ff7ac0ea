"""SGD, with momentum and Nesterov's momentum as torch has them.

momentum_buffer  <- momentum momentum_buffer + (1 - dampening) grad
param            <- param - lr (momentum_buffer, or grad + momentum momentum_buffer with nesterov)
"""

from zerograph.codegen.expr import Block, fma
from zerograph.codegen.rules.rule import Described, Flags, Options, turn_and_decay


def _host(options: Options, step: int) -> dict[str, float]:
    """At the first step the buffer becomes the gradient: nothing is kept, all is fresh."""
    first = step == 1
    return {
        "weight_decay": options["weight_decay"],
        "kept": 0.0 if first else options["momentum"],
        "fresh": 1.0 if first else 1 - options["dampening"],
        "momentum": options["momentum"],
        "rate": -options["lr"],
    }


def _body(k: Block, flags: Flags) -> None:
    turn_and_decay(k, flags)
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
    host=_host,
    body=_body,
    switches=("momentum", "nesterov", "maximize"),
    source="SGD as torch.optim.SGD defines it: momentum times buffer plus gradient",
)
