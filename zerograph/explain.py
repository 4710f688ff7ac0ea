"""What went wrong in a capture, in the user's terms: their line, the reason, and what to change."""

import linecache
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zerograph import compat
from zerograph.errors import CaptureError
from zerograph.integrations.transformers import changes

_TORCH = os.path.dirname(torch.__file__)

_CHANGES = (
    ("data-dependent branch", "compute both sides and choose with torch.where, or use torch.cond"),
    ("item()", "keep the value a tensor; `.item()` needs the data, which a graph does not have"),
    ("builtin `print`", "print what the forward returns, after the call"),
    ("graph_break", "remove the break, or move what needs it out of the forward"),
    (
        "pytree-flattenable",
        "pass plain containers: engine(**batch), or engine(dict(batch)) if the forward takes one mapping",
    ),
    ("nonzero", "use a mask of fixed shape (torch.where, multiplication) instead of selecting"),
    ("dynamic shape operator", "use a mask of fixed shape instead of selecting by a condition"),
)
"""A phrase in what dynamo says, and what to change."""

_UNHELPFUL = (
    "report an issue",
    "running eager",
    "graph break is fundamental",
    "reorderable_logging",
)


@contextmanager
def explained(model: nn.Module, call: Callable[[], Any], mode: FakeTensorMode) -> Iterator[None]:
    """Within, what capture raises becomes the forward's own exception, or a CaptureError.

    If the forward raises by itself (`call`, on fake tensors), that exception comes out, as it would
    without a capture. Otherwise a CaptureError shows the user's own source line.
    """
    try:
        yield
    except compat.DynamoError as error:
        own = _own_exception(call, mode, error)
        if own is not None:
            raise own from None
        raise CaptureError(explanation(model, error)) from error


def _own_exception(
    call: Callable[[], Any], mode: FakeTensorMode, captured: Exception
) -> Exception | None:
    """What the forward raises by itself, if it does not come from the tensors being fake.

    An exception out of torch's own code is believed only if the capture met an exception as well.
    """
    try:
        with mode:
            call()
    except Exception as error:
        unreal = type(error).__module__.startswith(
            ("torch._subclasses", "torch._dynamo", "torch.fx")
        )
        unreal |= _raised_in_torch(error) and not _met_an_exception(captured)
        unreal |= "_apply(): Couldn't swap" in str(error)  # Module.to() of fake parameters
        return None if unreal else error
    return None


def _raised_in_torch(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_TORCH)


def _met_an_exception(captured: Exception) -> bool:
    """Whether dynamo stopped since the forward raises, and not since it cannot trace it."""
    return (
        not isinstance(captured, compat.Unsupported) or "exception" in str(captured).split("\n")[0]
    )


def explanation(model: nn.Module, error: Exception) -> str:
    """The text of a CaptureError for what dynamo raised."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    why = _said(lines, "Explanation") or [reason]
    hints = [h for h in _said(lines, "Hint") if not any(u in h for u in _UNHELPFUL)]
    known = [change for phrase, change in _CHANGES if phrase.lower() in text.lower()]
    known = changes(model, text) + known
    change = (known + hints + ["rewrite it with tensor operations, or move it out of the forward"])[
        0
    ]
    return (
        f"{type(model).__name__}.forward cannot be captured as one graph: {reason}\n"
        f"{_user_line(error)}"
        f"  why:    {why[0]}\n"
        f"  change: {change}"
    )


def _said(lines: list[str], kind: str) -> list[str]:
    return [line.partition(": ")[2] for line in lines if line.startswith(f"{kind}: ")]


def _user_line(error: Exception) -> str:
    """The innermost frame that is not torch's."""
    frames = [f for f in compat.user_frames(error) if not f.filename.startswith(_TORCH)]
    if not frames:
        return ""
    frame = frames[-1]
    source = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"  at:     {frame.filename}:{frame.lineno} in {frame.name}\n            {source}\n"
