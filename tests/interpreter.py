"""Triton's interpreter, in a process of its own, where kernels run on CPU tensors.

The interpreter is chosen before Triton is first imported, and this process may have imported it. What it
computes otherwise than hardware is corrected: it truncates fp32 to bf16 where hardware rounds to the nearest
even, loses subnormal bf16 values, and before Triton 3.9 its fma rounds twice.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor


class Interpreter:
    """Calls functions of `zerograph.codegen.dispatch` on the target "triton"."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        with _interpreting():
            self._process = context.Process(target=_serve, args=(there,), daemon=True)
            self._process.start()

    def __call__(self, function: str, *args: Any, block: int = 0) -> Any:
        """Call it, with changes of tensors in `args` made here too.

        A rule is given by name. With `block`, programs work on that many elements.
        """
        self._here.send_bytes(pickle.dumps((function, args, block)))
        failed, result, changed = pickle.loads(self._here.recv_bytes())
        assert not failed, failed
        for mine, theirs in zip(_tensors(args), changed, strict=True):
            mine.copy_(theirs)
        return result

    def close(self) -> None:
        self._here.close()
        self._process.join(10)


@contextmanager
def _interpreting() -> Iterator[None]:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _serve(pipe: Connection) -> None:
    import torch

    from tests.mutants import register

    torch.set_num_threads(1)
    register()
    _correct()
    while True:
        try:
            function, args, block = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result = _call(function, args, block)
            answer = "", result, _tensors(args)
        except BaseException:
            answer = traceback.format_exc(), None, []
        pipe.send_bytes(pickle.dumps(answer))


def _call(function: str, args: Any, block: int) -> Any:
    from zerograph.codegen import dispatch, gpu
    from zerograph.codegen.launch import Settings, settings
    from zerograph.codegen.rules import RULES

    def chosen(family: str, device: object) -> Settings:
        own = settings(family, "")
        return Settings(block or own.block, own.warps)

    gpu.chosen = chosen
    given = [RULES[a] if isinstance(a, str) else a for a in args]
    return getattr(dispatch, function)(*given, target="triton")


def _correct() -> None:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    Handle = interpreter.TensorHandle
    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        ends = src.dtype.scalar, dst_type.scalar
        if ends == (tl.bfloat16, tl.float32):
            return Handle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if ends != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        data = rounded.view(torch.int16).numpy().view(np.uint16)
        return Handle(data, tl.bfloat16)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return Handle(_fma(x.data, y.data, z.data), z.dtype.scalar)

    builder.cast_impl = cast_impl
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        builder.create_fma = create_fma


def _fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c rounded once: in fp32 the float64 sum is rounded to odd, so the last rounding is right."""
    import numpy as np

    if c.dtype != np.float32:
        return a * b + c
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = np.atleast_1d(total).view(np.int64).copy()
    inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    bits = np.where(inexact, bits + towards, bits)
    return bits.view(np.float64).reshape(total.shape).astype(np.float32)
