"""The pipeline: which passes run, in which order, and what is checked and kept between them.

A pass only changes the graph and says in a few words what it did. For each, the pipeline checks that what
it requires has been provided, runs it, drops dead code, lints and verifies the invariants. A pipeline with a
pass missing is refused before anything runs.

The text after each pass is made when it is asked for: passes answer the same for the same graph, so the
history runs them once more on the graph that they began with. Most plans are never read.

The pipeline also logs: TORCH_LOGS="zerograph.passes" shows a line a pass, "+zerograph.passes" the text after
it too, and "+zerograph.passes.gather" those of one pass. TORCH_TRACE keeps the texts for tlparse.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

from zerograph.compat import trace_text
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph, eliminate_dead_code
from zerograph.text import Line, forms, text
from zerograph.verify import verify

_START = "trace"


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
    """What one pass did: its words, and the seconds that it and its check took."""

    name: str
    did: str
    seconds: float
    check_seconds: float


Forms = tuple[tuple[Line, ...], tuple[Line, ...]]
"""The lines of the full text and of the skeleton."""


@dataclass
class History:
    """One record a pass, in order; `history["gather"]` is the text after that pass."""

    passes: Sequence[Pass]
    start: Callable[[], TrainGraph]
    """The graph that the first pass is given, anew."""
    records: list[Record] = field(default_factory=list)

    def __getitem__(self, key: str | int) -> str:
        """The text after a pass, by its name or position."""
        if isinstance(key, str):
            if key not in self.names():
                raise PlanError(f"no pass {key!r}; the passes are {', '.join(self.names())}")
            key = self.names().index(key)
        return _joined(self.forms[key][0])

    def __len__(self) -> int:
        return len(self.records)

    def names(self) -> list[str]:
        return [record.name for record in self.records]

    def texts(self) -> list[str]:
        """The text after each pass."""
        return [_joined(full) for full, _ in self.forms]

    @cached_property
    def forms(self) -> tuple[Forms, ...]:
        """The lines after each pass, which run for this once more."""
        graph = self.start()
        found = [forms(graph, _START)]
        for each in self.passes:
            each.apply(graph)
            eliminate_dead_code(graph)
            found.append(forms(graph, each.name))
        return tuple((tuple(full), tuple(skeleton)) for full, skeleton in found)


def run(
    graph: TrainGraph, passes: Sequence[Pass], start: Callable[[], TrainGraph] | None = None
) -> History:
    """Run `passes` on `graph` in order. `start` answers `graph` anew; by default a copy is kept for it."""
    _check_order(passes)
    history = History(passes, start or graph.copy().copy)
    provided = frozenset({"traced"})
    verify(graph, provided, _START)
    history.records.append(Record(_START, "captured", 0.0, 0.0))
    _log(history, graph)
    for each in passes:
        start_time = time.perf_counter()
        did = each.apply(graph)
        eliminate_dead_code(graph)
        done = time.perf_counter()
        graph.graph.lint()
        provided |= each.provides
        verify(graph, provided, each.name)
        seconds, check_seconds = done - start_time, time.perf_counter() - done
        history.records.append(Record(each.name, did, seconds, check_seconds))
        _log(history, graph)
    return history


def _joined(found: Sequence[Line]) -> str:
    return "".join(f"{line.text}\n" for line in found)


def _log(history: History, graph: TrainGraph) -> None:
    """Tell torch's logs and trace of the last record; nothing is made where they are off."""
    record = history.records[-1]
    log = logging.getLogger(f"zerograph.passes.{record.name}")

    def shown() -> str:
        return text(graph, record.name)

    if log.isEnabledFor(logging.INFO):
        took = f"{record.seconds:.3f} s, check {record.check_seconds:.3f} s"
        log.info("%s: %s (%s)", record.name, record.did, took)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", shown())
    trace_text(f"zerograph_{len(history) - 1}_{record.name}", shown)


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
