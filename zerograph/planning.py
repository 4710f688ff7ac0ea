"""From a model and a config to a Plan: trace, then the passes. No ranks, no GPU, no weights.

plan        trace_of, then plan_of
trace_of    what depends on the model, its inputs and the precision
plan_of     the passes, on a copy; one trace serves many configs
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zerograph import pipeline
from zerograph.alike import Joins, every
from zerograph.bucketing import limits_of
from zerograph.client import Client, Given, client_of
from zerograph.collectives import Algorithm, algorithm_for
from zerograph.config import ZeroConfig, load_config
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.layout import layout_of
from zerograph.optimizer import OptimizerSpec, optimizer_of
from zerograph.passes import (
    Arena,
    Bracket,
    Checkpoint,
    Gather,
    InPlace,
    Normalize,
    Offload,
    Partition,
    Reduce,
    Release,
    Scale,
    Schedule,
    Shard,
    Specialize,
    Update,
    UpdateInBackward,
)
from zerograph.passes.reduce import Average
from zerograph.plan import Plan
from zerograph.precision import precision_of
from zerograph.recompute import Auto, Budget
from zerograph.trace import Trace, trace


def plan(
    model: nn.Module,
    config: Mapping[str, Any] | str | os.PathLike[str] | ZeroConfig,
    *,
    example_inputs: Any,
    world_size: int = 1,
    model_parallel: int = 1,
    device: str | torch.device = "cpu",
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    optimizer: Given | None = None,
    arriving: Sequence[str] | None = None,
) -> Plan:
    """Plan one training step of `model` under `config` for `world_size` ranks.

    Of these, `model_parallel` compute one batch together, each with its part of the model, as `model` is
    written; the collectives that it makes itself are taken to be among them.
    `example_inputs` is a mapping (keyword arguments), a tuple or list (positional ones) or one
    tensor; only shapes, strides and dtypes are read. Model and inputs may be on the meta device; they are
    traced as fake tensors of `device`. `optimizer` is what `zerograph.compile` takes.
    `arriving` names the outputs whose gradients the backward is
    for; by default the loss alone, if there is one. Under `torch.no_grad()` the plan has no backward.

    Raises ConfigError, CaptureError or PlanError.
    """
    loaded = load_config(config)
    data_parallel = data_parallel_of(world_size, model_parallel)
    loaded.batch(data_parallel)
    loaded.mesh(data_parallel, model_parallel)
    client = None if optimizer is None else client_of(optimizer, model, loaded, param_groups)
    groups = client.groups if client else param_groups
    ranks = data_parallel, model_parallel
    traced = trace_of(model, loaded, example_inputs, ranks[0], device, groups, ranks[1])
    return plan_of(traced, loaded, arriving, client)


def data_parallel_of(world: int, model: int) -> int:
    """How many of `world` ranks have the same part of the model. Raises PlanError."""
    if model < 1:
        raise PlanError(f"model_parallel must be at least 1, got {model}")
    if world % model:
        raise PlanError(
            f"model_parallel={model} does not divide world_size={world}, which counts all ranks"
        )
    return world // model


def trace_of(
    model: nn.Module,
    config: ZeroConfig,
    example_inputs: Any,
    world_size: int,
    device: str | torch.device = "cpu",
    groups: Sequence[Mapping[str, Any]] | None = None,
    model_parallel: int = 1,
) -> Trace:
    """The trace that `plan` rewrites. It serves every config that differs from `config` in no precision.

    `world_size` is of data-parallel ranks, with `model_parallel` processes for each.
    """
    precision = precision_of(model, config)
    layout = layout_of(model, world_size, precision, groups, model_parallel=model_parallel)
    args, kwargs = call_of(example_inputs)
    return trace(
        model, args, kwargs, layout=layout, precision=precision, device=torch.device(device)
    )


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
    algorithm: Algorithm | None = None,
    joins: Joins = every,
) -> Plan:
    """Run the passes on a copy of a traced graph.

    `algorithm` moves the buckets; by default that of the device's usual backend. `joins` says of the process
    groups of the model's own collectives which are the model-parallel one.
    """
    notes: dict[str, Any] = {"collectives": algorithm or algorithm_for(traced.graph.device)}

    def start() -> TrainGraph:
        graph = traced.graph.copy()
        graph.layout = graph.layout.over(config.mesh(graph.world, graph.mesh.model))
        graph.notes |= notes
        return graph

    graph = start()
    if arriving is None:
        arriving = default_arriving(graph)
    spec = optimizer_of(config, graph.layout, client)
    passes = passes_for(config, graph, tuple(arriving), spec, joins)
    notes |= graph.notes
    return Plan(graph, pipeline.run(graph, passes, start), config, spec)


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
    config: ZeroConfig,
    graph: TrainGraph,
    arriving: tuple[str, ...],
    spec: OptimizerSpec | None,
    joins: Joins = every,
) -> list[pipeline.Pass]:
    """The pipeline. Stages differ in what each pass inserts, not in which passes run."""
    zero = config.zero_optimization
    max_live = zero.stage3_max_live_parameters
    graph.notes.setdefault("collectives", algorithm_for(graph.device))
    graph.notes["max_live"] = max_live
    graph.notes["accumulation"] = config.batch(graph.world).accumulation
    average = average_of(config, graph.world)
    across = arriving == default_arriving(
        graph
    )  # another backward runs behind the default's forward
    overlaps = zero.overlap_comm is not False
    weighted = config.compile.weighted_accumulation
    activations = config.activation_checkpointing
    moved: list[pipeline.Pass] = []
    if activations.partition_activations and graph.mesh.model > 1:
        moved.append(Partition(overlaps=overlaps, joins=joins))
    if activations.cpu_checkpointing:
        moved.append(Offload(overlaps=overlaps))
    moved += [Arena()] if activations.contiguous_memory_optimization else []
    boundary = activations.synchronize_checkpoint_boundary, activations.profile
    brackets = [Bracket(*boundary)] if any(boundary) else []
    early = [UpdateInBackward()] if config.compile.update_in_backward else []
    return [
        Normalize(recast=zero.stage == 3),
        Checkpoint(_number_of(config), _budget_of(config)),
        Specialize(arriving),
        *moved,
        Scale(),
        Shard(zero.stage, limits_of(config)),
        Gather(zero.stage3_max_reuse_distance, max_live, across, config.compile.gathered_budget),
        Release(),
        Reduce(1.0 if weighted else 1 / config.batch(graph.world).accumulation, average),
        InPlace(),
        Update(
            rule=spec.label if spec else "",
            states=spec.states if spec else (),
            scalars=len(spec.rule.scalars) if spec else 0,
            average=average,
            max_norm=config.gradient_clipping,
            weighted=weighted,
            measures=spec.measures if spec else False,
            overlaps=overlaps,
        ),
        *early,
        Schedule(
            prefetch=zero.stage3_prefetch_bucket_size if overlaps else 0,
            max_live=max_live,
            in_flight=_reductions_under_way(config),
            any_size=overlaps and "stage3_prefetch_bucket_size" not in zero.model_fields_set,
            across=across,
        ),
        *brackets,
    ]


def _number_of(config: ZeroConfig) -> int | Auto:
    """The regions of a model that marks none; a fraction as budget says what more than those is kept."""
    activations, budget = config.activation_checkpointing, config.compile.activation_budget
    number = activations.number_checkpoints
    if number != "auto":
        return number or 0
    most = None if budget is None or budget <= 1 else int(budget)
    return Auto(most, on_host=activations.cpu_checkpointing)


def _budget_of(config: ZeroConfig) -> Budget | None:
    value = config.compile.activation_budget
    return None if value is None else Budget(value)


def _reductions_under_way(config: ZeroConfig) -> int:
    """How many reductions may be on the link at once; each holds its bucket's gradients."""
    if config.zero_optimization.overlap_comm is False:
        return 1
    return 3 if config.compile.update_in_backward else 2  # beside what is sent for the next step


def average_of(config: ZeroConfig, world: int) -> Average:
    """How the config's keys average gradients over ranks; the default divides after the sum."""
    scatters = config.zero_optimization.reduce_scatter
    if config.prescale_gradients:
        return Average(before=world, scatters=scatters)
    mean = config.gradient_allreduce_op == "mean"
    return Average(before=config.gradient_predivide_factor, mean=mean, scatters=scatters)
