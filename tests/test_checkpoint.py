"""Activation checkpointing: where regions come from, what is kept, and that no bit changes."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import zerograph
from tests import models, tiny
from tests.models import batch_for, loss_of
from tests.oracle import config_for
from tests.ranks import run_ranks
from tests.storages import Storages, close, held_by
from tests.traces import captured_once
from zerograph import checkpointing, ops, pipeline
from zerograph.cost import CATEGORIES
from zerograph.errors import ConfigError, PlanError
from zerograph.ir import TrainGraph
from zerograph.layout import repeated_blocks
from zerograph.nodes import (
    checkpoint_of,
    is_call,
    is_random,
    is_recomputed,
    is_view,
    region_of,
    role_of,
)
from zerograph.passes import Checkpoint, Normalize, Specialize
from zerograph.plan import Plan
from zerograph.repeats import dropout_scale

aten = torch.ops.aten
STEPS = 2


def numbered(count: int | str) -> dict[str, Any]:
    return {"activation_checkpointing": {"number_checkpoints": count}}


def recomputed(graph: TrainGraph) -> list[fx.Node]:
    return [node for node in graph.nodes("backward") if is_recomputed(node)]


def boundaries(graph: TrainGraph) -> list[tuple[str, str]]:
    """(name of the value, region) of each boundary."""
    calls = [node for node in graph.nodes() if is_call(node, ops.checkpoint)]
    return [(str(node.args[0]), str(node.args[1])) for node in calls]


# The same bits


def built(name: str) -> nn.Module:
    """One of tests.models, or `tiny`'s blocks or norms; with its dropout."""
    torch.manual_seed(0)
    made = models.MODELS[name] if name in models.MODELS else tiny.MODELS[name]
    return made().train()


def batch_of(name: str, seed: int) -> dict[str, Tensor]:
    if name in models.MODELS:
        return batch_for(name, seed)
    return {key: value * (seed + 1) for key, value in tiny.batch().items()}


def trained(model: nn.Module, name: str, stage: int, **extra: Any) -> tuple[Any, ...]:
    """(losses, state, (bytes held at the peak, planned)) of some steps."""
    engine = zerograph.compile(model, config_for(stage, **extra))
    torch.manual_seed(100 + engine.world.rank)
    losses, peak = [], 0
    for step in range(STEPS):
        seed = 10 * step + engine.world.rank
        batch = batch_of(name, seed)
        with Storages([*held_by(engine), *batch.values()]) as seen:
            output = engine(**batch)
            loss = output if isinstance(output, Tensor) else loss_of(output)
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
        peak = seen.peak
        del output, loss
    assert bool(recomputed(engine.plan.graph)) == ("activation_checkpointing" in extra)
    return losses, engine.state_dict(), (peak, engine.plan.memory.peak)


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> list[str]:
    """What differs between two runs."""
    found = [] if one[0] == other[0] else ["loss"]
    return found + [
        name for name, value in one[1].items() if not torch.equal(value, other[1][name])
    ]


@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_no_bit_changes(name: str) -> None:
    """Losses and parameters after some steps, dropout included, and the peak is the planned one."""
    before, after = (trained(built(name), name, 0, **extra) for extra in ({}, numbered(2)))
    assert same(before, after) == []
    assert close(*after[2]), after[2]


STAGES = {"blocks": range(4), "normed": [3]}


@captured_once()
def at_every_stage(rank: int, world: int) -> dict[Any, Any]:
    """What differs from stage 0 without checkpoints, and the peaks."""
    found: dict[Any, Any] = {}
    for name, stages in STAGES.items():
        before = trained(built(name), name, 0)
        for stage in stages:
            after = trained(built(name), name, stage, **numbered(2))
            found[name, stage] = same(before, after), after[2]
    return found


def test_no_bit_changes_at_any_stage() -> None:
    for report in run_ranks(2, at_every_stage):
        for key, (differing, peaks) in report.items():
            assert differing == [], key
            assert close(*peaks), (key, peaks)


def test_parameters_are_gathered_for_the_recomputation() -> None:
    """At stage 3 with no reuse the backward gathers each block, and computes again behind its wait."""
    plan = tiny.planned(tiny.trace_of("blocks"), 3, **numbered(2))
    plain = tiny.planned(tiny.trace_of("blocks"), 3)
    assert plan.count("gather") == plain.count("gather")
    products = [n for n in recomputed(plan.graph) if is_call(n, aten.addmm.default)]
    assert len(products) == 2
    views = [
        source for node in products for source in node.all_input_nodes if not is_recomputed(source)
    ]
    assert all(region_of(view) == "backward" for view in views if is_call(view, ops.param))


# Memory


class Stack(nn.Module):
    """A uniform stack: each layer keeps 9 values of its input's size, and a mask."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(tiny.Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean()


ROWS, WIDE = 512, 64


def stack_plan(depth: int, **extra: Any) -> Plan:
    torch.manual_seed(0)
    inputs = {"x": torch.ones(ROWS, WIDE)}
    return zerograph.plan(Stack(depth), config_for(0, **extra), example_inputs=inputs)


def activations(plan: Plan) -> int:
    """Most bytes of activations alive at once: kept, computed again, and temporary."""
    indices = [CATEGORIES.index(name) for name in ("activations", "recomputed")]
    return max(sum(moment.bytes[i] for i in indices) for moment in plan.memory.series)


def test_a_uniform_stack_holds_its_boundaries_and_one_layer() -> None:
    """A layer more costs a boundary and a mask, and one layer alone is what it is without checkpoints."""
    boundary, mask = ROWS * WIDE * 4, ROWS * WIDE
    few, many = (activations(stack_plan(depth, **numbered(depth))) for depth in (4, 12))
    assert many - few == 8 * (boundary + mask)
    alone = activations(stack_plan(1))
    assert many <= 11 * (boundary + mask) + alone + boundary
    plain = activations(stack_plan(12))
    assert many < 0.5 * plain


def test_masks_are_kept_and_nothing_else_of_a_dropout() -> None:
    plan = stack_plan(3, **numbered(3))
    saved = [node.meta["val"] for node in plan.graph.outputs("saved") if node is not None]
    masks = [value for value in saved if value.dtype == torch.bool]
    large = [value for value in saved if value.numel() == ROWS * WIDE]
    floats = [value for value in large if value.dtype == torch.float32]
    assert (len(masks), len(floats)) == (3, 3)


def test_the_plan_says_what_is_kept_and_what_is_computed_again() -> None:
    plan, plain = stack_plan(3, **numbered(3)), stack_plan(3)
    assert plan.memory.saved < plain.memory.saved
    owners = {held.owner for held in plan.memory.at_peak if held.category == "recomputed"}
    assert owners and all(owner.startswith("layers.") for owner in owners)
    assert not any(held.category == "recomputed" for held in plain.memory.at_peak)
    text = str(plan)
    work = [node for node in recomputed(plan.graph) if not is_view(node)]
    assert text.count("# recomputed layers.") == len(recomputed(plan.graph))
    assert f"  recomputed {len(work)} ops  " in text.splitlines()[-1]
    assert 'zero.checkpoint %x "layers.0"' in text
    assert plan.history.records[2].did.startswith("3 regions, ")
    assert "recomputed" not in str(plain)


# Regions of number_checkpoints


@pytest.mark.parametrize("number, sizes", [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (5, [1] * 5)])
def test_regions_are_even(number: int, sizes: list[int]) -> None:
    plan = stack_plan(5, **numbered(number))
    blocks: dict[str, set[str]] = {}
    for node in plan.graph.nodes("forward"):
        module = str(node.meta["module"])
        if checkpoint_of(node):
            blocks.setdefault(checkpoint_of(node), set()).add(".".join(module.split(".")[:2]))
    assert [len(found) for found in blocks.values()] == sizes
    starts = [sum(sizes[:i]) for i in range(number)]
    ends = [start + size - 1 for start, size in zip(starts, sizes, strict=True)]
    pairs = zip(starts, ends, strict=True)
    names = [f"layers.{a}" if a == b else f"layers.{a} .. layers.{b}" for a, b in pairs]
    assert list(blocks) == names == [region for _, region in boundaries(plan.graph)]


def test_more_regions_than_blocks() -> None:
    with pytest.raises(PlanError, match=r"number_checkpoints=6: Stack has 5 repeated blocks; give"):
        stack_plan(5, **numbered(6))
    with pytest.raises(
        PlanError, match="Mlp has no repeated blocks; leave it out, or mark regions"
    ):
        tiny.planned(tiny.trace_of("mlp"), 0, **numbered(1))


def test_none_is_none() -> None:
    assert str(stack_plan(2, **numbered(0))) == str(stack_plan(2))


def test_without_a_backward_nothing_is_marked() -> None:
    with torch.no_grad():
        plan = stack_plan(2, **numbered(2))
    assert boundaries(plan.graph) == []


# Regions that the model marks


class Marked(nn.Module):
    """Blocks under a checkpoint; `how` is the call."""

    def __init__(self, how: Callable[..., Any], depth: int = 3) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(tiny.Block(WIDE) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.how(layer, x)
        return x.square().mean()


def called(layer: Callable[..., Any], x: Tensor) -> Any:
    return layer(x)


HOWS: dict[str, Callable[..., Any]] = {
    "ours": checkpointing.checkpoint,
    "torch's": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
}


def two_steps(model: nn.Module, **extra: Any) -> tuple[list[float], dict[str, Tensor], Plan]:
    engine = zerograph.compile(model, config_for(0, **extra))
    torch.manual_seed(3)
    losses = []
    for _ in range(2):
        loss = engine(torch.ones(16, WIDE, requires_grad=True))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, engine.state_dict(), engine.plan


def marked(how: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return Marked(how)


@pytest.mark.parametrize("how", HOWS)
def test_a_call_marks_a_region(how: str) -> None:
    plain, found = two_steps(marked(called)), two_steps(marked(HOWS[how]))
    assert same(plain[:2], found[:2]) == []
    assert {region for _, region in boundaries(found[2].graph)} == {f"layers.{i}" for i in range(3)}
    evenly = two_steps(marked(called), **numbered(3))
    assert found[2].memory.saved == evenly[2].memory.saved
    assert len(recomputed(found[2].graph)) == len(recomputed(evenly[2].graph))


def test_a_models_own_regions_come_before_the_number() -> None:
    _, _, plan = two_steps(marked(checkpointing.checkpoint), **numbered(1))
    assert plan.history.records[2].did.startswith("3 regions, which the model marks itself")


def test_regions_of_functions_have_numbers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpointing.checkpoint(lambda y: self.second(self.first(y).tanh()).tanh(), x)
            x = checkpointing.checkpoint(lambda y: y.sin().cos() * 2, x)
            return self.first(checkpointing.checkpoint(self.first, x)).mean()

    plan = two_steps(Model())[2]
    assert [region for _, region in boundaries(plan.graph)] == ["c0", "c1", "first"]


def test_a_policy_says_what_is_kept() -> None:
    """Selective checkpointing: products are kept, the rest is computed again."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = op is aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(layer: Callable[..., Any], x: Tensor) -> Any:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(layer, x, use_reentrant=False, context_fn=contexts)

    plain, found = two_steps(marked(called)), two_steps(marked(selective))
    assert same(plain[:2], found[:2]) == []
    again = recomputed(found[2].graph)
    assert not any(is_call(node, aten.addmm.default) for node in again)
    assert any(is_call(node, aten.native_layer_norm.default) for node in again)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2"])
def test_gradient_checkpointing_of_transformers(name: str, reentrant: bool) -> None:
    """With the cache off, as transformers itself turns it off."""

    def made(checkpointed: bool) -> nn.Module:
        model: Any = built(name)
        model.config.use_cache = False
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    plain = trained(made(False), name, 0)
    engine = zerograph.compile(made(True), config_for(0))
    torch.manual_seed(100)
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine(**batch_for(name, 10 * step)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert same(plain, (losses, engine.state_dict())) == []
    layers = set(repeated_blocks(engine.module))
    assert {region for _, region in boundaries(engine.plan.graph)} == layers
    assert "# recomputed " in str(engine.plan)


# A choice of what is kept


def every_third(graph: TrainGraph) -> list[fx.Node]:
    """A chooser as the pass takes one."""
    values = [n for n in graph.nodes("forward") if isinstance(n.meta.get("val"), Tensor)]
    return [n for n in values if not is_view(n) and n.op != "get_attr"][::3]


@pytest.mark.parametrize("name", ["blocks", "normed", "tied"])
@pytest.mark.parametrize("choose", [every_third, lambda graph: []])
def test_a_choice_of_what_is_kept(name: str, choose: Callable[[TrainGraph], list[fx.Node]]) -> None:
    """The backward reads of the forward what is kept, and the interpreted graph has the same bits."""
    torch.manual_seed(0)
    model: nn.Module = {**tiny.MODELS, "tied": tiny.Tied}[name]()
    plain, chosen = (tiny.traced(model, tiny.batch(), 1).graph.copy() for _ in range(2))
    pipeline.run(plain, [Normalize(), Checkpoint(), Specialize()])
    pipeline.run(chosen, [Normalize(), Checkpoint(choose=choose), Specialize()])
    assert recomputed(chosen)
    assert {region for _, region in boundaries(chosen)} == {"budget"}
    kept = [n for n in chosen.outputs("saved") if n is not None and n.op != "placeholder"]
    assert len(kept) < len([n for n in plain.outputs("saved") if n is not None])
    found, expected = (run_graph(graph, model) for graph in (chosen, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_budget_in_bytes_and_as_a_fraction() -> None:
    """What is saved fits, less is kept for less, and the bits are the same."""
    depth = 3
    plain = stack_plan(depth).memory.saved
    plans = {f: stack_plan(depth, compile={"activation_budget": f}) for f in (0, 0.5, 1)}
    saved = [plan.memory.saved for plan in plans.values()]
    assert saved == sorted(saved) and saved[0] < saved[1] < saved[2] <= plain
    most = saved[1] + 1000
    plan = stack_plan(depth, compile={"activation_budget": most})
    assert saved[1] <= plan.memory.saved <= most
    with pytest.raises(PlanError, match=r"compile.activation_budget=2: a budget of 2 byt") as info:
        stack_plan(depth, compile={"activation_budget": 2})
    (smallest,) = map(int, re.findall(r"(\d+) bytes \S+ \S+ are the smallest", str(info.value)))
    assert stack_plan(depth, compile={"activation_budget": smallest}).memory.saved <= smallest
    with pytest.raises(PlanError, match=rf"a budget of {smallest - 1} bytes"):
        stack_plan(depth, compile={"activation_budget": smallest - 1})
    one, other = (
        two_steps(marked(called)),
        two_steps(marked(called), compile={"activation_budget": 0}),
    )
    assert same(one[:2], other[:2]) == [] and recomputed(other[2].graph)


def test_a_budget_beside_regions_says_what_more_is_kept() -> None:
    """With nothing more it is the plan without a budget; each byte more saves work and no bit changes."""
    regions, least = numbered(3), stack_plan(6, **numbered(3))
    plans = [stack_plan(6, **regions, compile={"activation_budget": f}) for f in (0, 0.3, 1)]
    assert str(plans[0]) == str(least)
    saved = [plan.memory.saved for plan in plans]
    work = [len(recomputed(plan.graph)) for plan in plans]
    assert saved == sorted(set(saved)) and work == sorted(set(work), reverse=True)
    assert {region for _, region in boundaries(plans[1].graph)} == {
        f"layers.{i} .. layers.{i + 1}" for i in (0, 2, 4)
    }
    with pytest.raises(PlanError, match=rf"must be kept .* need {saved[0]} bytes"):
        stack_plan(6, **regions, compile={"activation_budget": saved[0] - 1})


def test_a_budget_keeps_more_of_the_models_own_regions() -> None:
    plain = two_steps(marked(called))
    plans = [
        two_steps(marked(checkpointing.checkpoint), compile={"activation_budget": f})
        for f in (0, 0.5)
    ]
    assert all(same(plain[:2], found[:2]) == [] for found in plans)
    assert plans[0][2].memory.saved < plans[1][2].memory.saved
    assert plans[1][2].history.records[2].did.startswith("3 regions, which the model marks itself")
    assert {region for _, region in boundaries(plans[1][2].graph)} == {
        f"layers.{i}" for i in range(3)
    }


FRACTIONS = (0.0, 0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def llama_plan(**extra: Any) -> Plan:
    return tiny.planned(llama_trace(), 0, **extra)


@functools.cache
def llama_trace() -> Any:
    return tiny.traced(models.make("llama"), models.batch_for("llama", 0), 1)


@pytest.mark.parametrize("made, layers", [(functools.partial(stack_plan, 8), 8), (llama_plan, 2)])
def test_the_peak_falls_with_the_budget(made: Callable[..., Plan], layers: int) -> None:
    """To that of regions, whatever their number; within a tenth, since a layer's values are not alike."""
    plans = [made(compile={"activation_budget": f}) for f in FRACTIONS]
    saved, peaks = [plan.memory.saved for plan in plans], [activations(plan) for plan in plans]
    assert saved == sorted(saved)
    for less, more in itertools.pairwise(peaks):
        assert less <= 1.1 * more, peaks
    numbers = {count: activations(made(**numbered(count))) for count in range(1, layers + 1)}
    assert peaks[0] <= min(numbers.values()) < 0.6 * peaks[-1], (peaks, numbers)
    assert (
        activations(made(**numbered(layers), compile={"activation_budget": 0})) == numbers[layers]
    )
    auto = made(**numbered("auto"))
    assert activations(auto) == min(numbers.values())


def test_the_number_of_regions_under_a_budget() -> None:
    """The boundaries of all blocks do not fit into a smaller one; what is left is kept within regions."""
    most = stack_plan(8, **numbered(8)).memory.saved
    small, large = (
        stack_plan(8, **numbered("auto"), compile={"activation_budget": b})
        for b in (most - 1, 2 * most)
    )
    counts = [len({region for _, region in boundaries(p.graph)}) for p in (small, large)]
    assert counts[0] < 8 and small.memory.saved < most < large.memory.saved <= 2 * most
    half = stack_plan(8, **numbered("auto"), compile={"activation_budget": 0.5})
    assert activations(half) > activations(stack_plan(8, **numbered("auto")))
    with pytest.raises(PlanError, match=r"compile.activation_budget=9: a budget of 9 bytes"):
        stack_plan(8, **numbered("auto"), compile={"activation_budget": 9})
    with pytest.raises(PlanError, match="number_checkpoints=auto: Mlp has no repeated blocks"):
        tiny.planned(tiny.trace_of("mlp"), 0, **numbered("auto"))


class Looking(nn.Module):
    """A layer that looks at the model's input, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.linear(x).tanh() * (given[:1] + 1).exp()


class Changing(nn.Module):
    """Changes its input at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Looking() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        for layer in self.layers:
            y = layer(y, x)
        x.mul_(2.0)
        return y.mean()


@pytest.mark.parametrize("extra", [numbered(2), {"compile": {"activation_budget": 0}}])
def test_an_input_that_the_forward_changes_is_not_read_again(extra: dict[str, Any]) -> None:
    """The backward would find its new value."""
    found = []
    for given in ({}, extra):
        torch.manual_seed(0)
        engine = zerograph.compile(Changing(), config_for(0, **given))
        engine.backward(engine(torch.rand(4, WIDE)))
        found.append(({}, engine.gradients()))
    assert recomputed(engine.plan.graph)
    assert same(*found) == []


class Viewed(nn.Module):
    """Layers whose result is a view of what their own backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Halved() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for layer in self.layers:
            x, aside = layer(x)
            x, total = x.flatten(0, 1), total + aside
        return total + x.mean()


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x) * 2.0
        return y.unflatten(0, (2, -1)), y.sin().mean()


def test_what_a_kept_view_is_of_is_kept() -> None:
    """It is the same storage."""
    plain, found = two_steps(Viewed()), two_steps(Viewed(), **numbered(2))
    doubled = [
        n for n in found[2].graph.nodes() if is_call(n, aten.mul.Tensor) and n.args[1] == 2.0
    ]
    assert len(doubled) == 4  # two in the forward, two of the backward's own
    assert found[2].memory.saved <= plain[2].memory.saved


def run_graph(graph: TrainGraph, model: nn.Module) -> list[Tensor]:
    """All results and gradients of a graph before `shard`; boundaries are what they are on."""
    for node in [n for n in graph.nodes() if is_call(n, ops.checkpoint)]:
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    torch.manual_seed(5)
    given = {**dict(model.named_parameters()), **dict(model.named_buffers()), **tiny.batch()}
    inputs = [
        torch.ones(()) if role_of(p).kind == "tangent" else given[role_of(p).name].detach().clone()
        for p in graph.placeholders()
    ]
    outputs = fx.Interpreter(graph.module).run(*inputs)
    return [t for part in ("forward", "backward") for t in outputs[part] if t is not None]


# Kinds of values


def test_sizes_may_vary() -> None:
    """A program with symbols computes again what the static one does, with the same bits."""
    before, after = (list(_lengths(marked(called), **extra)) for extra in ({}, numbered(2)))
    assert before == after


def _lengths(model: nn.Module, **extra: Any) -> Iterator[tuple[float, ...]]:
    engine = zerograph.compile(model, config_for(0, **extra))
    torch.manual_seed(3)
    for rows in (4, 6, 7, 9):
        loss = engine(torch.ones(rows, WIDE))
        engine.backward(loss)
        yield loss.item(), float(engine.get_global_grad_norm() or 0.0)
        engine.step()
    assert engine.plan.graph.sizes.symbols
    assert bool(recomputed(engine.plan.graph)) == bool(extra)


class Noisy(nn.Module):
    """Random numbers of several kinds, inside what is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        def noisy(layer: nn.Module, x: Tensor) -> Tensor:
            x = layer(x).tanh()
            x = x * torch.rand_like(x) + torch.randn_like(x).exp()
            x = F.dropout(x, 1.0) + F.alpha_dropout(x, 0.3, True)
            return torch.where(torch.bernoulli(torch.sigmoid(x)) > 0, x.sin(), x.cos())

        for layer in self.layers:
            x = self.how(noisy, layer, x)
        return x.square().mean()

    def how(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class NoisyAgain(Noisy):
    def how(self, function: Callable[..., Any], *args: Any) -> Any:
        return checkpointing.checkpoint(function, *args)


def test_random_numbers_are_drawn_once() -> None:
    made = []
    for kind in (Noisy, NoisyAgain):
        torch.manual_seed(0)
        made.append(two_steps(kind()))
    assert same(made[0][:2], made[1][:2]) == []
    drawn = [sum(map(is_random, plan.graph.nodes())) for _, _, plan in made]
    assert drawn[0] == drawn[1] > 0 and recomputed(made[1][2].graph)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_dropout_is_its_mask(p: float, dtype: torch.dtype) -> None:
    """What the backward computes from a mask has the bits of torch's operator."""
    x = torch.randn(1000).to(dtype)
    output, mask = torch.native_dropout(x, p, True)
    again = aten.mul.Tensor(aten.mul.Tensor(x, mask), dropout_scale(p, dtype))
    assert torch.equal(output, again)


def test_batch_norm_updates_its_statistics_once() -> None:
    found = []
    for extra in ({}, numbered(2)):
        torch.manual_seed(0)
        engine = zerograph.compile(tiny.Normed(), config_for(0, **extra))
        for _ in range(3):
            engine.backward(engine(**tiny.batch()))
            engine.step()
        found.append(engine.state_dict())
    assert same(([], found[0]), ([], found[1])) == []
    assert found[0]["layers.0.1.num_batches_tracked"] == 3


def test_autocast_casts_are_made_again() -> None:
    extra = {"torch_autocast": {"enabled": True}}
    plain = two_steps(marked(called), **extra)
    found = two_steps(marked(called), **extra, **numbered(3))
    assert same(plain[:2], found[:2]) == []
    assert any(is_call(n, aten._to_copy.default) for n in recomputed(found[2].graph))


# DeepSpeed's names


@pytest.fixture
def unconfigured() -> Iterator[None]:
    yield
    checkpointing._given = None


@pytest.mark.usefixtures("unconfigured")
def test_configure_acts_on_engines_compiled_later() -> None:
    assert not checkpointing.is_configured()
    checkpointing.configure(
        None,
        {"activation_checkpointing": {"number_checkpoints": 3}},
        num_checkpoints=2,
        checkpoint_in_cpu=True,
    )
    assert checkpointing.is_configured()
    engine = zerograph.compile(marked(called), config_for(0, **numbered(1)))
    assert engine.config.activation_checkpointing.number_checkpoints == 2
    assert engine.config.activation_checkpointing.cpu_checkpointing
    checkpointing.reset()
    assert checkpointing.is_configured()
    checkpointing.configure()
    engine = zerograph.compile(marked(called), config_for(0))
    assert engine.config.activation_checkpointing.number_checkpoints is None


@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize(
    "given, says",
    [
        ({"contiguous_checkpointing": True}, "needs number_checkpoints"),
        (
            {"num_checkpoints": -1},
            "activation_checkpointing.number_checkpoints: must be a whole number of at least 0",
        ),
    ],
)
def test_configure_refuses_what_has_no_meaning(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        checkpointing.configure(**given)
    assert not checkpointing.is_configured()


def test_a_call_outside_a_compiled_model() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = checkpointing.checkpoint(lambda y: layer(y).tanh(), x)
    result.sum().backward()
    expected = torch.autograd.grad(layer(x).tanh().sum(), x)[0]
    assert torch.equal(x.grad, expected)
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in kept if tensor.numel() == x.numel())
