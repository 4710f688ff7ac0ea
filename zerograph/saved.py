"""Saved: plain data that is kept as a JSON file and read again (a plan, a recording, a cluster)."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from zerograph.errors import PlanError

S = TypeVar("S", bound="Saved")


class Entry(BaseModel):
    """A part of what is saved: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Saved(Entry):
    """A whole file. The JSON has its keys in the order of the class, and is the same byte for byte."""

    called: ClassVar[str]
    """What errors call such a file: "a saved plan"."""
    indent: ClassVar[int | None] = None
    """Spaces, for a file that people edit."""

    def dumps(self) -> str:
        """The JSON of the file."""
        separators = (",", ":") if self.indent is None else None
        given = self.model_dump(mode="json")
        return json.dumps(given, indent=self.indent, separators=separators) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        Path(path).write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def load(cls: type[S], path: str | os.PathLike[str]) -> S:
        """Read a file. Raises PlanError, in one line, for one that is none of these."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise PlanError(
                f"{path} is not {cls.called}: the file: Invalid JSON: {error}"
            ) from error
        cls._check_format(path, given)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise PlanError(f"{path} is not {cls.called}: {where}: {first['msg']}") from error

    @classmethod
    def _check_format(cls, path: str | os.PathLike[str], given: Any) -> None:
        field = cls.model_fields.get("format")
        found = given.get("format") if isinstance(given, dict) else None
        if field is not None and isinstance(found, int) and found != field.default:
            raise PlanError(
                f"{path} is {cls.called} of format {found}, and this zerograph reads format "
                f"{field.default}; save it again"
            )
