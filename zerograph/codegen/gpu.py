"""Triton kernels: made from generated source, launched on CUDA and ROCm tensors.

Triton is imported by the first kernel, never by importing zerograph. Python's line cache gets the source,
from which Triton compiles and tracebacks quote. Contraction is off, so that every target gives the same
bits. With TRITON_INTERPRET=1 set before Triton is first imported, kernels run on CPU tensors.
"""

import linecache
from functools import cache
from typing import Any

import torch

from zerograph.codegen.launch import Settings, settings
from zerograph.codegen.render import render
from zerograph.codegen.spec import Spec


@cache
def available() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def module(source: str, name: str) -> dict[str, Any]:
    """The names that `source` defines, kernels among them."""
    file = f"<zerograph kernel {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {"__name__": f"zerograph.generated.{name}"}
    exec(compile(source, file, "exec"), made)
    return made


def kernel(spec: Spec, suffix: str = "") -> Any:
    """The kernel of `spec`, or another of its file by the end of its name."""
    return module(render(spec, "triton"), spec.name)[spec.name + suffix]


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942"; "" for the interpreter."""
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(found.gcnArchName).split(":")[0]
    return f"sm_{found.major}{found.minor}"


def chosen(family: str, device: torch.device) -> Settings:
    return settings(family, architecture(device))


def launch(kernel: Any, grid: tuple[int, ...], warps: int, *args: Any, **constants: int) -> None:
    """Run `kernel` on the current stream of the device of its tensors."""
    first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if first.device.type != "cuda":
        kernel[grid](*args, **constants)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*args, **constants, **options)
