"""Whether an optimizer class is elementwise: run it on whole parameters and on flat parts of them.

A rank holds flat pieces of parameters. A class whose update of an element depends on that element and
its gradient alone does the same on pieces; one that looks at rows, norms or shapes (Muon, LAMB) does
not, and no option can make it. The two runs are in float64, so that a difference is no rounding.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerograph import compat
from zerograph.errors import PlanError

WHOLE = ("Adafactor", "LAMB", "LARS", "LBFGS", "Muon", "Shampoo", "DistributedShampoo", "SOAP")
"""Classes, in any case of letters, that need whole matrices or whole vectors."""
STEPS = 8  # RAdam changes its formula at the sixth step
SHAPES = ((12, 8), (10,))
CUTS = (40, 3)  # where each parameter is cut in two
TOLERANCE = 1e-9  # of the largest change of any element

Group = Mapping[str, Any]


def elementwise_states(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the states that `optimizer` keeps for each element, once it is proved elementwise.

    Every distinct set of options is tried. Raises PlanError with the reason if it is not elementwise.
    """
    kind = type(optimizer).__name__
    if any(c.__name__.lower() in map(str.lower, WHOLE) for c in type(optimizer).__mro__):
        raise PlanError(f"optimizer={kind}: it needs whole matrices or vectors, {_REASON}")
    if _needs_closure(optimizer):
        raise PlanError(
            f"optimizer={kind}: its step() needs an argument (a closure that computes the loss "
            f"again), and the engine has computed the gradients by then; {_MEND}"
        )
    names: dict[str, None] = {}
    tried: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        options = _options(group)
        if not any(repr(options) == repr(other) for other in tried):
            tried.append(options)
            names.update(dict.fromkeys(_try(optimizer, options)))
    return tuple(names)


_MEND = "use an elementwise optimizer (torch.optim.AdamW, RMSprop, ...)"
_REASON = f"and a rank holds flat parts of them; {_MEND}"


def like(optimizer: Optimizer, groups: Sequence[Group]) -> Optimizer:
    """An optimizer of the same class and attributes, on other groups, without state or hooks."""
    own = compat.optimizer_hooks() | {"state", "param_groups", *REFUSED}
    kept = {k: copy.deepcopy(v) for k, v in vars(optimizer).items() if k not in own}
    made: Optimizer = type(optimizer).__new__(type(optimizer))
    usable = [{**group, **_flags(group)} for group in groups]
    made.__setstate__({**kept, "state": defaultdict(dict), "param_groups": usable})
    return made


REFUSED = ("step", "add_param_group", "state_dict", "load_state_dict")
"""Methods that an engine's optimizer, and the user's instance behind it, refuse."""


def _flags(group: Group) -> dict[str, Any]:
    """Flags that choose among torch's kernels have no effect here."""
    return {
        name: value for name, value in (("capturable", False), ("fused", None)) if name in group
    }


def _needs_closure(optimizer: Optimizer) -> bool:
    _, *parameters = inspect.signature(type(optimizer).step).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in named for p in parameters)


def _options(group: Group) -> dict[str, Any]:
    """A group's options, with a rate that moves parameters if a schedule starts at zero."""
    made = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    if "lr" in made and float(made["lr"]) == 0:
        made["lr"] = float(made.get("initial_lr") or made.get("max_lr") or 1e-3)
    return made


def _try(optimizer: Optimizer, options: Group) -> list[str]:
    """Run whole and in parts; answer the states that are one value an element."""
    kind = type(optimizer).__name__
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    whole = [nn.Parameter(value.clone()) for value in start]
    parts = [
        [nn.Parameter(piece.clone()) for piece in value.flatten().tensor_split([cut])]
        for value, cut in zip(start, CUTS)
    ]
    try:
        one = like(optimizer, [{**options, "params": whole}])
        others = [like(optimizer, [{**options, "params": pieces}]) for pieces in parts]
        for step in range(STEPS):
            scale = 10.0 ** (step % 3 - 1)
            for parameter, pieces in zip(whole, parts):
                shape = parameter.shape
                grad = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
                parameter.grad = grad.clone()
                for piece, own in zip(pieces, grad.flatten().tensor_split([pieces[0].numel()])):
                    piece.grad = own.clone()
            for each in (one, *others):
                each.step()
    except Exception as error:
        raise PlanError(
            f"optimizer={kind}: it fails on a {SHAPES[0][0]}x{SHAPES[0][1]} parameter or on flat parts "
            f"of it ({type(error).__name__}: {error}), so it cannot be used; {_MEND}"
        ) from error
    _compare(kind, start, whole, parts)
    return [
        name
        for name, value in one.state[whole[0]].items()
        if isinstance(value, Tensor) and (value.shape, value.dtype) == (SHAPES[0], torch.float64)
    ]


def _compare(
    kind: str,
    start: Sequence[Tensor],
    whole: Sequence[nn.Parameter],
    parts: Sequence[Sequence[nn.Parameter]],
) -> None:
    for before, parameter, pieces in zip(start, whole, parts):
        together = torch.cat([piece.detach() for piece in pieces]).view_as(before)
        moved = (parameter.detach() - before).abs().max()
        error = (parameter.detach() - together).abs().max()
        shape = "x".join(map(str, before.shape)) + ("" if before.dim() > 1 else "-element")
        if not moved > 0:
            raise PlanError(
                f"optimizer={kind}: eight of its steps did not move a {shape} parameter, so nothing is "
                f"known of it; {_MEND}"
            )
        if not error <= TOLERANCE * moved:
            raise PlanError(
                f"optimizer={kind}: it updates a {shape} parameter differently whole and in flat "
                f"parts, so it needs whole parameters, {_REASON}"
            )
