"""How far an update may be from float64: in one step, and after all steps of a problem (updates.py).

Parameters and momenta are within 2e-6 (1 + |p|), sums of squares within 2e-6 of themselves, copies within
a unit in the last place. Two results of exact kernels may be far from float64's, since a rounding
before them is magnified; no bound is widened and no element left out for either:

- Where decay is added to the gradient (Adam, Adagrad) the two may nearly cancel. The sum of its squares is
  then as wrong as the parameter was before the step. So it is compared with one step from the same slice.
- Where Lion's direction is nearly zero, its sign may turn, and the parameter is a whole step away. So the
  parameter has to lie between what momenta a unit in the last place smaller and larger make of it.
"""

from collections.abc import Callable
from typing import Any

import torch

from tests.kernels import F32, F64, VECTORS, unlike
from tests.updates import Problem, Slice, differences

BOUND = 2e-6
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "sum"}
"""States that are sums of squares."""


def wrong_step(problem: Problem, target: str, step: int, before: Slice, own: Slice) -> Any:
    """By tensor, what one step did otherwise than float64 with the same slice and fp32 scalars."""
    fused = target != "torch" or VECTORS  # else decay is rounded before it is added
    return _wrong(
        problem,
        own,
        lambda way: problem.step(step, before, scalars=F32, way=way),
        SQUARES,
        torch.finfo(F32).tiny if fused else 1e-9,
    )


def drift(problem: Problem, own: Slice) -> Any:
    """By tensor, what is otherwise after all steps than in float64 from the first step on."""
    rule = problem.case.rule
    return _wrong(
        problem,
        own,
        lambda way: problem.reference(scalars=F32 if rule == "lion" else F64, way=way),
        SQUARES if rule == "adamw" else set(),
        torch.finfo(F32).tiny,
    )


def _wrong(
    problem: Problem, own: Slice, made: Callable[[int], Slice], squares: set[str], tiny: float
) -> dict[str, Any]:
    expected = made(0)
    if problem.case.rule == "lion":
        ends = made(-1).master, made(1).master
        expected.master = own.master.double().clamp(torch.minimum(*ends), torch.maximum(*ends))
    found = differences(Slice(own.master, own.states), expected, BOUND)
    for name in own.states.keys() & squares:
        found[name] = unlike(own.states[name], expected.states[name], BOUND, tiny)
    if own.low is not None:
        found["low, rounded"] = unlike(own.low, own.master.to(own.low.dtype))
        found["low"] = _units(own.low, expected.master)
    return {name: wrong for name, wrong in found.items() if wrong}


def _units(low: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """Elements more than a unit in the last place away; nearer to 0 than 1e-6, 2e-6 is more than a unit."""
    right = expected.to(low.dtype)
    far = (low.view(torch.int16).int() - right.view(torch.int16).int()).abs() > 1
    far &= (expected.abs() > 1e-6) & expected.isfinite()
    found: list[int] = far.nonzero().flatten()[:5].tolist()
    return found
