"""What people read: tables of a Document, by rich; plain text where the output is no terminal."""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from zerograph.document import BucketEntry, Document
from zerograph.fit import ROOT
from zerograph.units import duration, size

_WIDE = 1000
"""Columns where the output is no terminal: no line is broken."""


def show(parts: Iterable[RenderableType]) -> None:
    """Print, without blanks at the ends of lines."""
    console = Console(
        highlight=False,
        markup=False,
        emoji=False,
        width=None if sys.stdout.isatty() else _WIDE,
    )
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def title(text: str) -> Text:
    return Text(text, style="bold")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines; columns whose name begins with ">" are right-aligned."""
    made = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=True)
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    for row in rows:
        made.add_row(*row)
    return made


def plan_parts(document: Document) -> Iterator[RenderableType]:
    """What `zerograph plan` prints of a plan."""
    count = sum(math.prod(shape) for shape in document.parameters().values())
    yield title(
        f"{document.model}  ZeRO stage {document.stage}  {document.world:,} ranks  "
        f"{count:,} parameters in {len(document.buckets)} buckets"
    )
    if document.mesh:
        yield Text(document.mesh)
    yield Text(f"precision  {document.precision}")
    yield Text()
    yield title("buckets")
    yield table(
        ("name", "block", ">params", "type", ">elements", ">a rank"), _bucket_rows(document.buckets)
    )
    yield Text()
    yield title("communication of a step")
    yield table(("collective", ">count", ">bytes"), _traffic_rows(document))
    yield Text()
    yield title("memory of a rank")
    yield table(("", ">bytes"), _memory_rows(document))
    yield from _peak(document)
    yield Text()
    yield title(f"time of a step on {document.time.cluster}")
    time = document.time
    named = ("compute", "communication", "waited", "step")
    yield table(("", ">predicted"), [(n, duration(getattr(time, n))) for n in named])
    if document.advisory:
        yield Text()
        yield title("keys of the config that only advise")
        yield from (Text(f"  {line}") for line in document.advisory)


def fold(buckets: Sequence[BucketEntry]) -> list[list[BucketEntry]]:
    """Runs of buckets that differ in the numbers of their layers alone."""
    runs: list[list[BucketEntry]] = []
    for bucket in buckets:
        if runs and _kind(runs[-1][-1]) == _kind(bucket):
            runs[-1].append(bucket)
        else:
            runs.append([bucket])
    return runs


def _kind(bucket: BucketEntry) -> tuple[object, ...]:
    params = tuple(_without_numbers(name) for name in bucket.params)
    block = _without_numbers(bucket.block)
    return block, params, bucket.shapes, bucket.dtype, bucket.trainable


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def _bucket_rows(buckets: Sequence[BucketEntry]) -> Iterator[Sequence[str]]:
    for run in fold(buckets):
        first, last = run[0], run[-1]
        name, block = first.name, first.block
        if len(run) > 1:
            name, block = f"{name} .. {last.name}", f"{block} .. {last.block}  x{len(run)}"
        kind = first.dtype if first.trainable else f"{first.dtype} frozen"
        yield (
            name,
            block,
            str(len(first.params)),
            kind,
            f"{first.numel:,}",
            f"{first.shard_numel:,}",
        )


def _traffic_rows(document: Document) -> Iterator[Sequence[str]]:
    for kind, traffic in document.traffic.items():
        yield kind, f"{traffic.count:,}", size(traffic.nbytes)
    if not document.traffic:
        yield "none", "", ""


def _memory_rows(document: Document) -> Iterator[Sequence[str]]:
    memory = document.memory
    yield "parameters", size(memory.parameters)
    yield "gradients kept", size(memory.gradients)
    yield "optimizer states", size(memory.optimizer)
    yield "buffers", size(memory.buffers)
    yield "gathered at most", size(memory.gathered)
    yield "saved for backward", size(memory.saved)
    if memory.host:
        yield "on the host at most", size(memory.host)
    yield "peak", size(memory.peak)


def _peak(document: Document) -> Iterator[RenderableType]:
    memory = document.memory
    if memory.peak_node < 0:
        return
    node = document.nodes[memory.peak_node]
    yield Text()
    yield title(f"at the peak, {node.op} in the {node.region}{_of(node.module or node.bucket)}")
    alive = dict(zip(memory.categories, node.alive))
    rows = [(name, size(n)) for name, n in alive.items() if n]
    if memory.kept_at_peak:
        rows.append(("of activations, kept for backward", size(memory.kept_at_peak)))
    if memory.host_at_peak:
        rows.append(("beside it, on the host", size(memory.host_at_peak)))
    yield table(("", ">bytes"), rows)
    if memory.at_peak:
        largest = [(h.owner or ROOT, h.category, size(h.bytes)) for h in memory.at_peak[:5]]
        yield Text()
        yield table(("largest holders", "of", ">bytes"), largest)


def _of(module: str) -> str:
    return f" of {module}" if module else ""
