"""Generated kernels: each target beside float64, beside the others bit for bit, beside torch.optim.

Triton kernels run in its interpreter (tests/interpreter.py), C++ is compiled, and "torch" is what runs
where there is no compiler. Without Triton or a compiler, their part is skipped.
"""

import importlib.util
import itertools
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.interpreter import Interpreter
from tests.mutants import MUTANTS, forget, register
from zerograph.codegen import aot, cpp, dispatch, launch, targets, updates
from zerograph.codegen.render import render
from zerograph.codegen.rules import RULES, Described, Run
from zerograph.codegen.spec import CHUNK, Copy, Finish, Norm, Spec, Update
from zerograph.errors import KernelError, KernelWarning
from zerograph.golden import GraphGolden

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BLOCK = launch.settings("update", "").block
NO_TRITON = importlib.util.find_spec("triton") is None
NO_CPP = not any(map(shutil.which, ("g++", "c++", "clang++")))
VECTORS = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
TARGETS = [
    pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON, reason="needs triton")),
    pytest.param("cpp", marks=pytest.mark.skipif(NO_CPP, reason="needs a C++ compiler")),
    "torch",
]
needs_triton = pytest.mark.skipif(NO_TRITON, reason="needs triton")
needs_cpp = pytest.mark.skipif(NO_CPP, reason="needs a C++ compiler")


class Targets:
    """Calls dispatch's functions on a target by name."""

    def __init__(self) -> None:
        self._interpreter: Interpreter | None = None

    def __call__(self, target: str, function: str, *args: Any, block: int = 0) -> Any:
        if target == "triton":
            if self._interpreter is None:
                self._interpreter = Interpreter()
            return self._interpreter(function, *args, block=block)
        given = [RULES[a] if isinstance(a, str) else a for a in args]
        return getattr(dispatch, function)(*given, target=target)

    def close(self) -> None:
        if self._interpreter is not None:
            self._interpreter.close()


@pytest.fixture(scope="module")
def call() -> Iterator[Targets]:
    made = Targets()
    register()
    yield made
    forget()
    made.close()


# Updates


@dataclass(frozen=True)
class Case:
    """A rule with options that reach all of its code."""

    rule: str
    options: dict[str, Any]
    optimizer: str = ""
    """torch's class; empty where torch has none."""
    name: str = ""

    @property
    def described(self) -> Described:
        return RULES[self.rule]

    @property
    def full(self) -> dict[str, Any]:
        return {**self.described.defaults, **self.options}


_DECAY = {"lr": 1e-2, "weight_decay": 0.1}
CASES = [
    Case("adamw", _DECAY, "AdamW"),
    Case("adamw", {**_DECAY, "amsgrad": True, "maximize": True}, "AdamW", "adamw-amsgrad-maximize"),
    Case("adam", {**_DECAY, "betas": (0.4, 0.9)}, "Adam", "adam-short"),
    Case("sgd", _DECAY, "SGD"),
    Case("sgd", {**_DECAY, "momentum": 0.9, "dampening": 0.2}, "SGD", "sgd-momentum"),
    Case("sgd", {**_DECAY, "momentum": 0.9, "nesterov": True}, "SGD", "sgd-nesterov"),
    Case(
        "adagrad",
        {**_DECAY, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "maximize": True},
        "Adagrad",
    ),
    Case("lion", {**_DECAY, "betas": (0.9, 0.99)}),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name or case.rule)
EACH_TARGET = pytest.mark.parametrize("target", TARGETS)
ODD = [0.0, -0.0, 1e-40, -1e-45, 1e-30, 1e-12, 3e4, math.nan, math.inf, -math.inf]


@dataclass
class Slice:
    """The tensors of one slice."""

    master: Tensor
    states: dict[str, Tensor]
    low: Tensor | None = None

    def clone(self) -> "Slice":
        low = self.low.clone() if self.low is not None else None
        return Slice(self.master.clone(), {k: v.clone() for k, v in self.states.items()}, low)

    def all(self) -> list[Tensor]:
        return [self.master, *self.states.values(), *([] if self.low is None else [self.low])]


@dataclass
class Problem:
    """A slice and the gradients of some steps, the same at every call."""

    case: Case
    size: int
    steps: int
    grad: torch.dtype = F32
    low: torch.dtype | None = None
    master: torch.dtype = F32
    odd: bool = False
    factor: float = 0.5
    grads: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(self.size)
        self.first = torch.randn(self.size, generator=made, dtype=self.master)
        for _ in range(self.steps):
            grad = torch.randn(self.size, generator=made, dtype=self.master).to(self.grad)
            if self.odd:
                grad[: len(ODD)] = torch.tensor(ODD, dtype=F64).to(self.grad)[: self.size]
            self.grads.append(grad)

    def slice(self) -> Slice:
        names = self.case.described.states(self.case.full)
        low = None if self.low is None else self.first.to(self.low)
        return Slice(self.first.clone(), {n: torch.zeros_like(self.first) for n in names}, low)

    def run(self, call: Targets, target: str, rule: str = "", block: int = 0) -> Slice:
        own, control = self.slice(), torch.tensor([self.factor, 1.0])
        for step, grad in enumerate(self.grads, 1):
            runs = [Run(0, self.size, 0, step)]
            args = ([self.case.full], runs, own.master, grad, own.states, own.low, control)
            call(target, "update", rule or self.case.rule, *args, block=block)
        return own

    def reference(self, rule: str = "") -> Slice:
        """In float64 by numpy."""
        described = RULES[rule or self.case.rule]
        spec = Update(described.name, described.flags(self.case.full), F64, F64)
        made: dict[str, Any] = {}
        exec(render(spec, "numpy"), made)
        values = [t.double().numpy() for t in (self.first, *self.slice().states.values())]
        with np.errstate(all="ignore"):
            for step, grad in enumerate(self.grads, 1):
                row = described.row(self.case.full, step)
                mean = grad.double().numpy() * self.factor
                values = made[spec.name](row, mean, *values)
        master, *states = map(torch.from_numpy, values)
        return Slice(master, dict(zip(spec.states, states)))


def close(value: Tensor, expected: Tensor, bound: float) -> None:
    """|value - expected| <= bound * (1 + |expected|), NaN and infinities alike."""
    value, expected = value.double(), expected.double()
    fine = (value - expected).abs() <= bound * (1 + expected.abs())
    fine |= (value == expected) | (value.isnan() & expected.isnan())
    wrong = (~fine).nonzero().flatten()
    assert not len(wrong), (len(wrong), wrong[:3], value[wrong[:3]], expected[wrong[:3]])


def same(mine: Slice, others: Slice) -> None:
    """The same bits, NaN being equal to NaN."""
    for value, other in zip(mine.all(), others.all(), strict=True):
        fine = (value == other) | (value.isnan() & other.isnan())
        assert fine.all(), (~fine).nonzero().flatten()[:5]


def without_flips(own: Slice, expected: Slice) -> tuple[Slice, Slice]:
    """Without the elements, few, of which a direction near zero had the other sign: whole steps away."""
    away = (own.master.double() - expected.master).abs()
    kept = ~(away > 1e-3)
    assert (~kept).sum() <= max(2, len(kept) // 2000)
    pair = []
    for each in (own, expected):
        states = {name: state[kept] for name, state in each.states.items()}
        pair.append(Slice(each.master[kept], states, None if each.low is None else each.low[kept]))
    return pair[0], pair[1]


def check(own: Slice, expected: Slice, rule: str) -> None:
    if rule == "lion":
        own, expected = without_flips(own, expected)
    close(own.master, expected.master, 2e-6)
    # With decay in the gradient the two may cancel, which leaves the rounding of either.
    tiny = 1e-9 if rule in ("adam", "adagrad") else 1e-38
    for name, state in own.states.items():
        value, right = state.double(), expected.states[name]
        if name in ("exp_avg_sq", "max_exp_avg_sq", "sum"):
            fine = (value - right).abs() <= 2e-6 * right + tiny
            fine |= (value == right) | (value.isnan() & right.isnan())
            assert fine.all(), name
        else:
            close(state, right, 2e-6)
    if own.low is not None:
        assert torch.equal(own.low.nan_to_num(7), own.master.to(own.low.dtype).nan_to_num(7))
        right = expected.master.to(own.low.dtype)
        far = (own.low.view(torch.int16).int() - right.view(torch.int16).int()).abs() > 1
        far &= (expected.master.abs() > 1e-6) & expected.master.isfinite()
        assert not far.any()


SIZES = [1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1]


@EACH_TARGET
@EACH_CASE
def test_updates_follow_float64(call: Targets, case: Case, target: str) -> None:
    """Twenty steps, bf16 gradients and copies, zeros, subnormals, NaN and infinities."""
    tile = updates.CPU_TILE
    sizes = SIZES if target == "triton" else [*SIZES, tile - 1, tile, tile + 1]
    for size in sizes:
        problem = Problem(case, size, 20, BF16, BF16, odd=True)
        check(problem.run(call, target), problem.reference(), case.rule)


@needs_triton
@needs_cpp
@EACH_CASE
def test_interpreter_and_cpp_have_the_same_bits(call: Targets, case: Case) -> None:
    kinds = [(F32, None), (F32, BF16), (BF16, BF16), (F16, F16)]
    for size, (grad, low) in itertools.product([17, BLOCK + 1], kinds):
        problem = Problem(case, size, 5, grad, low, odd=True)
        same(problem.run(call, "triton"), problem.run(call, "cpp"))


@needs_triton
@needs_cpp
@EACH_CASE
def test_a_million_elements(call: Targets, case: Case) -> None:
    problem = Problem(case, 1 << 20, 1, BF16, BF16)
    own = problem.run(call, "triton", block=1 << 18)
    same(own, problem.run(call, "cpp"))
    check(own, problem.reference(), case.rule)


@needs_triton
@needs_cpp
@EACH_CASE
def test_double_models(call: Targets, case: Case) -> None:
    problem = Problem(case, 100, 20, F64, None, F64)
    expected = problem.reference()
    for target in ("triton", "cpp", "torch"):
        own = problem.run(call, target)
        for value, right in zip(own.all(), expected.all(), strict=True):
            close(value, right, 1e-13)


def torchs(problem: Problem, dtype: torch.dtype) -> Slice:
    """What torch.optim makes of it, unfused."""
    case = problem.case
    param = torch.nn.Parameter(problem.first.to(dtype, copy=True))
    options = {k: v for k, v in case.full.items() if k != "bias_correction"}  # not one of torch's
    optimizer = getattr(torch.optim, case.optimizer)([param], foreach=False, **options)
    for grad in problem.grads:
        param.grad = grad.to(dtype) * problem.factor
        optimizer.step()
    names = case.described.states(case.full)
    return Slice(param.detach(), {n: optimizer.state[param][n] for n in names})


def by_hand(problem: Problem) -> Slice:
    """Lion in float64, arXiv:2302.06675 algorithm 2."""
    options = problem.case.full
    (beta1, beta2), lr = options["betas"], options["lr"]
    theta, m = problem.first.double(), torch.zeros(problem.size, dtype=F64)
    for grad in problem.grads:
        g = grad.double() * problem.factor
        direction = torch.sign(beta1 * m + (1 - beta1) * g)
        theta = theta - lr * (direction + options["weight_decay"] * theta)
        m = beta2 * m + (1 - beta2) * g
    return Slice(theta, {"exp_avg": m})


@pytest.mark.parametrize("target", [*TARGETS, "numpy"])
@EACH_CASE
def test_updates_follow_torch(call: Targets, case: Case, target: str) -> None:
    """A hundred steps beside torch.optim in fp32; numpy, and all of Lion, beside float64."""
    problem = Problem(case, 200, 100)
    double = target == "numpy"
    expected = torchs(problem, F64 if double else F32) if case.optimizer else by_hand(problem)
    own = problem.reference() if double else problem.run(call, target)
    for value, right in zip(own.all(), expected.all(), strict=True):
        close(value, right, 1e-12 if double else 1e-6 if case.optimizer else 1e-5)


@pytest.mark.skipif(not VECTORS, reason="torch adds products without fma here")
@EACH_CASE
def test_plain_updates_have_torchs_bits(call: Targets, case: Case) -> None:
    """Where nothing can be compiled, an update is what torch's own loop does, to the bit."""
    problem = Problem(case, 1003, 30)
    if case.optimizer:
        same(problem.run(call, "torch"), torchs(problem, F32))


@needs_cpp
@pytest.mark.skipif(not VECTORS, reason="torch adds products without fma here")
@EACH_CASE
def test_cpp_has_torchs_bits_but_for_the_root(call: Targets, case: Case) -> None:
    """SGD and Lion wholly; of Adam and Adagrad what is computed before a square root.

    The root is correctly rounded here; torch takes MKL's, which is not on every machine.
    """
    problem = Problem(case, 1003, 30)
    own = problem.run(call, "cpp")
    expected = torchs(problem, F32) if case.optimizer else problem.run(call, "torch")
    if case.rule in ("sgd", "lion"):
        same(own, expected)
    if case.rule == "adamw":
        same(Slice(own.master, own.states), Slice(own.master, expected.states))


@pytest.mark.parametrize("target", [*TARGETS, "numpy"])
@pytest.mark.parametrize("rule", MUTANTS, ids=lambda rule: rule.name)
def test_a_wrong_rule_is_noticed(call: Targets, rule: Described, target: str) -> None:
    problem = Problem(CASES[0], 64, 20)
    expected = torchs(problem, F64)

    def run(name: str) -> Slice:
        double = target == "numpy"
        return problem.reference(name) if double else problem.run(call, target, name)

    close(run("adamw").master, expected.master, 1e-6)
    with pytest.raises(AssertionError):
        close(run(rule.name).master, expected.master, 1e-6)


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
    close(own.master, expected.master, 1e-6)
    for gap in (slice(32, 64), slice(4000, size)):
        for value in own.all():
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
    same(own, before)


def test_an_update_moves_what_it_must() -> None:
    assert Update("adamw", frozenset(), BF16, F32, BF16).nbytes == 28
    assert Update("adamw", frozenset(), F32, F32).nbytes == 28
    assert Update("adamw", frozenset({"amsgrad"}), BF16, F32, BF16).nbytes == 36
    assert Update("sgd", frozenset(), BF16, F32, BF16).nbytes == 12


# LAMB

LAMB_OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "min_coeff": 0.1, "max_coeff": 3.0}


def lamb_by_hand(
    params: list[Tensor], grads: list[list[Tensor]], options: dict[str, Any]
) -> list[list[Tensor]]:
    """arXiv:1904.00962 algorithm 2 on whole parameters, float64: parameters and both moments."""
    beta1, beta2 = options["betas"]
    xs = [p.double() for p in params]
    ms, vs = ([torch.zeros_like(x) for x in xs] for _ in range(2))
    for step, given in enumerate(grads, 1):
        for i, grad in enumerate(given):
            g = grad.double()
            ms[i] = beta1 * ms[i] + (1 - beta1) * g
            vs[i] = beta2 * vs[i] + (1 - beta2) * g * g
            m, v = ms[i] / (1 - beta1**step), vs[i] / (1 - beta2**step)
            change = m / (v.sqrt() + options["eps"]) + options["weight_decay"] * xs[i]
            ratio = (xs[i].norm() / change.norm()).clamp(options["min_coeff"], options["max_coeff"])
            if xs[i].norm() == 0 or change.norm() == 0:
                ratio = torch.tensor(1.0)
            xs[i] = xs[i] - options["lr"] * ratio * change
    return [xs, ms, vs]


def lamb(call: Targets, target: str, cut: int, scale: list[float], dtype: torch.dtype) -> float:
    """Twenty steps on three parameters, the second in two runs; the largest error."""
    made = torch.Generator().manual_seed(0)
    sizes, options = [160, 2048, 16], {**RULES["lamb"].defaults, **LAMB_OPTIONS}
    params = [s * torch.randn(n, generator=made) for n, s in zip(sizes, scale)]
    grads = [[torch.randn(n, generator=made).to(dtype) for n in sizes] for _ in range(20)]
    expected = lamb_by_hand(params, grads, options)
    master, low = torch.cat(params), torch.cat(params).to(BF16)
    states = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
    control = torch.tensor([0.5, 1.0])
    ends = [0, 160, 160 + cut, 2208, 2224]
    for step, given in enumerate(grads, 1):
        runs = [Run(a, b, 0, step) for a, b in itertools.pairwise(ends)]
        grad = torch.cat([2 * g for g in given])
        own = call(target, "measure", "lamb", [options], runs, master, grad, states, control)
        of_params = torch.stack([own[0], own[1] + own[2], own[3]])
        norms = of_params[[0, 1, 1, 2]]
        call(target, "apply", "lamb", [options], runs, master, states, low, control, norms)
    assert torch.equal(low, master.to(BF16))
    worst = 0.0
    for value, right in zip((master, *states.values()), map(torch.cat, expected)):
        worst = max(worst, ((value - right).abs() / (1 + right.abs())).max().item())
    return worst


@EACH_TARGET
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lamb_follows_algorithm_2(call: Targets, target: str, dtype: torch.dtype) -> None:
    """Parameters in pieces, one of zeros, trust ratios within and at their bounds."""
    assert lamb(call, target, 1040, [1.0, 9.0, 0.0], dtype) < 2e-6


@needs_triton
@needs_cpp
def test_both_launches_of_lamb_have_the_same_bits(call: Targets) -> None:
    size = 3 * BLOCK + 16
    master, grad, norms = values(size, F32), values(size, BF16), torch.tensor([[4.0, 5.0]]).double()
    states = {"exp_avg": values(size, F32) / 9, "exp_avg_sq": values(size, F32).abs()}
    options, runs = {**RULES["lamb"].defaults, **LAMB_OPTIONS}, [Run(0, size, 0, 5)]
    made = []
    for target in ("triton", "cpp", "torch"):
        own = Slice(master.clone(), {k: v.clone() for k, v in states.items()}, master.bfloat16())
        args = ([options], runs, own.master, grad, own.states, None)
        sums = call(target, "measure", "lamb", *args)
        args = ([options], runs, own.master, own.states, own.low, None, norms)
        call(target, "apply", "lamb", *args)
        made.append((own, sums))
    same(made[0][0], made[1][0])
    for _, sums in made[1:]:
        assert ((sums - made[0][1]).abs() <= 1e-6 * sums).all()


# Norms


def values(size: int, dtype: torch.dtype) -> Tensor:
    made = torch.Generator().manual_seed(size)
    return (3 * torch.randn(size, generator=made)).to(dtype)


@EACH_TARGET
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_norms_follow_float64(call: Targets, target: str, dtype: torch.dtype) -> None:
    for size in (1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5):
        grads = [values(size, dtype), values(64, dtype)]
        (total,) = call(target, "norm_partials", grads, 1).tolist()
        assert total == pytest.approx(sum(g.double().square().sum().item() for g in grads), 1e-6)


@EACH_TARGET
def test_a_norm_of_a_million_elements(call: Targets, target: str) -> None:
    grad = values(1 << 20, BF16)
    (total,) = call(target, "norm_partials", [grad], 1).tolist()
    assert total == pytest.approx(grad.double().square().sum().item(), 1e-7)


@EACH_TARGET
def test_a_norm_of_zeros_and_subnormals(call: Targets, target: str) -> None:
    assert call(target, "norm_partials", [torch.zeros(100)], 1).tolist() == [0.0]
    grad = torch.full((CHUNK + 1,), 1e-40)
    grad[5] = 3.0
    assert call(target, "norm_partials", [grad], 1).tolist() == [9.0]


@EACH_TARGET
def test_a_slices_sum_depends_on_the_slice_alone(call: Targets, target: str) -> None:
    grads = [values(4 * size, F32) for size in (16, CHUNK + 48, 2 * CHUNK)]
    whole = call(target, "norm_partials", grads, 4)
    for part in range(4):
        own = [grad.chunk(4)[part] for grad in grads]
        assert torch.equal(call(target, "norm_partials", own, 1), whole[part : part + 1])


@EACH_TARGET
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_norm_shows_every_overflow(call: Targets, target: str, value: float) -> None:
    grad = values(4 * CHUNK, BF16)
    grad[3 * CHUNK + 7] = value
    totals = call(target, "norm_partials", [grad], 4)
    assert totals.isfinite().tolist() == [True, True, True, False]
    assert call(target, "finish", totals, None, 0.0, True)[1].tolist() == [1.0, 0.0]


@needs_triton
@needs_cpp
def test_norms_agree_between_targets(call: Targets) -> None:
    grads = [values(size, BF16) for size in (4 * CHUNK + 64, 1024)]
    made = [call(target, "norm_partials", grads, 4) for target in ("triton", "cpp", "torch")]
    for other in made[1:]:
        assert ((made[0] - other).abs() <= 1e-12 * other).all()


# The finish


DIVIDED = [None, torch.tensor(1 / 1024), torch.tensor(0.3, dtype=F64)]


@EACH_TARGET
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("limit", [0.0, 1.0, 1e6])
def test_the_finish(call: Targets, target: str, limit: float, skips: bool) -> None:
    for divided, last in itertools.product(DIVIDED, (5.0, 0.0, math.nan, math.inf)):
        partials = torch.tensor([3.0, 7.0, last], dtype=F64)
        norm, control = call(target, "finish", partials, divided, limit, skips)
        right = partials.sum().sqrt() * (1.0 if divided is None else divided.double())
        clip = (limit / (right + 1e-6)).clamp(max=1.0).float() if limit else torch.tensor(1.0)
        factor = (clip.double() * (1.0 if divided is None else divided.double())).float()
        assert torch.equal(norm.nan_to_num(-1), right.nan_to_num(-1))
        assert torch.equal(control[0].nan_to_num(-1), factor.nan_to_num(-1))
        assert control[1] == float(bool(right.isfinite()) or not skips)


# Packing

PAIRS = [(F32, BF16), (BF16, F32), (F32, F16), (F16, F32), (BF16, BF16), (F32, F32), (F64, F64)]


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


@EACH_TARGET
@pytest.mark.parametrize(("source", "given"), PAIRS, ids=str)
def test_packing(call: Targets, target: str, source: torch.dtype, given: torch.dtype) -> None:
    for size, scale in itertools.product((1, 15, 16, 17, 2049), (1.0, 0.125, 1 / 3)):
        grad, bucket = values(size, source), torch.full((size + 48,), 9.0, dtype=given)
        real = F64 if source == F64 else F32
        right = (grad.to(given).to(real) * torch.tensor(scale).to(real)).to(given)
        call(target, "pack", grad, bucket, 32, scale)
        assert torch.equal(bucket[32 : 32 + size], right)
        assert (bucket[:32] == 9).all() and (bucket[32 + size :] == 9).all()
        out = torch.full((size,), 9.0, dtype=source)
        call(target, "unpack", bucket, 32, out, 1.0)
        assert torch.equal(out, right.to(source))


@EACH_TARGET
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_casts_of_all_values(call: Targets, target: str, dtype: torch.dtype) -> None:
    """Every 16-bit value, and fp32 values at and beside every rounding boundary."""
    halves = every_half(dtype)
    wide = torch.empty(1 << 16)
    call(target, "unpack", halves, 0, wide, 1.0, block=1 << 16)
    assert torch.equal(wide.nan_to_num(7), halves.float().nan_to_num(7))
    finite = wide[wide.isfinite()]
    above = (halves.view(torch.int16) + 1).view(dtype).float()[wide.isfinite()]
    middle = (finite.double() + above.double()) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    near = middle.float()
    given = torch.cat([near, torch.nextafter(near, up), torch.nextafter(near, down)])
    made = torch.empty(len(given), dtype=dtype)
    call(target, "pack", given, made, 0, 1.0, block=1 << 18)
    assert torch.equal(made.nan_to_num(7), given.to(dtype).nan_to_num(7))


# Sources


SHOWN: list[Spec] = [
    Update("adamw", frozenset(), BF16, F32, BF16),
    Norm(BF16),
    Finish(True, F32, True),
    Copy("pack", F32, BF16),
]


@pytest.mark.parametrize("target", ["triton", "cpp"])
@pytest.mark.parametrize("spec", SHOWN, ids=lambda spec: spec.name)
def test_sources(spec: Spec, target: str, graph_golden: GraphGolden) -> None:
    serves = (("b0  model.embed_tokens", 4096), ("b1  model.layers.0", 5152))
    graph_golden(render(spec, target, serves), f"kernels/{spec.name}.{target}")


def test_a_comment_changes_no_library() -> None:
    spec = SHOWN[0]
    first, second = render(spec, "cpp"), render(spec, "cpp", (("b0", 64),))
    assert first != second
    assert cpp._key(first, sys.executable) == cpp._key(second, sys.executable)
    changed = first.replace("param * keep", "param")
    assert cpp._key(first, sys.executable) != cpp._key(changed, sys.executable)


# Compilers


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("ZEROGRAPH_CACHE", str(tmp_path / "cache"))
    cpp.load.cache_clear()
    cpp._compiler.cache_clear()
    yield tmp_path / "cache"
    cpp.load.cache_clear()
    cpp._compiler.cache_clear()


SMALL = 'extern "C" void small(double* x) { *x = 4.0; }\n'


@needs_cpp
def test_a_library_is_kept_and_mended(fresh: Path) -> None:
    assert cpp.load(SMALL, "small") is not None
    (library,) = fresh.glob("*.so")
    (source,) = fresh.glob("*.cpp")
    assert source.read_text() == SMALL and not list(fresh.glob(".making*"))
    made = library.stat().st_mtime_ns
    cpp.load.cache_clear()
    assert cpp.load(SMALL, "small") is not None and library.stat().st_mtime_ns == made
    other = SMALL.replace("4.0", "5.0")
    cut = fresh / f"small-{cpp._key(other, cpp._compiler() or '')}.so"
    cut.write_bytes(library.read_bytes()[:100])
    loaded = cpp.load(other, "small")
    value = torch.zeros(1, dtype=F64)
    assert loaded is not None
    targets.call(cpp.function(loaded, "small"), value)
    assert value == 5


@needs_cpp
def test_ranks_may_compile_the_same_kernel_at_once(fresh: Path) -> None:
    code = f"from zerograph.codegen import cpp; assert cpp.load({SMALL!r}, 'small') is not None"
    command, folder = [sys.executable, "-c", code], Path(__file__).parents[1]
    ranks = [subprocess.Popen(command, cwd=folder) for _ in range(3)]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    assert len(list(fresh.iterdir())) == 2


@needs_cpp
def test_threads_change_no_bit(call: Targets) -> None:
    problem = Problem(CASES[0], 5 * updates.CPU_TILE + 16, 2, BF16, BF16)
    grad, out = values(9 * CHUNK + 16, BF16), torch.empty(9 * CHUNK + 16)
    own, total = problem.run(call, "cpp"), call("cpp", "norm_partials", [grad], 2)
    torch.set_num_threads(3)
    try:
        same(own, problem.run(call, "cpp"))
        assert torch.equal(total, call("cpp", "norm_partials", [grad], 2))
        call("cpp", "unpack", grad, 0, out)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(out, grad.float())


@needs_cpp
def test_a_refused_source_is_an_error(fresh: Path) -> None:
    with pytest.raises(KernelError, match=r"refused .*small-\w+\.cpp[\s\S]*error"):
        cpp.load(SMALL.replace("4.0", "four"), "small")
    assert not list(fresh.glob("*.so"))


def test_without_a_compiler_torch_runs_with_one_warning(
    fresh: Path, call: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    problem = Problem(CASES[0], 100, 2)
    own = problem.slice()
    args = ([problem.case.full], [Run(0, 100, 0, 1)], own.master, problem.grads[0], own.states)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            dispatch.update(problem.case.described, *args, None, None)
    assert [w.category for w in said] == [KernelWarning]
    assert "install g++" in str(said[0].message)
    assert not torch.equal(own.master, problem.first)


def test_the_target_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROGRAPH_KERNELS", "torch")
    assert targets.target_of(torch.device("cpu")) == "torch"
    monkeypatch.setenv("ZEROGRAPH_KERNELS", "fortran")
    with pytest.raises(KernelError, match="torch, cpp or triton"):
        targets.target_of(torch.device("cpu"))


@needs_triton
def test_importing_kernels_imports_no_triton() -> None:
    code = "import sys, torch; had = 'triton' in sys.modules\n"
    code += "import zerograph.codegen.dispatch, zerograph.codegen.aot\n"
    code += "sys.exit('triton' in sys.modules and not had)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=120
        ).returncode
        == 0
    )


# Ahead of time

COMPILED: Sequence[Spec] = [
    *(
        Update(c.rule, RULES[c.rule].flags(c.full), grad, F32, low)
        for c in CASES
        for grad, low in ((BF16, BF16), (F32, None))
    ),
    Update("adamw", frozenset(), F16, F32, F16),
    Update("adamw", frozenset(), F32, F32, None, False),
    Update("adamw", frozenset(), F64, F64),
    Update("lamb", frozenset(), BF16, F32, None, True, "measure"),
    Update("lamb", frozenset(), F32, F32, BF16, True, "apply"),
    *(Norm(dtype) for dtype in (F32, BF16, F16, F64)),
    *(Finish(c, d, s) for c in (False, True) for d in (None, F32, F64) for s in (False, True)),
    *(Copy("pack", *pair) for pair in PAIRS),
    *(Copy("unpack", *pair) for pair in PAIRS),
]


@needs_triton
@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_for_gpus_that_are_not_here(
    target: str, request: pytest.FixtureRequest
) -> None:
    """No spills, 128-bit accesses of fp32; registers and widths as figures/triton-<version> says."""
    report = aot.compile_all(COMPILED, [target])
    assert len(report) == len(COMPILED) + 5
    assert not [each for each in report if each.spills or each.stack]
    found = {each.kernel: each for each in report}
    for spec in COMPILED:
        if isinstance(spec, Update) and spec.master == F32:
            own, grad = found[spec.name], spec.grad == F32 and spec.phase != "apply"
            assert own.accesses("st128") == len(spec.stored), own
            assert own.accesses("ld128") == 1 + len(spec.states) + grad, own
    minor = ".".join(report[0].triton.split(".")[:2])
    path = Path(__file__).parent / "figures" / f"triton-{minor}.{target}.txt"
    if request.config.getoption("accept_graphs"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(aot.table(report))
    if not path.exists():
        pytest.skip(f"no figures of triton {minor}; --accept-graphs writes them")
    assert aot.table(report) == path.read_text()


@needs_triton
def test_emitting_writes_what_a_gpu_loads(tmp_path: Path) -> None:
    aot.compile_all(SHOWN[:1], ["sm_90"], tmp_path)
    names = {path.suffix for path in (tmp_path / "sm_90").iterdir()}
    assert names == {".py", ".ptx", ".cubin"}


def test_unknown_targets_are_named() -> None:
    with pytest.raises(KernelError, match="did you mean 'sm_90'"):
        aot.compile_all(SHOWN[:1], ["sm_9"])
