"""torch's structured trace, which `tlparse` turns into pages."""

from collections.abc import Callable

from torch._logging._internal import trace_structured


def trace_text(name: str, text: Callable[[], str]) -> None:
    """Add `text()` to the trace in TORCH_TRACE as an artifact; without a trace it is not called."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,
    )
