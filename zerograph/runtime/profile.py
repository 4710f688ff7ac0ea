"""Profile: what communication costs in a real run, while programs run as compiled.

    profile = engine.profile(5)        begins at once, ends by itself after five updates
    with engine.profile(5) as profile: or with its block, if that is earlier

A loop of training is seldom made of blocks of five steps, so a profile needs one line before the loop; it
is a context manager for those that are, and for a loop that fails.

How it is measured is said in watch.py. A profile is of this rank and this engine. What was started before it
is not in it; of the backend's own collectives neither is what is waited for after it. Its end waits for what
is under way. While it runs, a process group's timeout counts from a collective's start, not from its wait.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zerograph.cost import Cluster, cluster_of
from zerograph.errors import PlanError
from zerograph.export import chrome_trace
from zerograph.measured import CallEntry, Collective, Measured, StretchEntry
from zerograph.mesh import named
from zerograph.passes.lower import Program
from zerograph.plan import Plan
from zerograph.runtime.clock import Mark, now, seconds
from zerograph.runtime.run import execute
from zerograph.runtime.watch import Call, Watch

if TYPE_CHECKING:
    from zerograph.engine import Engine

_log = logging.getLogger("zerograph")

BLOCKED = 50e-6
"""Seconds from which on a wait for one of the backend's own collectives has seen it end."""


@dataclass
class Profile:
    """Made by `engine.profile(steps)`. `print` shows it as a table."""

    engine: "Engine"
    steps: int
    """Updates after which it ends by itself."""
    watch: Watch
    done: int = 0
    """Updates so far."""
    running: bool = True
    _ran: list[tuple[str, Mark, Mark]] = field(default_factory=list)
    """Regions, with when they began and ended."""
    _plan: Plan | None = None
    """Of the last update."""
    _origin: Mark | None = None
    """When the first program began."""
    _measured: Measured | None = None

    @classmethod
    def begin(cls, engine: "Engine", steps: int) -> "Profile":
        """Begin now. Raises PlanError if `steps` is less than 1, or `engine` is watched already."""
        if not isinstance(steps, int) or steps < 1:
            raise PlanError(f"engine.profile(steps) needs a number of updates, got {steps!r}")
        made = cls(engine, steps, Watch(engine.world))
        engine.execute_with(made.execute)
        return made

    def end(self) -> None:
        """End it now; nothing if it has ended."""
        if self.running:
            self._stop(settled=True)
            self._measured = self._taken()
            if self.engine.world.rank == 0:
                _log.info("%s over %d steps", self._measured.line(), self.done)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()
        elif self.running:
            self._stop(settled=False)  # what is under way may never come

    def __str__(self) -> str:
        return str(self.measured)

    @property
    def measured(self) -> Measured:
        """All of it as plain data. Raises PlanError while the profile runs."""
        if self.running:
            raise PlanError(
                f"the profile has seen {self.done} of {self.steps} updates; read it after the last one, "
                "or end() it"
            )
        if self._measured is None:
            self._measured = self._taken()
        return self._measured

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """What each collective of the plan took, over all steps."""
        return self.measured.collectives

    def save(self, path: str | os.PathLike[str], cluster: Cluster | str = "cpu") -> None:
        """Write a chrome trace: the step as predicted on `cluster`, and the measured steps."""
        plan = self._plan or self.engine.plan
        Path(path).write_text(chrome_trace(plan.document(cluster), profile=self.measured))

    # Inside

    def execute(self, program: Program, inputs: list[Any]) -> tuple[Any, ...]:
        """Run a program, and note when; after the last update end."""
        with self.watch.running(program) as module:
            begin = now(self.engine.device)
            self._origin = self._origin or begin
            returned = cast(tuple[Any, ...], module(inputs))
            self._ran.append((program.region, begin, now(self.engine.device)))
        if program.region == "step":
            self.done, self._plan = self.done + 1, self.engine.plan
            if self.done == self.steps:
                self.end()
        return returned

    def _stop(self, settled: bool) -> None:
        self.running = False
        self.engine.execute_with(execute)
        self.watch.end(settled)

    def _taken(self) -> Measured:
        """What was noted, in seconds from the start of the first program."""
        engine = self.engine
        return Measured(
            model=type(engine.module).__name__,
            stage=engine.state.stage,
            world=engine.world.size,
            rank=engine.world.rank,
            steps=self.done,
            calls=tuple(self._entries()),
            stretches=tuple(
                StretchEntry(region, self._since(begin), self._since(end))
                for region, begin, end in self._ran
            ),
        )

    def _entries(self) -> Iterator[CallEntry]:
        link, mesh = cluster_of("cpu"), self.engine.world.mesh
        for call in self.watch.calls:
            if call.ended is None:
                continue
            waits = tuple((self._since(begin), self._since(end)) for begin, end in list(call.waits))
            end, seen = self._end(call, waits)
            yield CallEntry(
                named(call.kind, call.axis),
                call.bucket,
                call.region,
                call.nbytes,
                sent=link.bytes_per_link(call.kind, call.nbytes, mesh.size(call.axis)),
                start=self._since(call.began),
                end=end,
                seen=seen,
                waits=waits,
            )

    def _end(self, call: Call, waits: tuple[tuple[float, float], ...]) -> tuple[float, bool]:
        """When a call had ended, and whether that was seen."""
        assert call.ended is not None
        ended = max([self._since(call.ended), *(end for _, end in waits)])
        return ended, not call.native or any(end - begin > BLOCKED for begin, end in waits)

    def _since(self, mark: Mark) -> float:
        return seconds(self._origin, mark) if self._origin is not None else 0.0
