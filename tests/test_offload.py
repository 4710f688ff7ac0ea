"""cpu_checkpointing: what goes to the host and when, that no bit changes, and what is held where."""

import functools
import io
import json
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn

import zerograph
from tests import tiny
from tests.oracle import config_for
from tests.ranks import run_ranks
from tests.storages import Storages, close, held_by
from zerograph import checkpointing, ops, transfers
from zerograph.cli.tables import plan_parts
from zerograph.cost import CATEGORIES
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call
from zerograph.plan import Plan
from zerograph.report.overview import facts
from zerograph.units import size

ROWS, WIDE, DEPTH = 256, 32, 3
BOUNDARY = ROWS * WIDE * 4


def keys(**more: Any) -> dict[str, Any]:
    """The config's section, with a region for each block."""
    return {"activation_checkpointing": {"number_checkpoints": DEPTH, **more}}


OFF, ON = keys(), keys(cpu_checkpointing=True)


def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny.Blocks(DEPTH, WIDE)


@functools.cache
def plan_of(stage: int = 0, depth: int = DEPTH, **more: Any) -> Plan:
    torch.manual_seed(0)
    config = {**config_for(stage), **keys(number_checkpoints=depth, cpu_checkpointing=True), **more}
    return zerograph.plan(
        tiny.Blocks(depth, WIDE), config, example_inputs=tiny.batch(ROWS, WIDE), world_size=2
    )


def calls(graph: TrainGraph, target: Any) -> list[fx.Node]:
    return [node for node in graph.nodes() if is_call(node, target)]


# The same bits


class Apart(Storages):
    """Storages of the device; what `zero.offload` makes is the host's."""

    def __init__(self, held: Any) -> None:
        super().__init__(held)
        self.hosts: dict[int, Any] = {}
        self.moving = False
        self.most = 0
        """Most bytes on the host."""

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if getattr(self, "moving", False) and key not in self._seen:
            self.hosts[key] = weakref.ref(storage, lambda _: self.hosts.pop(key))
            alive = (found() for found in list(self.hosts.values()))
            self.most = max(self.most, sum(each.nbytes() for each in alive if each is not None))
        elif key not in getattr(self, "hosts", {}):
            super().see(tensor)


_offload, _running = transfers.offload, []


def _noted(value: Tensor) -> transfers.Copy:
    """`offload`, of which the running Apart knows."""
    for seen in _running:
        seen.moving = True
    copy = _offload(value)
    for seen in _running:
        seen.moving = False
    return copy


@contextmanager
def apart(held: Any) -> Iterator[Apart]:
    with Apart(held) as seen:
        _running.append(seen)
        yield seen
        _running.remove(seen)


def trained(stage: int, **extra: Any) -> tuple[Any, ...]:
    """(losses, gradients, state, ((device, planned), (host, planned))) of two steps."""
    transfers.offload = _noted  # type: ignore[assignment]
    engine = zerograph.compile(model(), config_for(stage, **extra))
    torch.manual_seed(100 + engine.world.rank)
    losses, gradients = [], []
    for step in range(2):
        batch = {k: v + step + engine.world.rank for k, v in tiny.batch(ROWS, WIDE).items()}
        with apart([*held_by(engine), *batch.values()]) as seen:
            output = engine(**batch)
            engine.backward(output["loss"])
            gradients.append(engine.gradients())
            engine.step()
        losses.append(output["loss"].item())
        del output
    transfers.offload = _offload
    memory = engine.plan.memory
    peaks = (seen.peak, memory.peak), (seen.most, memory.host)
    return losses, gradients, engine.state_dict(), peaks


def at_stages(rank: int, world: int) -> dict[int, Any]:
    found, before = {}, trained(0, **OFF)
    for stage in (0, 3):
        after = trained(stage, **ON)
        different = [] if before[0] == after[0] else ["loss"]
        pairs = [*zip(before[1], after[1], strict=True), (before[2], after[2])]
        different += [n for a, b in pairs for n in a if not torch.equal(a[n], b[n])]
        found[stage] = different, before[3], after[3]
    return found


def test_no_bit_changes_and_less_is_held() -> None:
    """Losses, gradients and parameters with dropout; as much less is held as planned."""
    for report in run_ranks(2, at_stages):
        for stage, (different, before, after) in report.items():
            assert different == [], stage
            assert after[1] == (DEPTH * BOUNDARY, DEPTH * BOUNDARY) and before[1] == (0, 0)
            assert close(*before[0]) and close(*after[0]), (before, after)
            assert after[0][0] < before[0][0] - (DEPTH - 2) * BOUNDARY * 0.9, (before, after)


def test_other_gradients_that_arrive() -> None:
    """The backward of another output, made later, finds what the forward moved."""
    found = []
    for extra in (OFF, ON):
        engine = zerograph.compile(model(), config_for(0, **extra))
        torch.manual_seed(1)
        output = engine(**tiny.batch(ROWS, WIDE))
        engine.backward(output["logits"].square().mean())
        found.append(engine.gradients())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_sizes_may_vary() -> None:
    found = []
    for extra in (OFF, ON):
        engine = zerograph.compile(model(), config_for(0, **extra))
        torch.manual_seed(1)
        losses = []
        for rows in (64, 96, 80):
            loss = engine(**tiny.batch(rows, WIDE))["loss"]
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert engine.plan.graph.sizes.symbols
        found.append(losses)
    assert found[0] == found[1]


def test_without_a_backward_nothing_is_moved() -> None:
    engine = zerograph.compile(model().eval(), config_for(0, **ON))
    with torch.no_grad():
        engine(**tiny.batch(ROWS, WIDE))
    assert not calls(engine.plan.graph, ops.offload)


# When


def order(plan: Plan) -> list[str]:
    """The copies and their waits, in order: `offload 0` is of the first value."""
    values: dict[fx.Node, int] = {}
    found = []
    for node in plan.graph.nodes():
        start = node.args[0] if is_call(node, ops.wait) else node
        if not isinstance(start, fx.Node) or not is_call(start, *ops.COPIES):
            continue
        kind = "offload" if is_call(start, ops.offload) else "reload"
        if node is start:
            values[start] = values[start.args[0].args[0]] if kind == "reload" else len(values)
        found.append(f"{kind if node is start else 'wait'} {values[start]}")
    return found


def test_copies_start_early_and_are_waited_for_late() -> None:
    assert order(plan_of(depth=3)) == [
        *("offload 0", "offload 1", "wait 0", "offload 2", "wait 1", "wait 2"),
        *("reload 2", "wait 2", "reload 1", "wait 1", "reload 0", "wait 0"),
    ]
    graph = plan_of(depth=3).graph
    second = calls(graph, ops.reload)[1]
    behind = graph.nodes("backward")
    between = behind[behind.index(second) : behind.index(next(iter(second.users)))]
    assert any("native_layer_norm_backward" in str(node.target) for node in between)


def test_without_overlap_nothing_is_early_or_late() -> None:
    zero = {"stage": 0, "overlap_comm": False}
    plan = zerograph.plan(
        model(),
        {**config_for(0), **ON, "zero_optimization": zero},
        example_inputs=tiny.batch(ROWS, WIDE),
    )
    nodes = plan.graph.nodes()
    for node in nodes:
        if is_call(node, *ops.COPIES):
            assert is_call(nodes[nodes.index(node) + 1], ops.wait)


def test_copies_have_a_stream_and_ranks_need_not_agree() -> None:
    plan = plan_of()
    copied = [s for s in plan.timeline("h100").spans if s.stream == "copy"]
    assert len(copied) == 2 * DEPTH
    seconds = plan.timeline("h100").busy["copy"]
    assert seconds == pytest.approx(2 * DEPTH * (2e-6 + BOUNDARY / 51.2e9))
    assert plan.timeline("cpu").busy["copy"] == 0
    assert not any("load" in line for line in plan.signature())


# What


def test_memory_is_of_the_device_or_of_the_host() -> None:
    """A layer more costs the device its mask, and the host its boundary."""
    one, other = plan_of(depth=4).memory, plan_of(depth=5).memory
    assert (one.host, other.host) == (4 * BOUNDARY, 5 * BOUNDARY)
    assert other.saved - one.saved == ROWS * WIDE
    held = [CATEGORIES.index(name) for name in ("activations", "recomputed")]
    most = [max(sum(m.bytes[i] for i in held) for m in memory.series) for memory in (one, other)]
    assert most[1] - most[0] == ROWS * WIDE
    assert "host 96.0 KiB" in str(plan_of()) and "on the host 96.0 KiB" in plan_of().short()
    assert plan_of(depth=4).document().memory.host == one.host


def test_the_peak_says_what_is_kept_computed_again_and_on_the_host() -> None:
    """In the plan, its JSON, and what is printed; the device's parts add up to the peak."""
    memory, document = plan_of(depth=4).memory, plan_of(depth=4).document()
    assert sum(held.bytes for held in memory.at_peak) == memory.peak
    parts = dict(zip(CATEGORIES, memory.peak_moment.bytes)) if memory.peak_moment else {}
    assert sum(parts.values()) == memory.peak and parts["recomputed"] > 0
    assert 0 < memory.kept_at_peak <= parts["activations"]
    assert 0 < memory.host_at_peak <= memory.host == 4 * BOUNDARY
    said = json.loads(document.dumps())["memory"]
    assert said["kept_at_peak"] == memory.kept_at_peak
    assert said["host_at_peak"] == memory.host_at_peak
    console = Console(file=io.StringIO(), width=200)
    for part in plan_parts(document):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"of activations, kept for backward +{size(memory.kept_at_peak)}", text)
    assert re.search(rf"beside it, on the host +{size(memory.host_at_peak)}", text)
    assert ("on the host", size(memory.host)) in facts(document, None)


def test_the_skeleton_has_no_numbers_of_aten_values() -> None:
    lines = plan_of().text(skeleton=True).splitlines()
    copies = [line.split("#")[0].split() for line in lines if "load" in line]
    assert [" ".join(words) for words in copies[:1]] == ["%_.host = zero.offload %_"]
    assert copies[-1] == ["%_.back", "=", "zero.reload", "%_.host"]


class Returning(nn.Module):
    """Regions whose inputs are the batch, a returned value, a small one, and two views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def run(layer: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
            return (layer(x) * (1 + sum(more))).tanh()

        x = checkpointing.checkpoint(run, self.layers[0], x)
        returned = x = checkpointing.checkpoint(run, self.layers[1], x)
        small = checkpointing.checkpoint(run, self.layers[2], x)[:4].exp()
        y = checkpointing.checkpoint(run, self.layers[3], x, small.sum())
        whole = (y * 2).view(2, -1, WIDE)
        z = checkpointing.checkpoint(run, self.layers[4], whole, whole[:1])
        return z.mean(), returned


def test_what_stays() -> None:
    given = {**config_for(0), "activation_checkpointing": {"cpu_checkpointing": True}}
    plan = zerograph.plan(Returning(), given, example_inputs=(torch.ones(ROWS, WIDE),))
    did = {record.name: record.did for record in plan.history.records}["offload"]
    assert did.startswith("1 of "), did
    (node,) = calls(plan.graph, ops.offload)
    assert node.args[0] is calls(plan.graph, torch.ops.aten.tanh.default)[0]


def test_a_budget_moves_what_it_chose() -> None:
    """Each value comes back for itself: not all of the one region at the start of the backward."""
    more = {"activation_checkpointing": {"cpu_checkpointing": True}}
    plan = zerograph.plan(
        model(),
        {**config_for(0), **more, "compile": {"activation_budget": 0.5}},
        example_inputs=tiny.batch(ROWS, WIDE),
    )
    reloads = calls(plan.graph, ops.reload)
    assert len(reloads) > DEPTH
    told = [each for each in order(plan) if not each.startswith("offload")]
    first = told.index("reload " + told[-1].split()[1])
    assert told[first - 1].startswith("wait") and first > len(reloads)


def test_without_regions_it_is_an_error() -> None:
    config = {**config_for(0), "activation_checkpointing": {"cpu_checkpointing": True}}
    with pytest.raises(PlanError, match=r"cpu_checkpointing=true: .* Blocks has no regions; give"):
        zerograph.plan(model(), config, example_inputs=tiny.batch(ROWS, WIDE))
