"""Blocks: what each block of a document's model does in each region, with runs of alike blocks folded.

An 80-layer model has 80 blocks that differ in a number alone. `folds` finds such runs, so that a drawing
shows `model.layers.0 .. 79` once, with what one of its layers does.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from zerograph.document import BucketEntry, Document, NodeEntry

T = TypeVar("T")


class Collective(NamedTuple):
    """One collective of a block: its kind, bucket, bytes of the full buffer, and index of its node."""

    kind: str
    bucket: str
    nbytes: int
    node: int


@dataclass(frozen=True)
class Part:
    """What a block does in one region."""

    nodes: int
    flops: int
    seconds: float
    """Predicted seconds of its compute."""
    collectives: tuple[Collective, ...]


@dataclass(frozen=True)
class Block:
    """One block: its buckets, and its parts by region. The block "" is what belongs to no bucket."""

    name: str
    buckets: tuple[BucketEntry, ...]
    parts: dict[str, Part]

    @property
    def shape(self) -> Hashable:
        """Equal for blocks that do the same on buckets of the same size."""
        buckets = tuple((b.dtype, b.trainable, b.numel, len(b.params)) for b in self.buckets)
        parts = tuple(
            (region, part.flops, tuple((c.kind, c.nbytes) for c in part.collectives))
            for region, part in self.parts.items()
        )
        return buckets, parts


def blocks_of(document: Document) -> tuple[Block, ...]:
    """The blocks in the order of their buckets; the block "" comes last, if it does anything."""
    buckets: dict[str, list[BucketEntry]] = defaultdict(list)
    for bucket in document.buckets:
        buckets[bucket.block].append(bucket)
    nodes: dict[str, dict[str, list[tuple[int, NodeEntry]]]] = defaultdict(dict)
    owner = _owner(document)
    for index, node in enumerate(document.nodes):
        nodes[owner(node)].setdefault(node.region, []).append((index, node))
    names = [*buckets, *([""] if "" in nodes else [])]
    return tuple(
        Block(
            name,
            tuple(buckets.get(name, ())),
            {region: _part(found) for region, found in nodes[name].items()},
        )
        for name in names
    )


def folds(
    items: Sequence[T], name: Callable[[T], str], shape: Callable[[T], Hashable]
) -> list[list[T]]:
    """`items` cut into runs of the same shape whose names count up by one."""
    runs: list[list[T]] = []
    for item in items:
        before = runs[-1][-1] if runs else None
        alike = before is not None and shape(before) == shape(item)
        if before is not None and alike and _follows(name(before), name(item)):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def folded_name(names: Sequence[str]) -> str:
    """`model.layers.0 .. 79` for the names of a run."""
    first, last = _split(names[0]), _split(names[-1])
    shown = (a if a == b else f"{a} .. {b}" for a, b in zip(first, last))
    return "".join(shown)


def collective_kind(node: NodeEntry) -> str:
    """`gather` for a zero.gather; empty for a node that is no collective."""
    kind = node.op.removeprefix("zero.").removesuffix(
        "_ahead"
    )  # the start of a gather stands for it
    return kind if node.stream == "communication" else ""


def _part(found: list[tuple[int, NodeEntry]]) -> Part:
    nodes = [node for _, node in found]
    return Part(
        nodes=len(nodes),
        flops=sum(n.flops for n in nodes),
        seconds=sum(n.seconds for n in nodes if n.stream == "compute"),
        collectives=tuple(_collectives(found)),
    )


def _collectives(found: list[tuple[int, NodeEntry]]) -> Iterator[Collective]:
    for index, node in found:
        kind = collective_kind(node)
        if kind:
            yield Collective(kind, node.bucket, node.nbytes, index)


def _owner(document: Document) -> Callable[[NodeEntry], str]:
    """The block that a node belongs to: that of its bucket, else of the nearest enclosing module."""
    of_bucket = {b.name: b.block for b in document.buckets}
    known = {"": ""}
    for bucket in document.buckets:
        for param in bucket.params:
            known[param.rpartition(".")[0]] = bucket.block
    known |= {b.block: b.block for b in document.buckets}

    def of_module(module: str) -> str:
        if module not in known:
            known[module] = of_module(module.rpartition(".")[0])
        return known[module]

    return lambda node: of_bucket.get(node.bucket) or of_module(node.module)


def _split(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _follows(before: str, after: str) -> bool:
    first, second = _split(before), _split(after)
    other = [(a, b) for a, b in zip(first, second) if a != b]
    if len(first) != len(second) or len(other) != 1:
        return False
    a, b = other[0]
    return a.isdigit() and b.isdigit() and int(b) == int(a) + 1
