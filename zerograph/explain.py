"""What went wrong in a capture, in the user's terms: their line, the reason, and what to change."""

import linecache
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from zerograph import compat
from zerograph.errors import CaptureError
from zerograph.integrations.transformers import changes

_TORCH = os.path.dirname(torch.__file__)

_CHANGES = (
    ("data-dependent branch", "compute both sides and choose with torch.where, or use torch.cond"),
    ("item()", "keep the value a tensor; `.item()` needs the data, which a graph does not have"),
    ("builtin `print`", "print what the forward returns, after the call"),
    (
        "requires_grad_()",
        "give the engine an input that requires grad already (gradients are not differentiated again: a "
        "penalty on them cannot be trained)",
    ),
    (
        "autograd.grad",
        "compute the loss alone; gradients are not differentiated again, so a penalty on them cannot be "
        "trained",
    ),
    (
        "pack_padded_sequence",
        "give the recurrent layer the padded batch, and mask what is behind each length in the loss",
    ),
    ("graph_break", "remove the break, or move what needs it out of the forward"),
    (
        "pytree-flattenable",
        "pass plain containers: engine(**batch), or engine(dict(batch)) if the forward takes one mapping",
    ),
    (
        "data-dependent expression",
        "keep what is computed of a tensor a tensor; a BatchNorm needs a `momentum` that is a number",
    ),
    (
        "module>.random.",
        "draw with torch (`torch.rand(())`) and choose with torch.where, or draw in the training loop and "
        "pass the number as a tensor",
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
    except SyntaxError as error:  # of dynamo's own code, which then has no outputs to return
        raise CaptureError(
            f"{type(model).__name__}.forward returns its results in a container that it was given and "
            "changed; return a new one (`{**batch, 'hidden': hidden}`)"
        ) from error


def refuse_unknown_sizes(model: nn.Module, captured: compat.Captured) -> None:
    """Raise CaptureError where a size, or a Python number, is known only once a tensor's values are."""
    for node in captured.module.graph.nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        if not any(map(compat.depends_on_data, tree_leaves(value))):
            continue
        if isinstance(value, compat.SYMBOLIC):
            what = "a Python number is made of a tensor's value"
            why = "the graph is captured once, and would keep the number of that call"
            change = (
                "keep it a tensor: divide, multiply and compare without `.item()`, int() or float()"
            )
        else:
            what = "a size depends on the values of a tensor"
            why = "the plan knows all sizes, and the bytes of every collective, before it runs"
            change = (
                "multiply by a mask, or choose with torch.where, instead of selecting; of experts, "
                "compute each on all rows, or on as many as its capacity (`topk`)"
            )
        raise CaptureError(
            f"{type(model).__name__}.forward cannot be captured as one graph: {what}\n"
            f"{_line_of(node)}"
            f"  why:    {why}\n"
            f"  change: {change}"
        )


def _line_of(node: fx.Node) -> str:
    """The innermost line that dynamo noted for a node, and that is not torch's."""
    noted = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    for file, line, function in reversed(noted):
        if not file.startswith(_TORCH):
            return _at(file, int(line), function, linecache.getline(file, int(line)))
    return ""


def _own_exception(
    call: Callable[[], Any], mode: FakeTensorMode, captured: Exception
) -> Exception | None:
    """What the forward raises by itself, if it does not come from the tensors being fake.

    An exception out of torch's own code is believed only if the capture met an exception as well.
    """
    try:
        with mode, compat.quiet():
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
    source = frame.line or linecache.getline(frame.filename, frame.lineno or 0)
    return _at(frame.filename, frame.lineno or 0, frame.name, source)


def _at(file: str, line: int, function: str, source: str) -> str:
    return f"  at:     {file}:{line} in {function}\n            {source.strip()}\n"
