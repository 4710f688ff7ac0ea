"""Kernels of updates beside torch.optim: a hundred steps of each rule, and where they have torch's bits.

torch has no Lion, so its formula in torch operations stands for it.
"""

import pytest

from tests.by_hand import honest
from tests.kernels import F32, F64, TARGETS, Targets, needs_cpp, needs_vectors, unlike
from tests.updates import EACH_CASE, Case, Problem, Slice, differences


@pytest.mark.parametrize("target", [*TARGETS, "numpy"])
@EACH_CASE
def test_updates_follow_torch(call: Targets, case: Case, target: str) -> None:
    """A hundred steps beside torch.optim in fp32; numpy beside float64."""
    problem = Problem(case, 200, 100)
    if target == "numpy":
        assert not differences(problem.reference(), honest(problem, F64), 1e-12)
    else:
        assert not differences(problem.run(call, target), honest(problem, F32), 1e-6)


@needs_vectors
@EACH_CASE
def test_plain_updates_have_torchs_bits(call: Targets, case: Case) -> None:
    """Where nothing can be compiled, an update is what torch's own loop does, to the bit."""
    problem = Problem(case, 1003, 30)
    assert not differences(problem.run(call, "torch"), honest(problem))


@needs_cpp
@needs_vectors
@EACH_CASE
def test_cpp_has_torchs_bits_but_for_the_root(call: Targets, case: Case) -> None:
    """SGD and Lion wholly; of Adam and Adagrad what is computed before a square root.

    The root is correctly rounded here; torch takes MKL's, which is not on every machine. Where
    decay is added to the gradient, what comes after the root is in the states of the next step.
    """
    coupled = case.rule in ("adam", "adagrad")
    problem = Problem(case, 1003, 1 if coupled else 30)
    own, expected = problem.run(call, "cpp"), honest(problem)
    assert not differences(Slice(expected.master, own.states), expected)
    assert not unlike(own.master, expected.master, 0 if case.rule in ("sgd", "lion") else 1e-6)
