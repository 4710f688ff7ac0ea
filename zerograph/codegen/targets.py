"""Which target runs a kernel on a device, and calls of C++ functions by ctypes.

CUDA and ROCm tensors go to Triton, CPU tensors to C++; without Triton or a compiler, plain torch runs.
ZEROGRAPH_KERNELS=torch (or cpp, triton) asks for one.
"""

import ctypes
import os
import warnings
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from zerograph.codegen import cpp, gpu
from zerograph.codegen.launch import shipped
from zerograph.codegen.render import render
from zerograph.codegen.spec import Spec
from zerograph.errors import KernelError, KernelWarning

Target = Literal["triton", "cpp", "torch"]


def target_of(device: torch.device) -> Target:
    """What runs on `device`."""
    asked = os.environ.get("ZEROGRAPH_KERNELS", "")
    if asked in ("torch", "cpp", "triton"):
        return asked  # type: ignore[return-value]
    if asked:
        raise KernelError(f"ZEROGRAPH_KERNELS is {asked!r}; it may be torch, cpp or triton")
    if device.type == "cpu":
        return "cpp" if cpp.available() else "torch"
    return "triton" if device.type == "cuda" and _has_triton(device.type) else "torch"


def choices(device: torch.device) -> list[str]:
    """What decides the bits of a sum on `device`, a line each: the target, and Triton's launch settings.

    Settings are those that the device's architecture has in this machine's table; C++ and torch have none.
    """
    target = target_of(device)
    lines = [f"{device.type} kernels run by {target}"]
    if target != "triton":
        return lines
    chosen = {family: gpu.chosen(family, device) for family in shipped()}
    return lines + [
        f"{f} is launched with block {c.block}, warps {c.warps}" for f, c in chosen.items()
    ]


@cache
def _has_triton(device: str) -> bool:
    if not gpu.available():
        warnings.warn(
            f"Triton is not installed, so optimizer updates on {device} run as plain torch operations, "
            "several times slower; install triton",
            KernelWarning,
            stacklevel=3,
        )
    return gpu.available()


def native(spec: Spec, suffix: str = "") -> Any:
    """The C++ function of `spec`, or another of its file by the end of its name."""
    loaded = cpp.load(render(spec, "cpp"), spec.name)
    if loaded is None:
        raise KernelError("there is no C++ compiler; install g++, or set ZEROGRAPH_KERNELS=torch")
    return cpp.function(loaded, spec.name + suffix)


def call(function: Any, *args: int | Tensor | None) -> None:
    """Call a C function with int64 and pointers. Tensors must be contiguous."""
    made: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            assert arg.is_contiguous() and arg.device.type == "cpu"
            made.append(ctypes.c_void_p(arg.data_ptr()))
        elif arg is not None:
            made.append(ctypes.c_int64(arg))
    function(*made)
