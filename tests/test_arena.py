"""contiguous_memory_optimization: what lies in arenas and where, whose memory it is, that no bit changes.

Shares of model-parallel ranks, which lie there too, are in test_partition.py. And the two other keys of
DeepSpeed's section: `synchronize_checkpoint_boundary` and `profile`.
"""

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import zerograph
from tests import tiny
from tests.oracle import config_for
from tests.ranks import run_ranks
from tests.storages import Storages, close, held_by
from zerograph import arenas, checkpointing, ops, transfers
from zerograph.codegen.arenas import row_of
from zerograph.config import load_config
from zerograph.cost.traffic import op_of
from zerograph.engine import Engine
from zerograph.errors import ConfigError, PlanError, ZerographError
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, module_of
from zerograph.passes import Arena, Checkpoint, Normalize, Specialize
from zerograph.plan import Plan

ROWS, WIDE, DEPTH = 256, 32, 3
BOUNDARY = ROWS * WIDE * 4


def keys(**more: Any) -> dict[str, Any]:
    """The config's section, with a region for each block."""
    return {"activation_checkpointing": {"number_checkpoints": DEPTH, **more}}


OFF = keys()
ON = keys(contiguous_memory_optimization=True)
HOST = keys(contiguous_memory_optimization=True, cpu_checkpointing=True)


def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny.Blocks(DEPTH, WIDE)


@functools.cache
def plan_of(cpu: bool = False, rows: int = ROWS) -> Plan:
    given = {**config_for(0), **(HOST if cpu else ON)}
    return zerograph.plan(model(), given, example_inputs=tiny.batch(rows, WIDE), world_size=2)


def calls(graph: TrainGraph, *targets: Any) -> list[fx.Node]:
    return [node for node in graph.nodes() if is_call(node, *targets)]


def memory_of(engine: Engine) -> list[Tensor]:
    return engine._run.arenas.tensors()


# The same bits


def step(engine: Engine, rows: int = ROWS, more: float = 0.0) -> tuple[Any, ...]:
    """(loss, gradients) of one update."""
    batch = {k: v + more for k, v in tiny.batch(rows, WIDE).items()}
    output = engine(**batch)  # held by the caller until after the step
    engine.backward(output["loss"])
    gradients = engine.gradients()
    engine.step()
    return output["loss"].item(), gradients


def trained(stage: int, extra: dict[str, Any]) -> tuple[Any, ...]:
    """(steps, state, (held, planned)) of two updates, the second of which is measured."""
    engine = zerograph.compile(model(), config_for(stage, **extra))
    torch.manual_seed(100 + engine.world.rank)
    steps = [step(engine, more=engine.world.rank)]
    with Storages([*held_by(engine), *memory_of(engine)]) as seen:
        steps.append(step(engine, more=1 + engine.world.rank))
    return steps, engine.state_dict(), (seen.peak, engine.plan.memory.peak)


def different(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[str]:
    found = []
    for (loss, old), (other, new) in zip(before[0], after[0], strict=True):
        found += ["loss"] * (loss != other)
        found += [name for name in old if not torch.equal(old[name], new[name])]
    return found + [n for n, value in before[1].items() if not torch.equal(value, after[1][n])]


def at_stages(rank: int, world: int) -> dict[Any, Any]:
    before = trained(0, OFF)
    found: dict[Any, Any] = {"before": before[2]}
    for stage, extra in ((0, ON), (3, ON), (3, HOST)):
        after = trained(stage, extra)
        cpu = extra is HOST
        found[stage, cpu] = different(before, after), after[2], cpu
    return found


def test_no_bit_changes_and_what_is_held_is_planned() -> None:
    """Losses, gradients and parameters with dropout, on two ranks, in memory that was there before."""
    for report in run_ranks(2, at_stages):
        assert close(*report.pop("before"))
        for case, (changed, (held, planned), cpu) in report.items():
            assert changed == [], case
            # on a CPU the host's arena is in the same memory
            assert close(held, planned + cpu * DEPTH * BOUNDARY), (case, held, planned)


# Whose memory it is


def test_arenas_are_made_once() -> None:
    engine = zerograph.compile(model(), config_for(0, **ON))
    step(engine)
    (memory,) = memory_of(engine)
    assert memory.numel() * 4 == DEPTH * BOUNDARY
    memory.fill_(float("nan"))  # whatever is there, the next step writes first
    loss, _ = step(engine)
    assert [each.data_ptr() for each in memory_of(engine)] == [memory.data_ptr()]
    assert loss == loss and not memory.isnan().any()
    engine.destroy()
    assert memory_of(engine) == []


def test_forwards_before_the_backwards_of_others() -> None:
    """Two micro-batches at once, an evaluation between forward and backward, a backward kept for another."""
    found = []
    for extra in (OFF, ON):
        engine = zerograph.compile(model(), config_for(0, **extra))
        torch.manual_seed(1)
        first, second = (engine(**tiny.batch(ROWS, WIDE))["loss"] for _ in range(2))
        engine(**tiny.batch(ROWS, WIDE))  # its outputs go, and its arena is free
        assert len(memory_of(engine)) == (0 if extra is OFF else 3)
        with torch.no_grad():
            engine(**tiny.batch(ROWS, WIDE))
        assert not engine.plan.graph.placeholders("arena")
        engine.backward(first, retain_graph=True)
        third = engine(**tiny.batch(ROWS, WIDE))["loss"]
        for loss in (first, third, second):
            engine.backward(loss)
        assert len(memory_of(engine)) == (0 if extra is OFF else 3)
        other = engine(**tiny.batch(ROWS, WIDE))["logits"].square().mean()
        engine.backward(other)  # by a program that is made now, for the gradient of another output
        found.append(engine.gradients())
        del other, first, second, third, loss
        checkpointing.reset()
        assert memory_of(engine) == []
        step(engine)
        assert len(memory_of(engine)) == (0 if extra is OFF else 1)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_sizes_may_vary() -> None:
    """Programs share memory, which grows; with sizes that vary a row is a symbol's worth."""
    rows = (64, 48, 96, 80, 96)
    losses: dict[str, list[float]] = {}
    for name, extra in (("off", OFF), ("on", ON), ("host", HOST)):
        engine = zerograph.compile(model(), config_for(0, **extra))
        torch.manual_seed(1)
        sizes = []
        losses[name] = []
        for each in rows:
            losses[name].append(step(engine, each)[0])
            sizes.append([memory.numel() for memory in memory_of(engine)])
        assert engine.plan.graph.sizes.symbols
        if extra is not OFF:
            assert sizes == [[DEPTH * WIDE * most] for most in (64, 64, 96, 96, 96)]
            (arena,) = engine.plan.graph.placeholders("arena")
            assert "*s" in str(engine.plan) and arena.meta["val"].shape[0] == DEPTH
    assert losses["off"] == losses["on"] == losses["host"]


@pytest.mark.parametrize("extra", [ON, HOST])
def test_a_value_elsewhere_is_an_error(extra: dict[str, Any], monkeypatch: Any) -> None:
    """The run looks where each value lies: here an operator, or a copy, makes memory of its own."""
    monkeypatch.setattr("zerograph.codegen.arenas.can_write", lambda place: False)
    monkeypatch.setattr(arenas, "keep", lambda value, arena, row: value.clone())
    monkeypatch.setattr(transfers, "row", lambda arena, row, value: torch.empty_like(value))
    monkeypatch.setattr("zerograph.passes.arena.can_write", lambda place: False)
    engine = zerograph.compile(model(), config_for(0, **extra))
    with pytest.raises(ZerographError, match=r"of Blocks, .* was to lie in row 0 of arena a0, and"):
        engine(**tiny.batch(ROWS, WIDE))


# What


def test_the_plan_shows_rows_and_offsets() -> None:
    plan = plan_of()
    lines = [" ".join(line.split()) for line in str(plan).splitlines() if "zero.place" in line]
    assert [line.partition(" = ")[2] for line in lines] == [
        "zero.place %1, %a0[0] in place # 32.0 KiB at 0 B",
        "zero.place %10, %a0[1] in place # 32.0 KiB at 32.0 KiB",
        "zero.place %19, %a0[2] in place # 32.0 KiB at 64.0 KiB",
    ]
    assert f"%a0: f32[{DEPTH},{ROWS * WIDE}]" in str(plan)
    skeleton = [" ".join(line.split()) for line in plan.text(skeleton=True).splitlines()]
    assert "%_.kept = zero.place %_, %a0[1] in place # 32.0 KiB at 32.0 KiB" in skeleton


def test_bytes_of_arenas() -> None:
    plan, host = plan_of(), plan_of(cpu=True)
    held = {each.owner: each.bytes for each in plan.memory.at_peak}
    assert held["arena a0"] == DEPTH * BOUNDARY and host.memory.host == DEPTH * BOUNDARY
    off = zerograph.plan(
        model(), {**config_for(0), **OFF}, example_inputs=tiny.batch(ROWS, WIDE), world_size=2
    )
    assert plan.memory.saved == off.memory.saved
    assert host.memory.saved == off.memory.saved - DEPTH * BOUNDARY
    assert plan.memory.peak == off.memory.peak  # made in place, and alive at the peak in any case
    assert not any("arena" in each.owner for each in host.memory.at_peak)


class Various(nn.Module):
    """Regions that are entered by values of three classes, made by operators of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def run(layer: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
            return (layer(x) * (1 + sum(more))).tanh()

        x = checkpointing.checkpoint(run, self.layers[0], x)  # the batch, which stays
        shared = x = checkpointing.checkpoint(run, self.layers[1], x)  # of tanh: copied
        x = (x @ x.t() / ROWS @ x).view(2, -1, WIDE)  # of a product, seen through a view
        y = checkpointing.checkpoint(run, self.layers[2], x, shared[:1])  # kept whole, too
        few = (y[:, :1] * 2).double()
        y = y * 0.5 + 1  # of operators that take numbers
        z = checkpointing.checkpoint(run, self.layers[3], y, few.sum(), few.float().sum())
        returned = z * 2
        return checkpointing.checkpoint(run, self.layers[4], returned).mean(), returned


def test_classes_and_what_stays() -> None:
    given = {"number_checkpoints": 1, "contiguous_memory_optimization": True}
    plan = zerograph.plan(
        Various(),
        {**config_for(0), "activation_checkpointing": given},
        example_inputs=(torch.ones(ROWS, WIDE),),
    )
    found = [
        (op_of(node.args[0]), node.args[1].name, row_of(node), len(node.args) > 3)
        for node in calls(plan.graph, ops.place)
    ]
    assert found == [
        ("aten.tanh", "arena_a0", 0, False),
        ("aten.view", "arena_a0", 1, True),
        ("aten.add", "arena_a0", 2, True),
        ("aten.sum", "arena_a1", 0, False),
        ("aten.sum", "arena_a2", 0, False),
    ]
    shapes = [tuple(n.meta["val"].shape) for n in plan.graph.placeholders("arena")]
    assert shapes == [(3, ROWS * WIDE), (1, 128 // 8), (1, 128 // 4)]


def test_values_of_many_kinds_run() -> None:
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        given = {"number_checkpoints": 1, "contiguous_memory_optimization": on}
        given = {**config_for(0), "activation_checkpointing": given}
        engine = zerograph.compile(Various(), given)
        loss, _ = engine(torch.linspace(-1, 1, ROWS * WIDE).view(ROWS, WIDE))
        engine.backward(loss)
        found.append((loss.item(), engine.gradients()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_a_gradient_leaves_as_a_copy() -> None:
    graph = tiny.trace_of("blocks").graph.copy()
    for each in (Normalize(), Checkpoint(2), Specialize(("loss",))):
        each.apply(graph)
    kept = next(n for n in graph.outputs("saved") if n is not None and module_of(n) == "inlet")
    graph.set_outputs(backward=[kept, *graph.outputs("backward")[1:]])
    Arena().apply(graph)
    gradient = graph.outputs("backward")[0]
    assert gradient is not None and is_call(gradient, torch.ops.aten.clone.default)
    assert is_call(gradient.args[0], ops.place)


def test_it_needs_number_checkpoints() -> None:
    with pytest.raises(ConfigError, match="needs number_checkpoints, the number of checkpoints"):
        load_config({"activation_checkpointing": {"contiguous_memory_optimization": True}})


# Boundaries that are waited for, and timed


def test_regions_are_waited_for_and_timed(monkeypatch: Any) -> None:
    """A line a region in each forward and each backward; no number depends on it."""
    found: list[Any] = []
    said: list[str] = []
    waits: list[Any] = []
    log = logging.getLogger("zerograph")
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(log, "info", lambda form, *args: said.append(form % args))
    boundary = keys(synchronize_checkpoint_boundary=True, profile=True)
    for extra in (OFF, boundary):
        engine = zerograph.compile(model(), config_for(0, **extra))
        torch.manual_seed(1)
        engine.state.regions.device = torch.device("cuda:0")
        found.append(step(engine))
    assert waits == [torch.device("cuda:0")] * (4 * DEPTH)  # in and out, forward and backward
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    lines = [line for line in said if "checkpointed region" in line]
    names = [f"blocks.{i}" for i in range(DEPTH)]
    assert [" ".join(line.split()[:-2]) for line in lines] == [
        *(f"checkpointed region {name}: forward" for name in names),
        *(f"checkpointed region {name}: backward" for name in reversed(names)),
    ]
    assert all(seconds > 0 for seconds in engine.state.regions.seconds.values())


def test_what_is_between_the_brackets() -> None:
    """In the backward a region's recomputation and gradients, and those of no other region."""
    given = {**config_for(0), **keys(synchronize_checkpoint_boundary=True)}
    plan = zerograph.plan(model(), given, example_inputs=tiny.batch(ROWS, WIDE))
    open_: list[str] = []
    for node in plan.graph.nodes():
        if is_call(node, ops.enter):
            open_.append(str(node.args[0]))
        elif is_call(node, ops.leave):
            assert open_.pop() == node.args[0] and not open_
        elif not ops.is_zero(node.target) and module_of(node).startswith("blocks."):
            assert open_ and module_of(node).startswith(open_[0]), node
    assert 'zero.enter "blocks.1" synchronize\n' in str(plan)


@pytest.mark.parametrize("key", ["synchronize_checkpoint_boundary", "profile"])
def test_without_regions_it_is_an_error(key: str) -> None:
    config = {**config_for(0), "activation_checkpointing": {key: True}}
    with pytest.raises(PlanError, match=rf"{key}=true: .* Blocks has no regions; give"):
        zerograph.plan(model(), config, example_inputs=tiny.batch(ROWS, WIDE))


def test_configure_sets_them() -> None:
    checkpointing.configure(
        None, num_checkpoints=DEPTH, contiguous_checkpointing=True, synchronize=True, profile=True
    )
    try:
        section = zerograph.compile(model(), config_for(0)).config.activation_checkpointing
    finally:
        checkpointing._given = None
    assert section.contiguous_memory_optimization and section.profile
    assert section.synchronize_checkpoint_boundary
