"""Kernels of the gradient norm, and the finish: the norm, the factor of gradients, the skip flag."""

import itertools
import math

import pytest
import torch

from tests.kernels import BF16, EACH_TARGET, F16, F32, F64, Targets, needs_cpp, needs_triton, values
from zerograph.codegen.spec import CHUNK


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


@EACH_TARGET
@pytest.mark.parametrize("parts", [1, 4])
def test_squares_of_each_gradient_make_the_same_norm(
    call: Targets, target: str, parts: int
) -> None:
    grads = [values(4 * size, BF16) for size in (16, CHUNK + 48, 2 * CHUNK)]
    squares = [call(target, "squares", grad, parts) for grad in grads]
    assert [tuple(each.shape) for each in squares] == [
        (parts, -(-g.numel() // parts // CHUNK)) for g in grads
    ]
    found = call(target, "sum_squares", squares, BF16)
    assert torch.equal(found, call(target, "norm_partials", grads, parts))
