"""The programs of an engine: which one a call runs, when one is added, and which one goes.

    first call of a kind                   a static program, for its sizes alone
    a dim's second distinct size           a program in which that dim has a symbol
    a size of 0 or 1, a broken guard       one more program

A kind is all of a call but the sizes (runtime/key.py). Programs are looked through in the order in which
they were added, so that a static one serves its own sizes. A forward that cannot be captured with
symbols gets a static program for each of its shapes.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import count

from zerograph.errors import AgreementError, ProgramWarning
from zerograph.runtime.key import Call
from zerograph.runtime.run import Compiled

MAX_PROGRAMS = 32
"""Programs that an engine keeps. Beyond it the least recently used one goes, of those whose backward
is not outstanding."""

WARN_BEYOND = 3
"""Programs that may be added for calls of the same structure without a warning."""

Dims = frozenset[tuple[int, int]]
"""Dims of a call's tensors, as (index of the tensor, dim)."""
Make = Callable[[Dims], Compiled]
"""Captures the call at hand, with these dims dynamic."""


@dataclass(eq=False)
class Entry:
    """A program, and the sizes that it is for: those of the captured call, but for the dynamic dims."""

    compiled: Compiled
    shapes: tuple[tuple[int, ...], ...]
    dynamic: Dims
    used: int = 0

    def fits(self, call: Call) -> bool:
        return self._fits_sizes(call) and self.compiled.traced.reads.hold(call.module)

    def _fits_sizes(self, call: Call) -> bool:
        if not self.dynamic:
            return call.shapes == self.shapes
        if any(True for _ in self._differing(call)):
            return False
        sizes = self.compiled.traced.graph.sizes
        return sizes.hold(sizes.values(call.tensors))

    def obstacles(self, call: Call) -> list[str]:
        """Why it does not fit `call`, of its kind: other sizes, or broken guards, or other values."""
        differing = [
            f"{call.path(index)}.size({dim}) is {call.shapes[index][dim]} "
            f"(was {self.shapes[index][dim]})"
            for index, dim in self._differing(call)
        ]
        sizes = self.compiled.traced.graph.sizes
        broken = sizes.broken(sizes.values(call.tensors))
        assumed = [f"an earlier program is for {guard}" for guard in broken]
        return differing or assumed or self.compiled.traced.reads.changed(call.module)

    def _differing(self, call: Call) -> Iterator[tuple[int, int]]:
        """Dims whose sizes are others than the program's and not free."""
        for index, (own, asked) in enumerate(zip(self.shapes, call.shapes)):
            for dim, (mine, size) in enumerate(zip(own, asked)):
                if size != mine and (size < 2 or (index, dim) not in self.dynamic):
                    yield index, dim


@dataclass
class Kind:
    """The programs of one kind of call, oldest first, and what was seen of its sizes."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the first call."""
    entries: list[Entry] = field(default_factory=list)
    varied: set[tuple[int, int]] = field(default_factory=set)
    """Dims that had another size in a later call."""
    static: bool = False
    """Whether capture with symbols failed."""

    def dynamic(self, call: Call) -> Dims:
        """The dims that a new program for `call` takes as dynamic."""
        dims = [(i, d) for i, shape in enumerate(call.shapes) for d in range(len(shape))]
        self.varied |= {(i, d) for i, d in dims if call.shapes[i][d] != self.shapes[i][d]}
        if self.static:
            return frozenset()
        return frozenset((i, d) for i, d in self.varied if call.shapes[i][d] > 1)


@dataclass
class Programs:
    """All programs of one engine."""

    model: str
    kinds: dict[Hashable, Kind] = field(default_factory=dict)
    _clock: Iterator[int] = field(default_factory=count)
    _added: Counter[Hashable] = field(default_factory=Counter)
    _last: dict[Hashable, dict[str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(kind.entries) for kind in self.kinds.values())

    def clear(self) -> None:
        self.kinds.clear()

    def waiting(self) -> bool:
        """Whether a backward of some program is outstanding."""
        gc.collect()  # an output in a reference cycle may be gone already
        return any(e.compiled.waiting for kind in self.kinds.values() for e in kind.entries)

    def find(self, call: Call, make: Make) -> Compiled:
        """The program for `call`; `make` captures it if there is none."""
        kind = self.kinds.get(call.kind)
        if kind is None:
            kind = Kind(call.shapes)
        entry = next((e for e in kind.entries if e.fits(call)), None)
        if entry is None:
            entry = self._make(call, kind, make)
            earlier = list(kind.entries)
            kind.entries.append(entry)
            self.kinds[call.kind] = kind
            self._evict(entry)
            self._warn(call, earlier)
        entry.used = next(self._clock)
        return entry.compiled

    def _make(self, call: Call, kind: Kind, make: Make) -> Entry:
        dims = kind.dynamic(call)
        if dims:
            try:
                return Entry(make(dims), call.shapes, dims)
            except AgreementError:
                raise
            except Exception as error:
                compiled = make(frozenset())
                kind.static = True
                reason = "\n".join(str(error).strip().splitlines()[:6])
                _say(
                    f"{self.model} cannot be captured with sizes that vary, so every new shape of its "
                    "inputs is a new capture; pad them to a few shapes. The reason:\n"
                    f"{type(error).__name__}: {reason}"
                )
                return Entry(compiled, call.shapes, frozenset())
        return Entry(make(frozenset()), call.shapes, frozenset())

    def _warn(self, call: Call, earlier: list[Entry]) -> None:
        """Say what was new if calls of this structure have had enough programs."""
        facts = call.facts()
        family = call.family(facts)
        before = self._last.get(family, {})
        self._last[family] = facts
        self._added[family] += 1
        if self._added[family] <= WARN_BEYOND:
            return
        changed = [f"{n} is {v} (was {before[n]})" for n, v in facts.items() if v != before[n]]
        found = min((e.obstacles(call) for e in reversed(earlier)), key=len, default=changed)
        _say(
            f"program {self._added[family]} of {self.model} for inputs of one structure: "
            f"{', '.join(found) or 'an earlier one was for it and has gone'}. Every program takes as long "
            "as the first call did; pad sizes that the forward depends on to a few, and pass values "
            "that vary as tensors"
        )

    def _evict(self, new: Entry) -> None:
        while len(self) > MAX_PROGRAMS:
            entries = [e for kind in self.kinds.values() for e in kind.entries]
            idle = [e for e in entries if e is not new and not e.compiled.waiting]
            if not idle:
                return
            oldest = min(idle, key=lambda e: e.used)
            for key, kind in list(self.kinds.items()):
                if oldest in kind.entries:
                    kind.entries.remove(oldest)
                    if not kind.entries:
                        del self.kinds[key]


def _say(message: str) -> None:
    """Warn at the user's call of the engine."""
    warnings.warn(message, ProgramWarning, stacklevel=5)
