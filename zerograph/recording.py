"""Recording: when each node of a plan ran in a real step, as plain data beside the plan's Document.

    {"format": 1, "model": .., "stage": .., "world": .., "rank": .., "spans": [{"node": 12, ..}, ..]}

`zerograph.record` makes it; the report draws it under the predicted timeline of the same plan.
"""

from typing import ClassVar, Literal

from pydantic import Field

from zerograph.saved import Entry, Saved


class SpanEntry(Entry):
    """One node's time. A collective's span goes from its start to the end of its wait."""

    node: int = Field(ge=0)
    """Index into `Document.nodes` of the plan that ran."""
    region: Literal["forward", "backward", "step"]
    stream: Literal["compute", "communication", "copy"]
    start: float
    """Seconds from the start of the step."""
    seconds: float = Field(ge=0)


class Recording(Saved):
    """One step of one rank. Spans are in the order in which they started."""

    called: ClassVar[str] = "a recording"

    format: Literal[1] = 1
    model: str
    stage: int
    world: int
    rank: int
    spans: tuple[SpanEntry, ...]

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return max((span.start + span.seconds for span in self.spans), default=0.0)

    def busy(self, stream: str) -> float:
        """Seconds of all spans of a stream."""
        return sum(span.seconds for span in self.spans if span.stream == stream)
