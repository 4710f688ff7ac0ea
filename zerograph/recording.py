"""Recording: when each node of a plan ran in a real step, as plain data beside the plan's Document.

    {"format": 1, "model": .., "stage": .., "world": .., "rank": .., "spans": [{"node": 12, ..}, ..]}

`zerograph.record` makes it; the report draws it under the predicted timeline of the same plan.
"""

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zerograph.errors import PlanError

FORMAT: Literal[1] = 1


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpanEntry(_Entry):
    """One node's time. A collective's span goes from its start to the end of its wait."""

    node: int = Field(ge=0)
    """Index into `Document.nodes` of the plan that ran."""
    region: Literal["forward", "backward", "step"]
    stream: Literal["compute", "communication", "copy"]
    start: float
    """Seconds from the start of the step."""
    seconds: float = Field(ge=0)


class Recording(_Entry):
    """One step of one rank. Spans are in the order in which they started."""

    format: Literal[1] = FORMAT
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

    def dumps(self) -> str:
        """JSON, keys in the order of this class."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":")) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(self.dumps())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Recording":
        """A saved recording. Raises PlanError, in one line, for a file that is none."""
        try:
            return Recording.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise PlanError(f"{path} is not a recording: {where}: {first['msg']}") from error
