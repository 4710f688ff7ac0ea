"""Golden files: what a test pins, where it is kept, and what all tests of a run did with theirs.

`zerograph.pytest_plugin` is built on it. Every test run of an environment with zerograph imports this file,
so nothing in it imports torch.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

import pytest

from zerograph.changes import changes, unified

SHOWN = 150
"""Lines of a diff that a failure shows; -vv shows all."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*"
_NAME = re.compile(f"{_PART}(/{_PART})*")
_SUFFIX = re.compile(r"\.[a-z0-9]+")
_MINOR = re.compile(r"\d+\.\d+")


class HasText(Protocol):
    """A Plan or a Document."""

    def text(self, *, skeleton: bool = False) -> str: ...


@dataclass
class Ledger:
    """What the tests of one process did with goldens; the processes of pytest-xdist merge theirs."""

    used: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By path: a digest of the text that a test gave, and the test."""
    written: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    """Folders of goldens that belong to collected tests."""
    clashes: list[str] = field(default_factory=list)
    stale: list[Path] = field(default_factory=list)
    """Goldens that no test used, where that was asked for and all tests ran."""
    deselected: int = 0

    def use(self, path: str, digest: str, test: str) -> str:
        """Note a use; answer what is wrong with it, or nothing."""
        other, by = self.used.setdefault(path, (digest, test))
        if other == digest:
            return ""
        clash = f"{path} is given two texts, by {by} and by {test}; give each its own name"
        self.clashes.append(clash)
        return clash

    def data(self) -> dict[str, Any]:
        """What `merge` takes, of types that pytest-xdist can send."""
        return {
            "used": {path: list(use) for path, use in self.used.items()},
            "written": sorted(self.written),
            "folders": sorted(self.folders),
            "deselected": self.deselected,
        }

    def merge(self, data: Mapping[str, Any]) -> None:
        """Take in what another process noted."""
        for path, (digest, test) in data["used"].items():
            self.use(path, digest, test)
        self.written |= set(data["written"])
        self.folders |= set(data["folders"])
        self.deselected = max(self.deselected, data["deselected"])

    def unused(self) -> list[Path]:
        """Goldens in the folders that no test used."""
        suffixes = {".txt", *(Path(path).suffix for path in self.used)}
        files = {file for folder in self.folders for file in Path(folder).rglob("*")}
        return sorted(f for f in files if f.suffix in suffixes and str(f) not in self.used)


LEDGER = pytest.StashKey[Ledger]()


@dataclass(frozen=True)
class GraphGolden:
    """What the fixture `graph_golden` is: call it with what to pin, and a name."""

    config: pytest.Config
    folder: Path
    test: str

    def __call__(
        self,
        given: HasText | str,
        name: str,
        *,
        skeleton: bool = False,
        torch: str | None = None,
        suffix: str = ".txt",
    ) -> None:
        """Fail unless `given` is what the golden `name` holds; write it with --accept-graphs.

        Args:
            given: A plan or a document, whose canonical text is compared; or a text, such as a diff.
            name: The file's name without suffix, in the folder of goldens; it may lie deeper, `a/b`.
            skeleton: Compare the skeleton, which torch's decompositions do not change, in
                `<name>.skeleton.txt`.
            torch: The minor version of torch ("2.13") whose decompositions a full text shows; the
                test is skipped on others. A skeleton is compared on all.
            suffix: The suffix of the file.
        """
        __tracebackhide__ = True
        path = self.folder / _file(name, skeleton, suffix)
        text = _text(given, skeleton)
        digest = hashlib.sha256(text.encode()).hexdigest()
        said = self.config.stash[LEDGER].use(str(path), digest, self.test)
        if not said:
            if torch is not None and not skeleton:
                _skip_unless(torch)
            said = self._compared(path, text)
        if said:
            pytest.fail(said, pytrace=False)

    def _compared(self, path: Path, text: str) -> str:
        """What to say where `path` holds something else; nothing when that is accepted."""
        pinned = path.read_text(encoding="utf-8") if path.is_file() else None
        if pinned == text:
            return ""
        if self.config.getoption("accept_graphs"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
            self.config.stash[LEDGER].written.add(str(path))
            return ""
        make = f"pytest --accept-graphs {shlex.quote(self.test)}"
        if pinned is None:
            return f"there is no golden {shown(self.config, path)}; to make it: {make}"
        diff = unified(pinned, text, (shown(self.config, path), "now"))
        mend = f"if this is meant: {make}, then read git diff"
        return "\n".join([*self._readable(diff), "", *changes(pinned, text), mend])

    def _readable(self, diff: list[str]) -> list[str]:
        hidden = len(diff) - SHOWN
        if hidden <= 0 or self.config.get_verbosity() >= 2:
            return diff
        return [*diff[:SHOWN], f"... {hidden} more lines; -vv shows all"]


def shown(config: pytest.Config, path: Path) -> str:
    """A path as a person knows it: below the root of the tests, if it lies there."""
    below = path.is_relative_to(config.rootpath)
    return (path.relative_to(config.rootpath) if below else path).as_posix()


def _file(name: str, skeleton: bool, suffix: str) -> PurePosixPath:
    __tracebackhide__ = True
    if not _NAME.fullmatch(name) or not _SUFFIX.fullmatch(suffix):
        allowed = "letters, digits, '_', '.', '+', '=' and '-', in folders a/b if need be"
        pytest.fail(f"{name + suffix!r} cannot name a golden; it may have {allowed}", pytrace=False)
    return PurePosixPath(name + (".skeleton" if skeleton else "") + suffix)


def _text(given: object, skeleton: bool) -> str:
    __tracebackhide__ = True
    if isinstance(given, str):
        if skeleton:
            raise TypeError(
                "a str has no skeleton; give graph_golden a plan, or leave skeleton out"
            )
        return given if given.endswith("\n") else f"{given}\n"
    if not callable(getattr(given, "text", None)):
        kind = type(given).__name__
        raise TypeError(f"graph_golden takes a plan, a document or a str, got {kind}")
    return cast(HasText, given).text(skeleton=skeleton)


def _skip_unless(minor: str) -> None:
    __tracebackhide__ = True
    if not _MINOR.fullmatch(minor):
        raise ValueError(f"torch={minor!r}: give a minor version, such as torch='2.13'")
    import torch

    if not torch.__version__.startswith(f"{minor}."):
        pytest.skip(f"this golden shows the decompositions of torch {minor}")
