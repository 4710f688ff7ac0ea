"""Plan: the rewritten graph of one training step, with what it costs. No ranks, no GPU, no weights.

    plan = zerograph.plan(model, config, example_inputs=batch, world_size=1024)
    print(plan)                  canonical text
    plan.history["gather"]       the text after a pass
    plan.memory, plan.traffic    predicted, per rank
    plan.kernels()               sources of the kernels that it runs, by name
    print(plan.diff(other))

For the same model, inputs, config, world size and device it is byte for byte `engine.plan`.
"""

import os
from dataclasses import dataclass
from functools import cached_property

from zerograph.changes import unified
from zerograph.codegen.of_plan import SOURCES, Used, files, kernels_of, target_for
from zerograph.config import ZeroConfig
from zerograph.cost import (
    Cluster,
    Memory,
    Timeline,
    Traffic,
    cluster_of,
    collective_bytes,
    memory_of,
    name_of,
    timeline_of,
    traffic_of,
)
from zerograph.countable import Countable
from zerograph.describe import describe
from zerograph.document import Document
from zerograph.errors import PlanError, suggestion
from zerograph.ir import TrainGraph
from zerograph.mesh import named
from zerograph.nodes import Region, axis_of, is_ahead, is_call, region_of
from zerograph.ops import COLLECTIVES, gather_ahead
from zerograph.optimizer import OptimizerSpec
from zerograph.passes.lower import GroupName, Lower, Program, unnamed
from zerograph.pipeline import History
from zerograph.precision import short
from zerograph.text import text
from zerograph.units import size


@dataclass(frozen=True)
class Plan(Countable):
    """A planned training step. Immutable; `str` is its canonical text."""

    graph: TrainGraph
    history: History
    config: ZeroConfig
    optimizer: OptimizerSpec | None

    def __str__(self) -> str:
        return self.text()

    def text(self, *, skeleton: bool = False) -> str:
        """The canonical text; the skeleton folds runs of aten ops."""
        return text(self.graph, self.history.names()[-1], skeleton=skeleton)

    @cached_property
    def memory(self) -> Memory:
        """Predicted bytes on one rank."""
        return memory_of(self.graph)

    @cached_property
    def traffic(self) -> dict[str, Traffic]:
        """Collectives of one step by kind, with the bytes of their full buffers."""
        return traffic_of(self.graph)

    def timeline(self, cluster: Cluster | str = "cpu") -> Timeline:
        """When each node starts and ends, predicted for one rank of a described cluster."""
        return timeline_of(self.graph, _cluster(cluster))

    def document(self, cluster: Cluster | str = "cpu") -> Document:
        """All that this plan shows as plain data, to save, diff and draw; times are on `cluster`."""
        return describe(
            self.graph,
            self.history,
            self.config,
            self.memory,
            self.signature(),
            _cluster(cluster),
            files(self._kernels),
        )

    def kernels(self, target: str | None = None) -> dict[str, str]:
        """The complete source of every kernel that the step launches, by the kernel's name.

        `target` is "cpp" or "triton"; by default what runs on the device that is planned for. On a CPU
        without a compiler, plain torch operations stand in for them.
        """
        if target is None:
            target = target_for(self.graph)
        if target not in SOURCES:
            raise PlanError(
                f"kernels are shown for no target {target!r}{suggestion(target, SOURCES)}"
            )
        return {used.spec.name: used.source(target) for used in self._kernels}

    @cached_property
    def _kernels(self) -> tuple[Used, ...]:
        spec = self.optimizer
        return kernels_of(self.graph, spec.rule if spec else None, spec.groups if spec else ())

    @cached_property
    def _described(self) -> Document:
        return self.document()

    def _document(self) -> Document:
        return self._described

    def save(self, path: str | os.PathLike[str], cluster: Cluster | str = "cpu") -> None:
        """Write `document(cluster)` as JSON; `zerograph show`, `diff` and `report` read it."""
        self.document(cluster).save(path)

    @property
    def advisory(self) -> tuple[str, ...]:
        """Config keys that were given, and that only advise or match what happens anyway."""
        return self.config.advisory(self.graph.mesh.model)

    def signature(self, axis: str | None = None) -> list[str]:
        """The ordered collectives, one line each, of all axes or of one: what its ranks must agree on."""
        lines = []
        for node in self.graph.nodes():
            early = is_call(node, gather_ahead) and region_of(node) == "backward"
            told = axis is None or axis_of(node) == axis
            if told and (early or is_call(node, *COLLECTIVES)):
                bucket = next((a for a in node.args if isinstance(a, str)), "-")
                value = node.meta["val"]
                kind = named(f"{region_of(node)} {name_of(node)} {bucket}", axis_of(node))
                ahead = " ahead" if is_ahead(node) else ""
                lines.append(f"{kind} {collective_bytes(node)} bytes {short(value.dtype)}{ahead}")
        return lines

    def program(self, region: Region, group: GroupName = unnamed) -> Program:
        """One region lowered to collectives, aten ops and kernels."""
        return Lower(group).program(self.graph, region)

    def diff(self, other: "Plan", *, skeleton: bool = False) -> str:
        """A unified diff from this plan's text to `other`'s; empty if they are the same."""
        before, after = self.text(skeleton=skeleton), other.text(skeleton=skeleton)
        return "\n".join(unified(before, after))

    def short(self) -> str:
        """A few lines for a person: buckets, collectives, memory, and what the config advises."""
        memory, layout = self.memory, self.graph.layout
        count = sum(p.numel for p in layout.params.values())
        host = f"on the host {size(memory.host)}, " if memory.host else ""
        lines = [
            f"{self.graph.model}: {count:,} parameters in {len(layout.buckets)} buckets, "
            f"ZeRO stage {self.graph.stage}, {self.graph.world} ranks",
            *self.graph.mesh.lines(),
            f"precision: {self.graph.precision.describe()}",
            *(
                f"{name:<16} {t.count:>4} a step, {size(t.nbytes)}"
                for name, t in self.traffic.items()
            ),
            f"memory per rank  parameters {size(memory.parameters)}, gradients "
            f"{size(memory.gradients)}, optimizer {size(memory.optimizer)}, gathered at most "
            f"{size(memory.gathered)}, saved for backward {size(memory.saved)}, "
            f"{host}"
            f"peak {size(memory.peak)}",
            *(f"advises: {line}" for line in self.advisory),
        ]
        return "\n".join(lines)


def _cluster(given: Cluster | str) -> Cluster:
    return cluster_of(given) if isinstance(given, str) else given
