"""The pipeline: which passes run, in which order, and what is checked and kept between them.

A pass only changes the graph and says in a few words what it did. For each, the pipeline checks that what
it requires has been provided, runs it, drops dead code, lints, verifies the invariants, and keeps the
text. A pipeline with a pass missing is refused before anything runs.

The pipeline also logs: TORCH_LOGS="zerograph.passes" shows a line a pass, "+zerograph.passes" the text after
it too, and "+zerograph.passes.gather" those of one pass. TORCH_TRACE keeps the texts for tlparse.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from zerograph.compat import trace_text
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph, eliminate_dead_code
from zerograph.text import Line, forms, lines
from zerograph.verify import verify


class Pass(Protocol):
    """A frozen dataclass; its fields are its options."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    provides: ClassVar[frozenset[str]]

    def apply(self, graph: TrainGraph) -> str:
        """Change `graph` in place; answer what was done, in a few words."""
        ...


@dataclass(frozen=True)
class Record:
    """What one pass did: its words, the text after it, and the seconds that it and its check took."""

    name: str
    did: str
    lines: tuple[Line, ...]
    skeleton: tuple[Line, ...]
    seconds: float
    check_seconds: float

    @property
    def text(self) -> str:
        return "".join(f"{line.text}\n" for line in self.lines)


@dataclass
class History:
    """One record a pass, in order; looked up by the pass's name or position."""

    records: list[Record] = field(default_factory=list)

    def __getitem__(self, key: str | int) -> str:
        if isinstance(key, int):
            return self.records[key].text
        for record in self.records:
            if record.name == key:
                return record.text
        raise PlanError(f"no pass {key!r}; the passes are {', '.join(self.names())}")

    def __len__(self) -> int:
        return len(self.records)

    def names(self) -> list[str]:
        return [record.name for record in self.records]


def run(graph: TrainGraph, passes: Sequence[Pass], *, keep_text: bool = True) -> History:
    """Run `passes` on `graph` in order. `keep_text` keeps the text after each (larger plans)."""
    _check_order(passes)
    history = History()
    provided = frozenset({"traced"})
    verify(graph, provided, "trace")
    history.records.append(_record("trace", "captured", graph, 0.0, 0.0, keep_text))
    _log(history, graph)
    for each in passes:
        start = time.perf_counter()
        did = each.apply(graph)
        eliminate_dead_code(graph)
        done = time.perf_counter()
        graph.graph.lint()
        provided |= each.provides
        verify(graph, provided, each.name)
        checked = time.perf_counter()
        seconds, check_seconds = done - start, checked - done
        history.records.append(_record(each.name, did, graph, seconds, check_seconds, keep_text))
        _log(history, graph)
    return history


def _record(
    name: str, did: str, graph: TrainGraph, seconds: float, check: float, keep_text: bool
) -> Record:
    full, skeleton = forms(graph, name) if keep_text else ((), ())
    return Record(name, did, tuple(full), tuple(skeleton), seconds, check)


def _log(history: History, graph: TrainGraph) -> None:
    """Tell torch's logs and trace of the last record; nothing is made where they are off."""
    record = history.records[-1]
    log = logging.getLogger(f"zerograph.passes.{record.name}")

    def text() -> str:
        found = record.lines or lines(graph, record.name)
        return "".join(f"{line.text}\n" for line in found)

    if log.isEnabledFor(logging.INFO):
        took = f"{record.seconds:.3f} s, check {record.check_seconds:.3f} s"
        log.info("%s: %s (%s)", record.name, record.did, took)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", text())
    trace_text(f"zerograph_{len(history) - 1}_{record.name}", text)


def _check_order(passes: Sequence[Pass]) -> None:
    provided = {"traced"}
    done: list[str] = []
    for each in passes:
        missing = each.requires - provided
        if missing:
            raise PlanError(
                f"pass {each.name} requires {', '.join(sorted(missing))}, which no pass before it "
                f"provides (passes so far: {', '.join(done) or 'none'})"
            )
        provided |= each.provides
        done.append(each.name)
