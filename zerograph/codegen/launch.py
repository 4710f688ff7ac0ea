"""Launch settings of Triton kernels, from a table by family and architecture.

    settings("update", "sm_90")     Settings(block=1024, warps=8)

The table that comes with the package is launch.json. `zerograph tune` measures rows for the GPU at hand,
which come first, and writes them to launch.json in $ZEROGRAPH_CACHE, else in ~/.cache/zerograph/kernels.
Where it wrote them elsewhere, $ZEROGRAPH_LAUNCH names the file (empty: none is read).

Tables are static: nothing is tuned while training, so that ranks and runs agree. With fp32 state beside
bf16 gradients four elements a thread are best, that is 128-bit accesses of fp32.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zerograph.codegen import cpp
from zerograph.errors import KernelError, suggestion

Table = Mapping[str, Mapping[str, "Settings"]]
"""By family and architecture; "default" is for those without a row."""


@dataclass(frozen=True, order=True)
class Settings:
    block: int
    """Elements a program works on."""
    warps: int


FILE = "launch.json"
_tried: ContextVar[tuple[str, Settings] | None] = ContextVar("tried", default=None)


def settings(family: str, architecture: str) -> Settings:
    """Of "update", "norm", "total" (its second stage), "finish", "pack" or "unpack"."""
    tried = _tried.get()
    if tried is not None and tried[0] == family:
        return tried[1]
    own = _tuned(os.environ.get("ZEROGRAPH_LAUNCH"), os.environ.get("ZEROGRAPH_CACHE"))
    rows = {**shipped()[family], **own.get(family, {})}
    return rows.get(architecture, rows["default"])


@contextmanager
def trying(family: str, given: Settings) -> Iterator[None]:
    """`given` is what `settings` answers for `family`, whatever the tables say."""
    token = _tried.set((family, given))
    try:
        yield
    finally:
        _tried.reset(token)


@cache
def shipped() -> Table:
    """The package's own table."""
    return read(Path(__file__).with_name(FILE))


def place() -> Path | None:
    """Where the table of this machine is, or will be; None if it is turned off."""
    named = os.environ.get("ZEROGRAPH_LAUNCH")
    if named is not None:
        return Path(named) if named else None
    return cpp.place() / FILE


@cache
def _tuned(named: str | None, cache: str | None) -> Table:
    """The table at `place()`, read once for each pair of variables."""
    path = place()
    if path is None or (named is None and not path.is_file()):
        return {}
    return read(path)


def read(path: Path) -> Table:
    """A table from its file. Raises KernelError for one that is none."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return {f: {a: _row(**row) for a, row in rows.items()} for f, rows in given.items()}
    except OSError as error:
        raise KernelError(f"launch settings {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise KernelError(
            f"{path} is no table of launch settings ({error}); remove it, or write it with `zerograph tune`"
        ) from error


def _row(block: Any, warps: Any) -> Settings:
    for name, value in (("block", block), ("warps", warps)):
        if type(value) is not int or value < 1 or value & (value - 1):
            raise ValueError(f"{name} is {value!r}, not a power of two")
    return Settings(block, warps)


def write(path: Path, architecture: str, rows: Mapping[str, Settings]) -> None:
    """Put the rows of one architecture, by family, into a table's file, and leave its others."""
    table = {family: dict(own) for family, own in read(path).items()} if path.exists() else {}
    for family, own in rows.items():
        if family not in shipped():
            raise KernelError(f"no family of kernels {family!r}{suggestion(family, shipped())}")
        table.setdefault(family, {})[architecture] = own
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(_text(table), encoding="utf-8")
    os.replace(part, path)
    _tuned.cache_clear()


def _text(table: Table) -> str:
    """One line a family."""
    lines = [
        f"  {json.dumps(family)}: {json.dumps({a: asdict(own) for a, own in rows.items()})}"
        for family, rows in table.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"
