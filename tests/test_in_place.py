"""Gradients that the operator that makes them writes into their bucket: which, the same bits, no copy."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import zerograph
from tests import tiny
from tests.models import batch_for, loss_of, make
from tests.oracle import config_for
from tests.ranks import run_ranks
from tests.storages import Storages, held_by
from tests.traces import captured_once
from zerograph import ops
from zerograph.codegen import in_place
from zerograph.cost import work_of
from zerograph.nodes import is_call
from zerograph.passes import in_place as in_place_pass
from zerograph.plan import Plan

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BF16 = {"bf16": {"enabled": True}}


# What operators do


def given(target: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    torch.manual_seed(0)
    one, other = torch.randn(48, 64, dtype=dtype), torch.randn(64, 80, dtype=dtype)
    many, others = one.view(4, 12, 64), torch.randn(4, 64, 80, dtype=dtype)
    arguments: dict[Any, tuple[Any, ...]] = {
        aten.mm.default: (one, other),
        aten.addmm.default: (torch.randn(80, dtype=dtype), one, other),
        aten.bmm.default: (many, others),
        aten.baddbmm.default: (torch.randn(4, 1, 80, dtype=dtype), many, others),
        aten.sum.dim_IntList: (others, [0, 1], True),
    }
    return arguments.get(target, (others, torch.randn(64, 80, dtype=dtype)))


def written(target: Any, arguments: tuple[Any, ...], like: Tensor, offset: int) -> tuple[Any, ...]:
    """(a buffer, the call that writes into it)."""
    buffer = torch.full((like.numel() + 2 * offset,), 7.0, dtype=like.dtype)
    place = buffer.as_strided(like.shape, like.stride(), offset)
    return buffer, lambda: in_place.WRITERS[target](*arguments, out=place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", in_place.WRITERS)
def test_an_operator_writes_the_same_bits_and_nothing_else(target: Any, dtype: torch.dtype) -> None:
    arguments = given(target, dtype)
    expected = target(*arguments)
    buffer, write = written(target, arguments, expected, offset=64)
    write()
    assert torch.equal(buffer[64:-64], expected.flatten())
    assert buffer[:64].eq(7).all() and buffer[-64:].eq(7).all()


def allocated(call: Callable[[], object]) -> int:
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in profiled.events())


@pytest.mark.parametrize("target", in_place.WRITERS)
def test_an_operator_makes_no_temporary(target: Any) -> None:
    arguments = given(target, torch.float32)
    expected = target(*arguments)
    assert allocated(lambda: target(*arguments)) >= expected.numel() * 4
    assert allocated(written(target, arguments, expected, offset=64)[1]) < expected.numel() * 4
    assert torch.Tag.generated not in in_place.WRITERS[target].tags


# Which gradients


def marks(plan: Plan) -> dict[str, bool]:
    """Of each parameter with a gradient, whether it is put in place."""
    puts = [n for n in plan.graph.nodes() if is_call(n, ops.put)]
    assert {work_of(n).nbytes == 0 for n in puts if in_place.is_in_place(n)} <= {True}
    return {str(n.args[2]): in_place.is_in_place(n) for n in puts}


@pytest.mark.parametrize("stage", range(4))
def test_matrices_and_biases_are_in_place_norms_are_copied(stage: int) -> None:
    plan = tiny.planned(tiny.trace_of("blocks"), stage)
    found = marks(plan)
    assert found == {name: "norm" not in name for name in found} and len(found) == 10
    record = next(r for r in plan.history.records if r.name == "in_place")
    assert record.did == "6 of 10 gradients written in place"
    lines = [line.strip() for line in str(plan).splitlines()]
    buffer = next(i for i, line in enumerate(lines) if "= zero.grad_buffer b3" in line)
    weight = next(
        i for i, line in enumerate(lines) if "zero.put %b3.grad" in line and 'weight"' in line
    )
    assert lines[weight].endswith('"head.weight" in place')
    assert any("aten.mm(" in line for line in lines[buffer:weight])


def planned(model: nn.Module, world: int = 8, **more: Any) -> Plan:
    inputs = (torch.ones(4, tiny.WIDTH),)
    return zerograph.plan(model, tiny.config(2, **more), example_inputs=inputs, world_size=world)


class Linear(nn.Module):
    """`x @ w.t()`, or `x @ w`, with w kept in the given layout; answers a mean."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(weight)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.w.t() if self.transposed else self.w)).square().mean()


@pytest.mark.parametrize("transposed", [True, False])
def test_a_transposed_product_is_as_its_parameter_lies(transposed: bool) -> None:
    """torch computes the gradient of a transposed matrix transposed; a parameter may itself lie so."""
    assert marks(planned(Linear(torch.randn(8, 8), transposed))) == {"w": True}
    lying = torch.randn(8, 8).t()
    found = marks(planned(Linear(lying, transposed)))["w"]
    grad = next(n for n in planned(Linear(lying, transposed)).graph.nodes() if is_call(n, ops.put))
    assert found == (grad.args[1].meta["val"].stride() == tuple(grad.args[5]))


class Read(nn.Module):
    """The gradient of `a` is that of `b` as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.a + self.b)).square().mean()


def test_a_gradient_that_is_read_elsewhere_is_copied() -> None:
    assert marks(planned(Read())) == {"a": False, "b": False}


def test_a_gradient_that_is_cast_or_scaled_is_copied() -> None:
    model = Linear(torch.randn(8, 8), transposed=True)
    assert marks(planned(model, **BF16)) == {"w": True}
    assert marks(planned(model, communication_data_type="bf16")) == {"w": False}
    assert marks(planned(model, prescale_gradients=True)) == {"w": False}
    assert marks(planned(model, world=1, prescale_gradients=True)) == {"w": True}


# Running


@pytest.mark.parametrize("stage", range(4))
def test_the_program_writes_and_copies_the_rest(stage: int) -> None:
    plan = tiny.planned(tiny.trace_of("blocks"), stage)
    nodes = list(plan.program("backward").module.graph.nodes)
    outs = [n for n in nodes if n.target in in_place.WRITERS.values()]
    copies = [n for n in nodes if getattr(n.target, "__name__", "") in ("put", "pack")]
    assert len(outs) == 6 and len(copies) == 4
    assert all(n.kwargs["out"].target is aten.as_strided.default for n in outs)
    assert not [
        n for n in nodes if n.op == "call_function" and not n.users and n not in copies + outs
    ]


def _steps(name: str, stage: int, extra: dict[str, Any], rank: int) -> list[Tensor]:
    engine = zerograph.compile(make(name), config_for(stage, **extra))
    found: list[Tensor] = []
    for index in range(2):
        engine.backward(loss_of(engine(**batch_for(name, rank + 10 * index))))
        found += [g for g in engine.gradients().values() if g is not None]
        engine.step()
    assert any(marks(engine.plan).values()) == (in_place_pass.can_write is in_place.can_write)
    return [*found, *engine.state_dict().values()]


TWICE = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}


@captured_once()
def _differing(rank: int, world: int, name: str) -> list[str]:
    """Training with gradients in place, and with all of them copied."""
    wrong = []
    for stage, extra in [*product(range(4), ({}, BF16)), (1, TWICE), (3, TWICE)]:
        found = []
        for way in (in_place.can_write, lambda put: False):
            in_place_pass.can_write = way
            found.append(_steps(name, stage, extra, rank))
        same = all(map(torch.equal, *found))
        wrong += [] if same and len(found[0]) == len(found[1]) else [f"{stage} {extra}"]
    in_place_pass.can_write = in_place.can_write
    return wrong


@pytest.mark.parametrize("name, world", [("gpt2", 2), ("llama", 1)])
def test_training_has_the_same_bits(name: str, world: int) -> None:
    assert run_ranks(world, _differing, name) == [[]] * world


class Wide(nn.Module):
    """One matrix that is far larger than the values it is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


def _peak(stage: int) -> tuple[int, int]:
    """(bytes of a step's storages at their peak, the plan's)."""
    engine = zerograph.compile(Wide(), config_for(stage))
    x = torch.randn(2, 512)
    for measured in (False, True):
        with Storages([*held_by(engine), x]) as seen:
            engine.backward(engine(x))
            engine.step()
        if measured:
            return seen.peak, engine.plan.memory.peak
    raise AssertionError


@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_in_place_has_no_storage_of_its_own(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peak falls by that of the matrix, in the plan and in fact."""
    held, predicted = _peak(stage)
    monkeypatch.setattr(in_place_pass, "can_write", lambda put: False)
    before, before_predicted = _peak(stage)
    size = 512 * 512 * 4
    assert before - held == pytest.approx(size, abs=size // 100)
    assert before_predicted - predicted == pytest.approx(size, abs=size // 100)
    assert held == pytest.approx(predicted, abs=size // 100)
