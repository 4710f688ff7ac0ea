"""How a gradient gets into its bucket's buffer: which `zero.put` is a kernel, and what it multiplies by.

    zero.put %b0.grad, %8 "w"     as it is, or cast              copy_
                                  scaled, LEAST elements or more  pack_f32_bf16, one pass
                                  scaled, small                   copy_, then mul_
    .. in place                   nothing (in_place.py)

At stages 2 and 3 the factor before the sum over ranks (`prescale_gradients`, `gradient_predivide_factor`) is
applied where gradients are put, so that no pass over the whole buffer is needed. What is cast is rounded
first and scaled then, as copy_ and mul_ do, so all three have the same bits. Nothing here runs anything.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from zerograph import ops
from zerograph.codegen.spec import SHORT, Copy
from zerograph.nodes import is_call

LEAST = 1 << 18
"""Elements from which a kernel gains on the CPU: one pass in place of two, behind a call that takes 10 us
(benchmarks/packing.py). A cast alone is one pass in copy_ as well, which is as fast at every size."""


def kernel_of(put: fx.Node) -> Copy | None:
    """The kernel that does a `zero.put`; None where copy_ does."""
    buffer, grad, _, _, size, stride = cast(tuple[Any, ...], put.args[:6])
    source, target = grad.meta["val"], buffer.meta["val"].dtype
    scale = scale_of(put)
    if scale == 1.0 or math.prod(size) < LEAST:
        return None
    if not {source.dtype, target} <= set(SHORT) or not _exact(scale, target):
        return None
    alike = same_layout(source.stride(), size, stride) and is_dense(size, stride)
    return Copy("pack", source.dtype, target) if alike else None  # else it is rearranged: copy_


def scale_of(put: fx.Node) -> float:
    """What a put's gradient is multiplied by: the factor before the sum of the reduction that follows."""
    node = put
    while users := [user for user in node.users if is_call(user, ops.put)]:
        node = users[0]
    for user in node.users:
        if is_call(user, ops.reduce_scatter, ops.all_reduce):
            pre, _, world = cast(tuple[float, float, int], user.args[2:])
            return pre if world > 1 else 1.0
    return 1.0


def is_scaled(buffer: fx.Node) -> bool:
    """Whether the puts that fill what a reduction sends have multiplied by its factor."""
    return is_call(buffer, ops.put, ops.grad_buffer)


def same_layout(one: Sequence[Any], size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether strides are the same where they say something; symbols are never compared."""
    pairs = [(a, b) for a, b, n in zip(one, other, size, strict=True) if n != 1]
    return all(isinstance(a, int) and a == b for a, b in pairs)


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements fill a range of memory, each place once."""
    expected = 1
    for step, count in sorted((s, n) for s, n in zip(stride, size, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= count
    return expected > 0


def _exact(scale: float, target: torch.dtype) -> bool:
    """Kernels take the scale in fp32, which is what torch multiplies by but in float64."""
    return target != torch.float64 or float(torch.tensor(scale, dtype=torch.float32)) == scale
