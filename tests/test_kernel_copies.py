"""Kernels that pack gradients into buckets and unpack them, with cast and scale: every 16-bit value."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.kernels import BF16, EACH_TARGET, F16, F32, F64, PAIRS, Targets, values


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
