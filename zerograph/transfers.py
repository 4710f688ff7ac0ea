"""Copies between the device and the host's memory: what `zero.offload` and `zero.reload` run as.

On CUDA they run on a stream of their own, one for each device and in the order of their starts, from and to
pinned memory, which torch keeps for the next step. The stream begins a copy when what was issued before its
start is done; `wait` holds the stream that computes, not the host. Elsewhere a copy is done when it is
started. What is copied is held until the wait, so its storage ends no sooner than the copy.

The CUDA path is written and has not been run.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from zerograph.arenas import row


@dataclass
class Copy:
    """A copy under way."""

    source: Tensor | None
    target: Tensor
    done: torch.cuda.Event | None = None
    """Recorded behind the copy; None where it is done."""


def offload(value: Tensor, arena: Tensor | None = None, place: int = 0) -> Copy:
    """Start a copy of `value` to the host: pinned if it comes from CUDA, a tensor of its own on a CPU.

    With an arena [values, length], which is on the host, the copy is row `place` of it.
    """
    if arena is not None:
        return _start(value, row(arena, place, value), value.device)
    host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return _start(value, host, value.device)


def reload(host: Tensor, device: torch.device) -> Copy:
    """Start a copy of `host` to `device`; on a CPU there is one more copy."""
    return _start(host, torch.empty_like(host, device=device), device)


def wait(copy: Copy) -> Tensor:
    """The copy, for what is issued from now on; its source is let go of."""
    if copy.done is not None:
        torch.cuda.current_stream().wait_event(copy.done)
    copy.source = None
    return copy.target


def _start(source: Tensor, target: Tensor, device: torch.device) -> Copy:
    if device.type != "cuda":
        target.copy_(source)
        return Copy(source, target)
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        return Copy(source, target, stream.record_event())


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
