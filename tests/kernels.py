"""Support for tests of generated kernels: targets, calls on each of them, values, and how results differ.

Triton kernels run in its interpreter (interpreter.py), C++ is compiled, and "torch" is what runs where
there is no compiler. Without Triton or a compiler, their part is skipped. No optimizer rule is named here:
slices and their updates are in updates.py.
"""

import importlib.util
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreter import Interpreter
from zerograph.codegen import dispatch, launch
from zerograph.codegen.rules import RULES

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BLOCK = launch.settings("update", "").block
NO_TRITON = importlib.util.find_spec("triton") is None
NO_CPP = not any(map(shutil.which, ("g++", "c++", "clang++")))
VECTORS = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
"""Whether torch's loops on this CPU add products with a fused multiply-add."""

needs_triton = pytest.mark.skipif(NO_TRITON, reason="needs triton")
needs_cpp = pytest.mark.skipif(NO_CPP, reason="needs a C++ compiler")
needs_vectors = pytest.mark.skipif(not VECTORS, reason="torch adds products without fma here")
TARGETS = [
    pytest.param("triton", marks=needs_triton),
    pytest.param("cpp", marks=needs_cpp),
    "torch",
]
EACH_TARGET = pytest.mark.parametrize("target", TARGETS)

PAIRS = [(F32, BF16), (BF16, F32), (F32, F16), (F16, F32), (BF16, BF16), (F32, F32), (F64, F64)]
"""Dtypes that a copy is from and to."""


class Targets:
    """Calls dispatch's functions on a target by name. A rule may be given by its name."""

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


def values(size: int, dtype: torch.dtype) -> Tensor:
    """Normally distributed, the same at every call."""
    made = torch.Generator().manual_seed(size)
    return (3 * torch.randn(size, generator=made)).to(dtype)


def unlike(
    value: Tensor, expected: Tensor, relative: float = 0.0, absolute: float | None = None
) -> list[tuple[int, float, float]]:
    """The first elements, as (index, value, expected), that are too far away; NaN and infinities alike.

    |value - expected| may be relative * |expected| + absolute, which is `relative` if not given: the
    bound of parameters, b * (1 + |p|). With no bounds, values have to be the same.
    """
    value, expected = value.double(), expected.double()
    room = relative * expected.abs() + (relative if absolute is None else absolute)
    fine = (value - expected).abs() <= room
    fine |= (value == expected) | (value.isnan() & expected.isnan())
    wrong = (~fine).nonzero().flatten()[:5].tolist()
    return [(i, value[i].item(), expected[i].item()) for i in wrong]
