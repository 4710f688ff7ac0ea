"""Moments of a run: seconds on the host, or on CUDA an event on the stream that computes."""

import time
from typing import cast

import torch

Mark = float | torch.cuda.Event
"""A moment: seconds of the host's clock, or an event."""


def now(device: torch.device) -> Mark:
    """This moment of what computes on `device`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds(begin: Mark, end: Mark) -> float:
    """From one moment to another of the same device; waits for an event that is still to come."""
    if isinstance(begin, torch.cuda.Event):
        end.synchronize()  # type: ignore[union-attr]
        return float(begin.elapsed_time(end)) / 1e3  # type: ignore[arg-type]
    return cast(float, end) - begin
