"""What the report and the traces read of a recording: spans that a rank measured, by node."""

from collections.abc import Sequence
from typing import Protocol

from zerograph.document import Document
from zerograph.errors import PlanError


class Timed(Protocol):
    """What takes time, in seconds from some start."""

    @property
    def start(self) -> float: ...

    @property
    def seconds(self) -> float: ...


class RecordedSpan(Timed, Protocol):
    """One node's measured time on its stream, in seconds from the start of the step."""

    @property
    def node(self) -> int:
        """Index in `Document.nodes`."""

    @property
    def region(self) -> str: ...

    @property
    def stream(self) -> str: ...


class Recorded(Protocol):
    """One measured step of one rank."""

    @property
    def model(self) -> str: ...

    @property
    def stage(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def spans(self) -> Sequence[RecordedSpan]: ...


def rows_of(spans: Sequence[Timed]) -> list[int]:
    """A row for each of a stream's spans, which are sorted by start, so that none overlaps in its row.

    Collectives overlap where one starts before another has been waited for.
    """
    ends: list[float] = []
    found: list[int] = []
    for span in spans:
        row = next((i for i, end in enumerate(ends) if end <= span.start + 1e-9), len(ends))
        ends[row : row + 1] = [span.start + span.seconds]
        found.append(row)
    return found


def check_recording(document: Document, recording: Recorded) -> None:
    """Raise PlanError, in one line, for a recording of another plan."""
    planned = (document.model, document.stage, document.world)
    ran = (recording.model, recording.stage, recording.world)
    if planned != ran:
        raise PlanError(
            f"the recording is of {_named(ran)}, the plan of {_named(planned)}; record the run of this plan"
        )
    last = max((span.node for span in recording.spans), default=-1)
    if last >= len(document.nodes):
        raise PlanError(
            f"the recording has a node {last}, the plan has {len(document.nodes)} nodes; "
            "record the run of this plan"
        )


def _named(of: tuple[str, int, int]) -> str:
    model, stage, world = of
    return f"{model} at stage {stage} on {world} ranks"
