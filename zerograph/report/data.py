"""The data that the report's script reads: a Document in columns, each string and line once.

strings   region, module, bucket and operator names; elsewhere an index
lines     text (as it is) and region, module, bucket by index
passes    texts as runs of line indices: first, length, first, length, ...
nodes     one column a field; times in whole nanoseconds
alive     one column a category, each number as the difference from the one before
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from zerograph.blocks import Block, blocks_of, collective_kind, folded_name, folds
from zerograph.document import Document, PassEntry
from zerograph.report.recorded import Recorded


def payload(document: Document, recording: Recorded | None) -> dict[str, Any]:
    """Everything that the script draws, ready for JSON."""
    strings = _Strings()
    blocks = blocks_of(document)
    return {
        "model": document.model,
        "memory": document.memory.model_dump(mode="json"),
        "time": document.time.model_dump(mode="json"),
        "kernels": document.kernels,
        "buckets": [[b.name, b.block] for b in document.buckets],
        "passes": [_pass(entry) for entry in document.passes],
        "lines": {
            "text": [line.text for line in document.lines],
            "region": strings.all(line.region for line in document.lines),
            "module": strings.all(line.module for line in document.lines),
            "bucket": strings.all(line.bucket for line in document.lines),
        },
        "nodes": _nodes(document, strings),
        "alive": [_differences(column) for column in zip(*(n.alive for n in document.nodes))],
        "blocks": [_block(block) for block in blocks],
        "folds": [
            [folded_name([block.name for block in run]), len(run)]
            for run in folds(blocks, lambda b: b.name, lambda b: b.shape)
        ],
        "measured": None if recording is None else _measured(recording),
        "strings": strings.found(),
    }


class _Strings:
    """Distinct strings, by the order in which they were first asked for."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def all(self, names: Iterable[str]) -> list[int]:
        return [self._index.setdefault(name, len(self._index)) for name in names]

    def found(self) -> list[str]:
        return list(self._index)


def _pass(entry: PassEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "did": entry.did,
        "full": _runs(entry.full),
        "skeleton": _runs(entry.skeleton),
    }


def _runs(indices: Sequence[int]) -> list[int]:
    found: list[int] = []
    for index in indices:
        if found and found[-2] + found[-1] == index:
            found[-1] += 1
        else:
            found += [index, 1]
    return found


def _differences(column: Sequence[int]) -> list[int]:
    return [*column[:1], *(b - a for a, b in pairwise(column))]


def _nodes(document: Document, strings: _Strings) -> dict[str, list[int]]:
    nodes = document.nodes
    return {
        "op": strings.all(n.op for n in nodes),
        "region": strings.all(n.region for n in nodes),
        "module": strings.all(n.module for n in nodes),
        "bucket": strings.all(n.bucket for n in nodes),
        "stream": strings.all(n.stream for n in nodes),
        "kind": strings.all(collective_kind(n) for n in nodes),
        "nbytes": [n.nbytes for n in nodes],
        "flops": [n.flops for n in nodes],
        "moved": [n.moved for n in nodes],
        "start": [_nanoseconds(n.start) for n in nodes],
        "seconds": [_nanoseconds(n.seconds) for n in nodes],
        "line": lines_of_nodes(document),
    }


def lines_of_nodes(document: Document) -> list[int]:
    """The index in `Document.lines` of each node's line in the last pass's text; -1 without a text.

    A region's text is its head, one line for each node in order, and what it returns.
    """
    texts: dict[str, list[int]] = {}
    for index in document.passes[-1].full:
        texts.setdefault(document.lines[index].region, []).append(index)
    of_region: dict[str, Iterator[int]] = {r: iter(t[1:]) for r, t in texts.items()}
    return [next(of_region.get(node.region, iter(())), -1) for node in document.nodes]


def _block(block: Block) -> dict[str, Any]:
    return {
        "name": block.name,
        "buckets": [b.name for b in block.buckets],
        "params": sum(len(b.params) for b in block.buckets),
        "numel": sum(b.numel for b in block.buckets),
        "parts": {
            region: {
                "nodes": part.nodes,
                "flops": part.flops,
                "seconds": part.seconds,
                "collectives": part.collectives,
            }
            for region, part in block.parts.items()
        },
    }


def _measured(recording: Recorded) -> dict[str, Any]:
    spans = sorted(recording.spans, key=lambda s: (s.start, s.node))
    return {
        "rank": recording.rank,
        "node": [s.node for s in spans],
        "region": [s.region for s in spans],
        "stream": [s.stream for s in spans],
        "start": [_nanoseconds(s.start) for s in spans],
        "seconds": [_nanoseconds(s.seconds) for s in spans],
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
