"""What an update touches of a slice: its runs, each with its group's options and step, or nothing."""

import math

import torch

from tests.kernels import BF16, EACH_TARGET, F32, Targets, unlike
from tests.updates import CASES, Problem, Slice, differences
from zerograph.codegen.rules import Run
from zerograph.codegen.spec import Update


@EACH_TARGET
def test_runs_leave_the_rest_alone(call: Targets, target: str) -> None:
    """Groups with other options, one of them with other code, each with its own step; gaps stay."""
    groups = [{**CASES[0].full, "lr": lr, "maximize": lr > 0.1} for lr in (0.01, 0.2, 0.03)]
    size, runs = 4096, [Run(0, 32, 0, 1), Run(64, 2064, 1, 1), Run(2064, 4000, 2, 7)]
    master, grad = torch.linspace(-1, 1, size), torch.linspace(2, 3, size)
    states = {name: torch.full((size,), 0.25) for name in ("exp_avg", "exp_avg_sq")}
    low = torch.full((size,), 9.0, dtype=BF16)
    own = Slice(master.clone(), {k: v.clone() for k, v in states.items()}, low.clone())
    call(target, "update", "adamw", groups, runs, own.master, grad, own.states, own.low, None)
    expected = Slice(master, states, low)
    for run in runs:
        part = slice(run.start, run.stop)
        views = {name: state[part] for name, state in states.items()}
        alone = [Run(0, run.stop - run.start, run.group, run.step)]
        args = (groups, alone, master[part], grad[part], views, low[part], None)
        call("torch", "update", "adamw", *args)
    assert not unlike(own.master, expected.master, 1e-6)
    for gap in (slice(32, 64), slice(4000, size)):
        for value in own.named().values():
            assert (value[gap] == value[gap.start]).all() or value is own.master
        assert torch.equal(own.master[gap], torch.linspace(-1, 1, size)[gap])
        assert (own.low[gap] == 9).all()  # type: ignore[index]


@EACH_TARGET
def test_an_update_that_does_not_apply_touches_nothing(call: Targets, target: str) -> None:
    problem = Problem(CASES[1], 1000, 1, BF16, BF16)
    own = problem.slice()
    before = own.clone()
    runs = [Run(0, 1000, 0, 1)]
    grad = torch.full((1000,), math.nan, dtype=BF16)
    args = ([problem.case.full], runs, own.master, grad, own.states, own.low)
    call(target, "update", "adamw", *args, torch.tensor([math.nan, 0.0]))
    assert not differences(own, before)


def test_an_update_moves_what_it_must() -> None:
    assert Update("adamw", frozenset(), BF16, F32, BF16).nbytes == 28
    assert Update("adamw", frozenset(), F32, F32).nbytes == 28
    assert Update("adamw", frozenset({"amsgrad"}), BF16, F32, BF16).nbytes == 36
    assert Update("sgd", frozenset(), BF16, F32, BF16).nbytes == 12
