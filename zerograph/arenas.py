"""Arenas: memory for what the forward keeps for the backward, a row for each value.

What `zero.place` runs as, where the operator that makes a value does not write it there itself; and where a
value lies in its arena, a tensor [values, length]. runtime/arenas.py has the arenas.
"""

import torch
from torch import Tensor


def row(arena: Tensor, place: int, like: Tensor) -> Tensor:
    """The memory of a value with the shape and strides of `like`, without gaps, in row `place`."""
    return arena.as_strided(like.shape, like.stride(), place * arena.stride(0))


def keep(value: Tensor, arena: Tensor, place: int) -> Tensor:
    """A copy of `value` in row `place` of `arena`."""
    return row(arena, place, value).copy_(value)


def lies_in(value: Tensor, arena: Tensor, place: int) -> bool:
    """Whether `value` is in row `place` of `arena`, and in no memory but that."""
    start = arena.data_ptr() + place * arena.stride(0) * arena.element_size()
    fits = value.numel() <= arena.shape[1] and value.dtype == arena.dtype
    return fits and value.data_ptr() == start


def empty(count: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    """New memory for an arena of `count` elements [count]."""
    return torch.empty(count, dtype=dtype, device=device, pin_memory=pinned)
