"""The overview: the figures of a Document as rows of words, which the page shows without a script."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from zerograph.blocks import folded_name, folds
from zerograph.document import BucketEntry, Document
from zerograph.report.colours import kind_of
from zerograph.report.recorded import Recorded
from zerograph.units import count, duration, percent, size


@dataclass(frozen=True)
class Row:
    """A row of a table, with the share of the largest row that its bar shows."""

    name: str
    cells: tuple[str, ...]
    share: float = 0.0
    colour: str = ""
    """The name of a CSS variable, or empty."""


def facts(document: Document, recording: Recorded | None) -> list[tuple[str, str]]:
    """The headline figures: name and value."""
    found = [
        ("ZeRO stage", str(document.stage)),
        ("ranks", f"{document.world:,}"),
        ("parameters", count(sum(b.numel for b in document.buckets))),
        ("peak memory", size(document.memory.peak)),
        *([("on the host", size(document.memory.host))] if document.memory.host else []),
        ("communication", size(sum(t.nbytes for t in document.traffic.values()))),
        ("step, predicted", duration(document.time.step)),
    ]
    if recording is not None:
        ends = (span.start + span.seconds for span in recording.spans)
        found.append(("step, measured", duration(max(ends, default=0.0))))
    return found


def config_rows(document: Document) -> list[tuple[str, str]]:
    """The config keys that were given, with dots, and their values as JSON."""

    def flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from flat(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            yield prefix, json.dumps(value)

    return list(flat("", document.config)) if document.config else []


def bucket_rows(document: Document) -> list[Row]:
    """The buckets, repeated layers in one row."""
    runs = folds(document.buckets, lambda b: b.block, _shape)
    most = max((b.numel for b in document.buckets), default=1)
    return [_bucket_row(run, most) for run in runs]


def traffic_rows(document: Document) -> list[Row]:
    """The collectives of a step by kind, the largest first."""
    most = max((t.nbytes for t in document.traffic.values()), default=1)
    found = sorted(document.traffic.items(), key=lambda item: (-item[1].nbytes, item[0]))
    return [
        Row(name, (f"{t.count:,}", size(t.nbytes)), t.nbytes / (most or 1), f"c-{kind_of(name)}")
        for name, t in found
    ]


def memory_rows(document: Document) -> list[Row]:
    """What is alive at the peak, by category, in the order in which it is stacked."""
    memory = document.memory
    if memory.peak_node < 0:
        return []
    alive = document.nodes[memory.peak_node].alive
    return [
        Row(name, (size(held), percent(held, memory.peak)), held / (memory.peak or 1), f"m-{name}")
        for name, held in zip(memory.categories, alive)
    ]


def time_rows(document: Document) -> list[Row]:
    """Where the predicted step goes."""
    time = document.time
    longest = max(time.step, time.compute, time.communication) or 1.0
    named = [
        ("compute", time.compute, "s-products"),
        ("communication", time.communication, "c-gather"),
        ("compute waits for communication", time.waited, ""),
    ]
    return [Row(name, (duration(s),), s / longest, colour) for name, s, colour in named]


def skeleton(document: Document) -> str:
    """The skeleton of the last text."""
    return document.text(skeleton=True)


def _shape(bucket: BucketEntry) -> tuple[object, ...]:
    return bucket.dtype, bucket.trainable, bucket.numel, len(bucket.params)


def _bucket_row(run: list[BucketEntry], most: int) -> Row:
    first = run[0]
    named = first.name if len(run) == 1 else f"{first.name} .. {run[-1].name}"
    times = "" if len(run) == 1 else f"\N{MULTIPLICATION SIGN} {len(run)}"
    cells = (
        named,
        times,
        str(len(first.params)),
        first.dtype,
        f"{first.numel:,}",
        f"{first.shard_numel:,}",
        "" if first.trainable else "frozen",
    )
    return Row(folded_name([b.block for b in run]), cells, first.numel / (most or 1))
