"""A plan, and a recorded or profiled run of it, as a trace for Perfetto or chrome://tracing.

One process "predicted" and one "measured", each with a thread a stream, and more where the measured
collectives of a stream overlap, since the slices of a thread may not. A slice is named by its operator, so
that all gathers have one colour. The counter "memory" of the predicted process has one series a category.
Times are microseconds, as the format has them (Trace Event Format, Google, 2016).
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from zerograph.document import Document, NodeEntry
from zerograph.measured import CallEntry, Measured, StretchEntry
from zerograph.report.data import lines_of_nodes
from zerograph.report.recorded import Recorded, check_recording, rows_of

PREDICTED, MEASURED = 1, 2
THREADS = {"compute": 100, "communication": 200, "copy": 300}
Event = dict[str, Any]


def chrome_trace(
    document: Document, recording: Recorded | None = None, *, profile: Measured | None = None
) -> str:
    """The JSON of a trace, with a recorded step or some profiled ones.

    Raises PlanError for a recording of another plan.
    """
    events = [*_names(PREDICTED, "predicted"), *_predicted(document), *_memory(document)]
    if recording is not None:
        check_recording(document, recording)
        events += _names(MEASURED, f"measured on rank {recording.rank}")
        events += _measured(document, recording)
    if profile is not None:
        events += _names(MEASURED, f"measured on rank {profile.rank}")
        events += _profiled(profile)
    other = {"model": document.model, "stage": document.stage, "world": document.world}
    trace = {"displayTimeUnit": "ms", "otherData": other, "traceEvents": events}
    return json.dumps(trace, separators=(",", ":")) + "\n"


def _names(process: int, name: str) -> Iterator[Event]:
    """Names and order of a process and its threads."""
    yield _meta(process, 0, "process_name", name=name)
    yield _meta(process, 0, "process_sort_index", sort_index=process)
    for stream in THREADS:
        yield from _thread(process, stream, 0)


def _thread(process: int, stream: str, row: int) -> Iterator[Event]:
    thread = THREADS[stream] + row
    yield _meta(process, thread, "thread_name", name=f"{stream} {row + 1}" if row else stream)
    yield _meta(process, thread, "thread_sort_index", sort_index=thread)


def _meta(process: int, thread: int, kind: str, **args: Any) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": args}


def _predicted(document: Document) -> Iterator[Event]:
    for node, args in zip(document.nodes, _arguments(document)):
        if node.stream:
            yield _slice(PREDICTED, node, THREADS[node.stream], node.start, node.seconds, args)


def _measured(document: Document, recording: Recorded) -> Iterator[Event]:
    arguments = list(_arguments(document))
    for stream, thread in THREADS.items():
        spans = [span for span in recording.spans if span.stream == stream]
        spans.sort(key=lambda s: (s.start, s.node))
        rows = rows_of(spans)
        for row in range(1, max(rows, default=0) + 1):
            yield from _thread(MEASURED, stream, row)
        for span, row in zip(spans, rows):
            node, args = document.nodes[span.node], arguments[span.node]
            yield _slice(MEASURED, node, thread + row, span.start, span.seconds, args)


def _slice(
    process: int, node: NodeEntry, thread: int, start: float, seconds: float, args: dict[str, Any]
) -> Event:
    return _event(process, node.op, node.region, thread, start, start + seconds, args)


def _event(
    process: int,
    name: str,
    region: str,
    thread: int,
    start: float,
    end: float,
    args: dict[str, Any],
) -> Event:
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": name,
        "cat": region,
        "ts": _microseconds(start),
        "dur": _microseconds(end - start),
        "args": args,
    }


def _profiled(profile: Measured) -> Iterator[Event]:
    """What programs computed between waits; collectives in rows, in which none overlaps another."""
    for stretch in profile.stretches:
        for start, end in _between_waits(stretch, profile.calls):
            name = region = stretch.region
            yield _event(MEASURED, name, region, THREADS["compute"], start, end, {})
    thread, calls = THREADS["communication"], sorted(profile.calls, key=lambda call: call.start)
    rows = rows_of(calls)
    for row in range(1, max(rows, default=0) + 1):
        yield from _thread(MEASURED, "communication", row)
    for call, row in zip(calls, rows):
        args = {
            "region": call.region,
            "bucket": call.bucket,
            "bytes": call.nbytes,
            "waited us": _microseconds(sum(end - start for start, end in call.waits)),
            "end": "" if call.seen else "not seen: this is an upper bound",
        }
        given = {name: value for name, value in args.items() if value != ""}
        name = f"zero.{call.kind}"
        yield _event(MEASURED, name, call.region, thread + row, call.start, call.end, given)
        for start, end in call.waits:
            named = f"wait {call.bucket or call.kind}"
            yield _event(MEASURED, named, call.region, THREADS["compute"], start, end, given)


def _between_waits(
    stretch: StretchEntry, calls: Sequence[CallEntry]
) -> Iterator[tuple[float, float]]:
    """The parts of a program's run in which it waited for nothing."""
    now = stretch.start
    for start, end in sorted(wait for call in calls for wait in call.waits):
        if stretch.start <= start < stretch.end:
            yield now, start
            now = end
    yield now, stretch.end


def _arguments(document: Document) -> Iterator[dict[str, Any]]:
    """What is shown of each node when its slice is chosen."""
    for node, line in zip(document.nodes, lines_of_nodes(document)):
        found = {
            "region": node.region,
            "module": node.module,
            "bucket": node.bucket,
            "bytes": node.nbytes,
            "flops": node.flops,
            "line": " ".join(document.lines[line].text.split()) if line >= 0 else "",
        }
        yield {name: value for name, value in found.items() if value}


def _memory(document: Document) -> Iterator[Event]:
    """The counter: of the nodes that are reached at one time, the one that holds most."""
    at: dict[float, NodeEntry] = {}
    for time, node in _reached(document):
        if time not in at or sum(node.alive) > sum(at[time].alive):
            at[time] = node
    for time, node in at.items():
        series = dict(zip(document.memory.categories, node.alive))
        yield {"ph": "C", "pid": PREDICTED, "name": "memory", "ts": time, "args": series}


def _reached(document: Document) -> Iterator[tuple[float, NodeEntry]]:
    """When each node is reached: compute at its start, any other when the compute before it ends."""
    now = 0.0
    for node in document.nodes:
        if node.stream == "compute":
            now = max(now, node.start)
        yield _microseconds(now), node
        if node.stream == "compute":
            now = max(now, node.start + node.seconds)


def _microseconds(seconds: float) -> float:
    """Microseconds with three digits: a nanosecond is the finest that is meant."""
    return round(seconds * 1e6, 3)
