"""Recording a real run, node by node, aligned with the plan.

    with zerograph.record(engine) as run:
        train_a_step(engine)
    run.save("run.json")

While it records, programs are interpreted one node at a time; otherwise they run as compiled, and this
file has no part in it. On the CPU a node's time is that of its call. On CUDA it is the time between two
events on the stream that computes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import fx

from zerograph.engine import Engine
from zerograph.errors import PlanError
from zerograph.nodes import REGIONS, Region, region_of
from zerograph.passes.lower import Program, starts_collective, waits_for_collective
from zerograph.plan import Plan
from zerograph.recording import Recording, SpanEntry
from zerograph.runtime.clock import Mark, now, seconds
from zerograph.runtime.run import execute


@dataclass(frozen=True)
class _Ran:
    """One node of the plan; `node` counts from the first of its region."""

    node: int
    region: Region
    stream: Literal["compute", "communication"]
    begin: Mark
    end: Mark


@dataclass
class Run:
    """What was recorded: the last complete step, from its last forward to its update."""

    engine: Engine
    _latest: dict[str, list[_Ran]] = field(default_factory=dict)
    """What ran last of each region."""
    _complete: list[_Ran] = field(default_factory=list)
    _plan: Plan | None = None

    @property
    def recording(self) -> Recording:
        """The last complete step. Raises PlanError if none was recorded."""
        if self._plan is None:
            raise PlanError(
                "no complete step was recorded; run the forward, the backward and engine.step() up to an "
                "update within `with zerograph.record(engine)`"
            )
        graph = self._plan.graph
        regions = [region_of(node) for node in graph.nodes()]
        origin = self._complete[0].begin
        spans = [
            SpanEntry(
                node=regions.index(ran.region) + ran.node,
                region=ran.region,
                stream=ran.stream,
                start=seconds(origin, ran.begin),
                seconds=seconds(ran.begin, ran.end),
            )
            for ran in self._complete
        ]
        return Recording(
            model=graph.model,
            stage=graph.stage,
            world=graph.world,
            rank=self.engine.world.rank,
            spans=tuple(sorted(spans, key=lambda span: (span.start, span.node))),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `recording` as JSON."""
        self.recording.save(path)

    def execute(self, program: Program, inputs: list[Any]) -> tuple[Any, ...]:
        """Run a program node by node and note when."""
        timed = _Timed(program, self.engine.device)
        returned = cast(tuple[Any, ...], timed.boxed_run(inputs))
        self._latest[program.region] = timed.ran()
        if program.region == "step" and self._latest.keys() == set(REGIONS):
            self._complete = [ran for region in REGIONS for ran in self._latest.pop(region)]
            self._plan = self.engine.plan
        return returned


@contextmanager
def record(engine: Engine) -> Iterator[Run]:
    """Record what `engine` runs within the block: one rank's view; other ranks may record or not."""
    run = Run(engine)
    engine.execute_with(run.execute)
    try:
        yield run
    finally:
        engine.execute_with(execute)


class _Timed(fx.Interpreter):
    """Interprets a program; one span a node of the plan, and one a collective up to its wait."""

    def __init__(self, program: Program, device: torch.device) -> None:
        super().__init__(program.module)
        self._program = program
        self._device = device
        self._found: dict[tuple[int, str], _Ran] = {}
        nodes = program.module.graph.nodes
        self._collectives = {n.meta["plan"] for n in nodes if starts_collective(n)}

    def run_node(self, n: fx.Node) -> Any:
        if "plan" not in n.meta:
            return super().run_node(n)
        begin = now(self._device)
        result = super().run_node(n)
        self._note(n, begin, now(self._device))
        return result

    def ran(self) -> list[_Ran]:
        return list(self._found.values())

    def _note(self, n: fx.Node, begin: Mark, end: Mark) -> None:
        index = n.meta["plan"] - self._program.first
        if waits_for_collective(n):
            started = cast(fx.Node, n.args[0]).meta.get("plan", -1)
            if started in self._collectives:
                self._extend(started - self._program.first, "communication", begin, end)
            else:  # another region, or the step before, has started it
                self._extend(index, "compute", begin, end)
        elif n.meta["plan"] in self._collectives:
            self._extend(index, "communication", begin, end)
        else:
            self._extend(index, "compute", begin, end)

    def _extend(
        self, index: int, stream: Literal["compute", "communication"], begin: Mark, end: Mark
    ) -> None:
        earlier = self._found.get((index, stream))
        made = _Ran(index, self._program.region, stream, begin, end)
        self._found[index, stream] = made if earlier is None else replace(earlier, end=end)
