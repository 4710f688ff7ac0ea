"""LAMB's two launches: beside algorithm 2 in float64, and the targets beside each other."""

import pytest
import torch

from tests.kernels import BF16, BLOCK, EACH_TARGET, F32, Targets, needs_cpp, needs_triton, values
from tests.lamb import OPTIONS, Lamb
from tests.updates import Slice, differences
from zerograph.codegen.rules import RULES, Run


@EACH_TARGET
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lamb_follows_algorithm_2(call: Targets, target: str, dtype: torch.dtype) -> None:
    """Parameters in pieces, one of zeros, trust ratios within and at their bounds."""
    problem = Lamb(grad=dtype)
    own = problem.run(call, target)
    assert own.low is not None and torch.equal(own.low, own.master.to(BF16))
    assert not differences(Slice(own.master, own.states), problem.by_hand(), 2e-6)


def test_lambs_reference_is_algorithm_2() -> None:
    problem = Lamb()
    assert not differences(problem.reference(), problem.by_hand(), 1e-12)


@needs_triton
@needs_cpp
def test_both_launches_of_lamb_have_the_same_bits(call: Targets) -> None:
    size = 3 * BLOCK + 16
    master, grad, norms = values(size, F32), values(size, BF16), torch.tensor([[4.0, 5.0]]).double()
    states = {"exp_avg": values(size, F32) / 9, "exp_avg_sq": values(size, F32).abs()}
    options, runs = {**RULES["lamb"].defaults, **OPTIONS}, [Run(0, size, 0, 5)]
    made = {}
    for target in ("triton", "cpp", "torch"):
        own = Slice(master, states, master.bfloat16()).clone()
        args = ([options], runs, own.master, grad, own.states, None)
        sums = call(target, "measure", "lamb", *args)
        args = ([options], runs, own.master, own.states, own.low, None, norms)
        call(target, "apply", "lamb", *args)
        made[target] = own, sums
    (first, sums), (second, others), (_, plain) = made.values()
    assert not differences(first, second)
    assert ((others - sums).abs() <= 1e-6 * sums).all()
    assert ((plain - sums).abs() <= 1e-6 * sums).all()
