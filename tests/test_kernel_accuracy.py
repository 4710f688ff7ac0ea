"""Kernels of updates beside float64 in every step, and the targets beside each other, bit for bit."""

import itertools

from tests.bounds import drift, wrong_step
from tests.kernels import BF16, BLOCK, EACH_TARGET, F16, F32, F64, Targets, needs_cpp, needs_triton
from tests.updates import EACH_CASE, Case, Problem, differences
from zerograph.codegen import updates

SIZES = [1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1]


@EACH_TARGET
@EACH_CASE
def test_updates_follow_float64(call: Targets, case: Case, target: str) -> None:
    """Twenty steps, each and all, with bf16 gradients and copies, zeros, subnormals, NaN and infinities."""
    tile = updates.CPU_TILE
    sizes = SIZES if target == "triton" else [*SIZES, tile - 1, tile, tile + 1]
    for size in sizes:
        problem = Problem(case, size, 20, BF16, BF16, odd=True)
        for step, before, own in problem.walk(call, target):
            assert not wrong_step(problem, target, step, before, own), (size, step)
        assert not drift(problem, own), size


@needs_triton
@needs_cpp
@EACH_CASE
def test_interpreter_and_cpp_have_the_same_bits(call: Targets, case: Case) -> None:
    kinds = [(F32, None), (F32, BF16), (BF16, BF16), (F16, F16)]
    for size, (grad, low) in itertools.product([17, BLOCK + 1], kinds):
        problem = Problem(case, size, 5, grad, low, odd=True)
        own, other = problem.run(call, "triton"), problem.run(call, "cpp")
        assert not differences(own, other), (size, grad, low)


@needs_triton
@needs_cpp
@EACH_CASE
def test_a_million_elements(call: Targets, case: Case) -> None:
    problem = Problem(case, 1 << 20, 1, BF16, BF16)
    own = problem.run(call, "triton", block=1 << 18)
    assert not differences(own, problem.run(call, "cpp"))
    assert not wrong_step(problem, "triton", 1, problem.slice(), own)


@needs_triton
@needs_cpp
@EACH_CASE
def test_double_models(call: Targets, case: Case) -> None:
    problem = Problem(case, 100, 20, F64, None, F64)
    expected = problem.reference()
    for target in ("triton", "cpp", "torch"):
        assert not differences(problem.run(call, target), expected, 1e-13), target
