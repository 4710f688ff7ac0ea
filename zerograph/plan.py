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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from zerograph import pipeline
from zerograph.changes import unified
from zerograph.client import Client, Given, client_of
from zerograph.codegen.of_plan import SOURCES, Used, files, kernels_of, target_for
from zerograph.codegen.rules import RULES, Described, Kind
from zerograph.config import ZeroConfig, load_config
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
from zerograph.ir import Region, TrainGraph, is_call
from zerograph.layout import Layout, layout_of
from zerograph.ops import COLLECTIVES
from zerograph.passes import (
    Gather,
    Normalize,
    Reduce,
    Release,
    Scale,
    Schedule,
    Shard,
    Specialize,
    Update,
)
from zerograph.passes.lower import Lower, Program
from zerograph.passes.reduce import Average
from zerograph.pipeline import History
from zerograph.precision import precision_of, short
from zerograph.text import size, text
from zerograph.trace import Trace, trace


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer of a plan: its rule (or a user's class) and each parameter group's options."""

    rule: Kind
    groups: tuple[Mapping[str, Any], ...]

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state slices; a group with momentum decides for all."""
        return max((self.rule.states(group) for group in self.groups), key=len)

    @property
    def measures(self) -> bool:
        """Whether the rule needs norms of whole parameters."""
        return isinstance(self.rule, Described) and self.rule.apply is not None

    @property
    def label(self) -> str:
        """The rule and the options that change its code: sgd.momentum.nesterov."""
        if not isinstance(self.rule, Described):
            return self.rule.name
        variants = dict.fromkeys(self.rule.flags(group) for group in self.groups)
        return "|".join(".".join([self.rule.name, *sorted(flags)]) for flags in variants)


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
        return self.config.advisory()

    def signature(self) -> list[str]:
        """The ordered collectives, one line each: what all ranks must agree on."""
        lines = []
        for node in self.graph.nodes():
            if is_call(node, *COLLECTIVES):
                bucket = next((a for a in node.args if isinstance(a, str)), "-")
                value = node.meta["val"]
                kind = f"{node.meta['region']} {name_of(node)} {bucket}"
                lines.append(f"{kind} {collective_bytes(node)} bytes {short(value.dtype)}")
        return lines

    def program(self, region: Region, group: str = "dp") -> Program:
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
        lines = [
            f"{self.graph.model}: {count:,} parameters in {len(layout.buckets)} buckets, "
            f"ZeRO stage {self.graph.stage}, {self.graph.world} ranks",
            f"precision: {self.graph.precision.describe()}",
            *(
                f"{name:<16} {t.count:>4} a step, {size(t.nbytes)}"
                for name, t in self.traffic.items()
            ),
            f"memory per rank  parameters {size(memory.parameters)}, gradients "
            f"{size(memory.gradients)}, optimizer {size(memory.optimizer)}, gathered at most "
            f"{size(memory.gathered)}, saved for backward {size(memory.saved)}, "
            f"peak {size(memory.peak)}",
            *(f"advises: {line}" for line in self.advisory),
        ]
        return "\n".join(lines)


def plan(
    model: nn.Module,
    config: Mapping[str, Any] | str | os.PathLike[str] | ZeroConfig,
    *,
    example_inputs: Any,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    optimizer: Given | None = None,
    arriving: Sequence[str] | None = None,
) -> Plan:
    """Plan one training step of `model` under `config` for `world_size` ranks.

    `example_inputs` is a mapping (keyword arguments), a tuple or list (positional ones) or one
    tensor; only shapes, strides and dtypes are read. Model and inputs may be on the meta device; they are
    traced as fake tensors of `device`. `optimizer` is what `zerograph.compile` takes.
    `arriving` names the outputs whose gradients the backward is
    for; by default the loss alone, if there is one. Under `torch.no_grad()` the plan has no backward.

    Raises ConfigError, CaptureError or PlanError.
    """
    loaded = load_config(config)
    loaded.batch(world_size)
    client = None if optimizer is None else client_of(optimizer, model, loaded, param_groups)
    groups = client.groups if client else param_groups
    traced = trace_of(model, loaded, example_inputs, world_size, device, groups)
    return plan_of(traced, loaded, arriving, client)


def trace_of(
    model: nn.Module,
    config: ZeroConfig,
    example_inputs: Any,
    world_size: int,
    device: str | torch.device = "cpu",
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> Trace:
    """The trace that `plan` rewrites. It serves every config that differs from `config` in no precision."""
    precision = precision_of(model, config)
    layout = layout_of(model, world_size, precision, groups)
    args, kwargs = call_of(example_inputs)
    return trace(
        model, args, kwargs, layout=layout, precision=precision, device=torch.device(device)
    )


def _cluster(given: Cluster | str) -> Cluster:
    return cluster_of(given) if isinstance(given, str) else given


def call_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) of a call with `example_inputs`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def plan_of(
    traced: Trace,
    config: ZeroConfig,
    arriving: Sequence[str] | None = None,
    client: Client | None = None,
    *,
    keep_text: bool = True,
) -> Plan:
    """Run the passes on a copy of a traced graph. `keep_text` keeps the text after each."""
    graph = traced.graph.copy()
    if arriving is None:
        arriving = default_arriving(graph)
    spec = optimizer_of(config, graph.layout, client)
    history = pipeline.run(
        graph, passes_for(config, graph, tuple(arriving), spec), keep_text=keep_text
    )
    return Plan(graph, history, config, spec)


def default_arriving(graph: TrainGraph) -> tuple[str, ...]:
    """The loss, if the model returns one: an output so named, or a scalar as the first output."""
    names = [r.name for r in graph.results if r.differentiable]
    losses = [n for n in names if n.rpartition(".")[2] == "loss"]
    if losses:
        return tuple(losses)
    first = next((n for n in graph.outputs("forward") if n is not None), None)
    if (
        names
        and first is not None
        and first.meta["val"].dim() == 0
        and names[0] == graph.results[0].name
    ):
        return (names[0],)
    return tuple(names)


def passes_for(
    config: ZeroConfig, graph: TrainGraph, arriving: tuple[str, ...], spec: OptimizerSpec | None
) -> list[pipeline.Pass]:
    """The pipeline. Stages differ in what each pass inserts, not in which passes run."""
    zero = config.zero_optimization
    max_live = zero.stage3_max_live_parameters
    graph.notes["max_live"] = max_live
    graph.notes["accumulation"] = config.batch(graph.world).accumulation
    average = average_of(config, graph.world)
    weighted = config.compile.weighted_accumulation
    return [
        Normalize(recast=zero.stage == 3),
        Specialize(arriving),
        Scale(),
        Shard(zero.stage),
        Gather(zero.stage3_max_reuse_distance),
        Release(),
        Reduce(1.0 if weighted else 1 / config.batch(graph.world).accumulation, average),
        Update(
            rule=spec.label if spec else "",
            states=spec.states if spec else (),
            scalars=len(spec.rule.scalars) if spec else 0,
            average=average,
            max_norm=config.gradient_clipping,
            weighted=weighted,
            measures=spec.measures if spec else False,
        ),
        Schedule(prefetch=zero.stage3_prefetch_bucket_size, max_live=max_live),
    ]


def average_of(config: ZeroConfig, world: int) -> Average:
    """How the config's keys average gradients over ranks; the default divides after the sum."""
    if config.prescale_gradients:
        return Average(before=world)
    mean = config.gradient_allreduce_op == "mean"
    return Average(before=config.gradient_predivide_factor, mean=mean)


def optimizer_of(
    config: ZeroConfig, layout: Layout, client: Client | None = None
) -> OptimizerSpec | None:
    """The user's own optimizer, else the one that the config names; None without one."""
    if client is not None:
        return OptimizerSpec(client.kind, layout.groups)
    if config.optimizer is None:
        return None
    kind = config.optimizer.type.lower()
    decoupled = getattr(config.optimizer, "decoupled", False)
    rule = RULES["adamw" if decoupled else kind]
    given = config.optimizer.params.model_dump()
    base = {name: given.get(name, default) for name, default in rule.defaults.items()}
    for index, group in enumerate(layout.groups):
        unknown = sorted(set(group) - set(base) - {"name", "initial_lr"})
        if unknown:
            raise PlanError(
                f"parameter group {index} sets {', '.join(unknown)}, which {rule.name} does not "
                f"have; it has {', '.join(base)}"
            )
        if refused := rule.refused({**base, **group}):
            raise PlanError(f"parameter group {index} has {refused}")
    return OptimizerSpec(rule, tuple({**base, **group} for group in layout.groups))
