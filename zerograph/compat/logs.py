"""torch's structured trace, which `tlparse` turns into pages."""

from collections.abc import Callable
from typing import Any

from torch._logging import _internal


def trace_text(name: str, text: Callable[[], str]) -> None:
    """Add `text()` to the trace in TORCH_TRACE as an artifact; without a trace it is not called."""
    handler: Any = _internal.LOG_TRACE_HANDLER
    if handler is None or handler.root_dir is None:
        return
    _internal.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,
    )
