"""Gradients that are put into their bucket by a kernel: which ones, that it shows, and the same bits."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerograph
from tests.ranks import run_ranks
from tests.test_shown_kernels import serves
from zerograph import ops
from zerograph.codegen import cpp, dispatch, kernels, packing
from zerograph.nodes import is_call

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BF16 = {"bf16": {"enabled": True}}
LOW = {"communication_data_type": "bf16"}
WIDE = {**BF16, "communication_data_type": "fp32"}
PRESCALED = {"prescale_gradients": True}
DIVIDED = {"gradient_predivide_factor": 3.0}
WIDTH = 512


class Layers(nn.Module):
    """Two matrices that kernels pack, with biases that are too small for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def config(stage: int, **more: Any) -> dict[str, Any]:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    return {"zero_optimization": {"stage": stage}, "optimizer": optimizer, **more}


# Bits


def values(dtype: torch.dtype) -> Tensor:
    """From subnormals of fp16 to what overflows it, infinities, NaN and both zeros."""
    torch.manual_seed(0)
    wide = torch.randn(4000, dtype=torch.float64) * 10.0 ** torch.randint(-40, 38, (4000,))
    small = torch.randn(4000, dtype=torch.float64) * 10.0 ** torch.randint(-8, 6, (4000,))
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    return torch.cat([wide, small, special]).to(dtype)


@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_a_kernel_has_the_bits_of_copying_and_scaling(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROGRAPH_KERNELS", target)
    for (source, given), scale in itertools.product(
        itertools.product(DTYPES, DTYPES), (1.0, 0.5, 1 / 3, 1 / 7)
    ):
        if given == torch.float64 and scale not in (1.0, 0.5):
            continue  # packing.kernel_of leaves these to copy_
        grad = values(source)
        one, other = (torch.full((len(grad) + 8,), 9.0, dtype=given) for _ in range(2))
        where = 4, [len(grad)], [1], scale
        kernels.put(one, grad, *where)
        kernels.pack(other, grad, *where)
        assert torch.equal(one.isnan(), other.isnan()), (source, given, scale)
        alike = one.nan_to_num(7).view(torch.uint8), other.nan_to_num(7).view(torch.uint8)
        assert torch.equal(*alike), (source, given, scale)


def test_a_gradient_in_another_layout_is_rearranged(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a kernel of torch answers other strides than it was traced with."""
    monkeypatch.setattr(dispatch, "pack", None)
    grad, buffer = torch.randn(8, 4).t(), torch.zeros(40)
    kernels.pack(buffer, grad, 4, [4, 8], [8, 1], 0.5)
    assert torch.equal(buffer[4:36].view(4, 8), grad * 0.5)


# Which


@pytest.mark.parametrize("stage", range(4))
def test_what_is_packed_shows(stage: int) -> None:
    """Where a reduction of the backward has a factor, and gradients are large."""
    batch = torch.randn(4, WIDTH)
    for given, kernel in (
        (PRESCALED, "pack_f32_f32"),
        ({**LOW, **DIVIDED}, "pack_f32_bf16"),
        ({**BF16, **DIVIDED}, "pack_bf16_bf16"),
        ({**WIDE, **DIVIDED}, "pack_bf16_f32"),
        (LOW, ""),
        (WIDE, ""),
        ({}, ""),
    ):
        for world in (8, 1):
            plan = zerograph.plan(
                Layers(), config(stage, **given), example_inputs=(batch,), world_size=world
            )
            shown = plan.kernels()
            expected = [kernel] if kernel and world > 1 else []  # one backward a step reduces
            assert [name for name in shown if name.startswith("pack")] == expected, given
            for name in expected:
                assert set(serves(shown[name]).values()) == {WIDTH * WIDTH}
                assert set(serves(plan.kernels("triton")[name]).values()) == {WIDTH * WIDTH}
                small = [n for n in plan.graph.nodes() if is_call(n, ops.put)]
                assert sum(packing.kernel_of(n) is None for n in small) == 2


def test_layouts() -> None:
    assert packing.is_dense([3, 4], [4, 1]) and packing.is_dense([3, 4], [1, 3])
    assert packing.is_dense([], []) and packing.is_dense([1, 5], [99, 1])
    assert not packing.is_dense([3, 4], [5, 1]) and not packing.is_dense([3, 4], [0, 1])
    assert not packing.is_dense([0, 4], [4, 1])
    assert packing.same_layout((7, 1), [1, 5], [5, 1])
    assert not packing.same_layout((1, 3), [3, 4], [4, 1])


# Running


def _steps(stage: int, given: dict[str, Any], rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    engine = zerograph.compile(Layers(), config(stage, **given))
    found: list[Tensor] = []
    for index in range(2):
        torch.manual_seed(10 * index + rank)
        engine.backward(engine(torch.randn(4, WIDTH)))
        found += [g for g in engine.gradients().values() if g is not None]
        engine.step()
    return [*found, *engine.state_dict().values()]


def _compared(rank: int, world: int) -> list[str]:
    """Two steps with puts as they are, and with copies alone and the whole buffer scaled."""
    wrong, loaded, load = [], set(), cpp.load
    own = packing.kernel_of, packing.scale_of, packing.is_scaled

    def recorded(source: str, kernel: str) -> Any:
        loaded.add(kernel)
        return load(source, kernel)

    cpp.load = recorded  # type: ignore[assignment]
    for stage, given, kernel in (
        (2, PRESCALED, "pack_f32_f32"),
        (3, {**LOW, **DIVIDED}, "pack_f32_bf16"),
        (2, {**BF16, **DIVIDED}, "pack_bf16_bf16"),
        (3, {**WIDE, **DIVIDED}, "pack_bf16_f32"),
    ):
        loaded.clear()
        packing.kernel_of, packing.scale_of, packing.is_scaled = own
        packed = _steps(stage, given, rank)
        wrong += [] if kernel in loaded else [f"{kernel} was not loaded"]
        loaded.clear()
        packing.kernel_of = lambda put: None
        packing.scale_of = lambda put: 1.0
        packing.is_scaled = lambda buffer: False
        copied = _steps(stage, given, rank)
        wrong += [f"{kernel} was loaded"] if kernel in loaded else []
        wrong += [
            f"{kernel} {i}" for i, ab in enumerate(zip(packed, copied)) if not torch.equal(*ab)
        ]
    return wrong


def test_training_has_the_same_bits() -> None:
    assert run_ranks(2, _compared) == [[], []]
