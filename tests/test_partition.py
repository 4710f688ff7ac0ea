"""partition_activations: no bit changes on 2 x 2 ranks, and kept bytes halve; what is shared and refused.

With contiguous_memory_optimization shares lie in arenas, on the device or on the host.
"""

import functools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import zerograph
from tests import parallel, tiny
from tests.oracle import config_for
from tests.ranks import run_ranks
from tests.storages import Storages, held_by
from tests.traces import captured_once
from zerograph import arenas, checkpointing, ops
from zerograph.alike import every, own_values
from zerograph.codegen.arenas import places
from zerograph.compat import hint
from zerograph.config import load_config
from zerograph.cost import nbytes
from zerograph.errors import ConfigError, PlanError, ZerographError
from zerograph.kept import SMALLEST
from zerograph.layout import layout_of
from zerograph.mesh import MODEL
from zerograph.nodes import REGIONS, is_call
from zerograph.plan import Plan
from zerograph.planning import plan_of
from zerograph.precision import precision_of
from zerograph.runtime.world import World
from zerograph.trace import Trace, trace
from zerograph.units import size
from zerograph.verify.arenas import rows_are_apart

ROWS, DEPTH, PARTS = 256, 3, 2
BOUNDARY = ROWS * parallel.WIDTH * 4
KEPT = DEPTH - 1
"""The first region's input is the batch, which stays."""
CLIP = 0.05
CLOSE = 1e-5
"""Of one, and of the value: sums of fp32 in another order, after two updates."""


def config(stage: int, share: bool = True, **more: Any) -> dict[str, Any]:
    section = {"number_checkpoints": DEPTH, "partition_activations": share, **more}
    clipped = config_for(stage, gradient_clipping=CLIP)
    return {**clipped, "activation_checkpointing": section}


def batch(index: int, step: int) -> dict[str, Tensor]:
    return {k: v + step + index for k, v in tiny.batch(ROWS, parallel.WIDTH).items()}


# In a plan


def planned(stage: int = 0, model: nn.Module | None = None, rows: int = ROWS, **more: Any) -> Plan:
    given = config(stage) | more
    made = parallel.Parallel(DEPTH, PARTS, "mp") if model is None else model
    inputs = tiny.batch(rows, parallel.WIDTH)
    return zerograph.plan(made, given, example_inputs=inputs, world_size=8, model_parallel=PARTS)


def calls(plan: Plan, target: Any) -> list[fx.Node]:
    return [node for node in plan.graph.nodes() if is_call(node, target)]


def test_the_plan_shows_it() -> None:
    plan = planned(3)
    text, whole = (
        str(plan),
        planned(3, activation_checkpointing={"number_checkpoints": DEPTH}),
    )
    assert "mesh  dp 4 x mp 2; buckets are cut over dp" in text
    share = size(BOUNDARY // PARTS)
    assert re.search(
        rf"%\d+.share: f32\[4096\] = zero.partition_activation %\d+ over mp +# {share}", text
    )
    gather = (
        rf"%\d+.whole: f32\[8192\] = zero.gather_activation %\d+.share over mp +# {size(BOUNDARY)}"
    )
    assert len(re.findall(gather, text)) == KEPT
    assert whole.memory.saved - plan.memory.saved == KEPT * BOUNDARY // PARTS
    assert plan.traffic["gather_activation over mp"].nbytes == KEPT * BOUNDARY
    nodes = plan.graph.nodes()
    spans = [s for s in plan.timeline("a100").spans if s.stream == "communication"]
    assert sum(is_call(nodes[span.node], ops.gather_activation) for span in spans) == KEPT
    assert plan.advisory == ()


def test_a_gather_starts_one_region_ahead() -> None:
    """The last region's at the start of the backward, the others where the one before them is whole."""
    plan = planned()
    gathers, waits = calls(plan, ops.gather_activation), calls(plan, ops.wait)
    whole = [next(wait for wait in waits if wait.args[0] is gather) for gather in gathers]
    assert gathers[0] is plan.graph.first("backward")
    assert all(before < gather for before, gather in zip(whole, gathers[1:]))
    assert all(gather.next is not wait for gather, wait in zip(gathers, whole))
    late = planned(zero_optimization={"stage": 0, "overlap_comm": False})
    assert all(is_call(gather.next, ops.wait) for gather in calls(late, ops.gather_activation))


@pytest.mark.parametrize("stage", [0, 3])
def test_one_data_parallel_rank_has_the_model_s_group_alone(stage: int) -> None:
    """Nothing is gathered over data-parallel ranks, and shares and the norm over the others."""
    inputs, model = tiny.batch(ROWS, parallel.WIDTH), parallel.Parallel(DEPTH, PARTS, "mp")
    given = config(stage)
    plan = zerograph.plan(model, given, example_inputs=inputs, world_size=2, model_parallel=2)
    programs = [plan.program(region).module.graph.nodes for region in REGIONS]
    assert [sum("all_gather" in str(n.target) for n in each) for each in programs] == [0, KEPT, 2]
    assert plan.memory.saved == planned(stage).memory.saved


class Split(parallel.Layer):
    """One that hands on a rank's own values, which the next layer joins."""

    def forward(self, x: Tensor) -> Tensor:
        own = F.gelu(self.up(parallel.Copied.apply(self.norm(x), self.group)))
        return checkpointing.checkpoint(self.join, own) + x

    def join(self, own: Tensor) -> Tensor:
        joined = parallel.Summed.apply(self.down(own), self.group)
        return torch.tanh(self.norm(torch.tanh(joined + self.bias)))


def test_what_is_a_rank_s_own_stays_whole() -> None:
    """A region's input that is computed of parts; the all-reduce's result within is shared."""
    model = parallel.Parallel(2, PARTS, "mp")
    model.layers = nn.ModuleList(Split(PARTS, "mp") for _ in range(2))
    plan = planned(model=model, activation_checkpointing={"partition_activations": True})
    shares = calls(plan, ops.partition_activation)
    assert [str(share.args[0].target) for share in shares] == [
        "_c10d_functional.wait_tensor.default"
    ] * 2
    assert (
        "2 are a rank's own" in next(r for r in plan.history.records if r.name == "partition").did
    )


class Joining(parallel.Layer):
    """One whose backward reads what its all-reduce gave."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(parallel.Copied.apply(self.norm(x), self.group))
        made = parallel.Summed.apply(self.down(F.gelu(hidden)), self.group)
        return x + made * self.bias


@functools.cache
def joining_trace() -> Trace:
    model, inputs = parallel.Parallel(DEPTH, PARTS, "mp"), tiny.batch(ROWS, parallel.WIDTH)
    model.layers = nn.ModuleList(Joining(PARTS, "mp") for _ in range(DEPTH))
    return tiny.traced(model, inputs, 4, model_parallel=PARTS)


def joining(number: int = DEPTH, share: bool = True, budget: float = 0, **more: bool) -> Plan:
    """What enters each region but the first is shared, and what each of them joins."""
    section = {"number_checkpoints": number, "partition_activations": share, **more}
    chosen = {"compile": {"activation_budget": budget}} if budget else {}
    return tiny.planned(joining_trace(), 0, activation_checkpointing=section, **chosen)


@pytest.mark.parametrize("cpu", [False, True])
def test_shares_lie_in_arenas(cpu: bool) -> None:
    """Those that go to the host in one there, and all others in one on the device."""
    plan = joining(contiguous_memory_optimization=True, cpu_checkpointing=cpu)
    apart = joining(cpu_checkpointing=cpu)
    rows = [tuple(n.meta["val"].shape) for n in plan.graph.placeholders("arena")]
    share = BOUNDARY // 4 // PARTS
    assert rows == ([(DEPTH, share), (KEPT, share)] if cpu else [(DEPTH + KEPT, share)])
    named = [(f"a{n}", row) for n, (count, _) in enumerate(rows) for row in range(count)]
    assert sorted(places(plan.graph).values()) == named
    assert (plan.memory.saved, plan.memory.host) == (apart.memory.saved, apart.memory.host)
    assert plan.memory.host == cpu * KEPT * share * 4
    line = r"zero\.partition_activation %\d+, %a0\[1\] over mp +# 16\.0 KiB at 16\.0 KiB"
    assert re.search(rf"\.share: f32\[4096\] = {line}", str(plan)) and not calls(plan, ops.place)
    graph = plan.graph.copy()
    second = [
        n for n in graph.nodes() if is_call(n, ops.partition_activation) and n.args[3:] == (1,)
    ]
    second[0].args = (*second[0].args[:3], 0)
    assert any("both lie in row 0 of arena a0" in said for said in rows_are_apart(graph))


@pytest.mark.parametrize("number", [0, DEPTH])
def test_what_a_budget_keeps_is_shared(number: int) -> None:
    """If all have it; alone each value comes back by itself, and beside regions what they join with them."""
    more = {"contiguous_memory_optimization": number > 0}
    plan, whole = (joining(number, share, 0.3, **more) for share in (True, False))
    bounds = {n.args[0] for n in calls(plan, ops.checkpoint)}.intersection(
        plan.graph.outputs("saved")
    )
    stays = {n for n in bounds if n.op != "placeholder" and nbytes(n) >= SMALLEST}
    own = own_values(plan.graph, every)
    assert stays and stays <= own
    shares = calls(plan, ops.partition_activation)
    assert len(shares) > KEPT and own.isdisjoint(shares)
    assert whole.memory.saved - plan.memory.saved == sum(map(nbytes, shares))
    gathers, waits = calls(plan, ops.gather_activation), calls(plan, ops.wait)
    ready = [next(wait for wait in waits if wait.args[0] is gather) for gather in gathers]
    assert number or all(before < gather for before, gather in zip(ready, gathers[1:]))


@pytest.mark.parametrize("elements, parts", [(24, 2), (25, 2), (7, 4), (1, 4)])
def test_shares_are_the_whole(elements: int, parts: int) -> None:
    """In order, with what pads the last; of a value that is laid out otherwise as well; in an arena's row."""
    value = torch.arange(elements * 3, dtype=torch.float32).view(3, elements).t()
    ranks = [World(rank, parts, value.device, None) for rank in range(parts)]
    worlds = [replace(ranks[0], model=each) for each in ranks]
    shares = [world.share(value, MODEL) for world in worlds]
    assert len({len(share) for share in shares}) == 1
    assert len({share.untyped_storage().data_ptr() for share in (*shares, value)}) == parts + 1
    assert torch.equal(torch.cat(shares).as_strided(value.shape, value.stride()), value)
    arena = torch.full((parts, len(shares[0]) + 3), torch.nan)
    rows = [world.share(value, MODEL, arena, n) for n, world in enumerate(worlds)]
    assert all(arenas.lies_in(row, arena, n) for n, row in enumerate(rows))
    assert torch.equal(torch.cat(rows), torch.cat(shares))


def test_sizes_that_vary() -> None:
    """Shares, the views of what is gathered, and rows of arenas follow the size of the batch."""
    model, inputs = parallel.Parallel(DEPTH, PARTS, "mp"), tiny.batch(ROWS, parallel.WIDTH)
    loaded = load_config(config(3, contiguous_memory_optimization=True))
    device = torch.device("cpu")
    precision = precision_of(model, loaded)
    layout, dims = layout_of(model, 2, precision, model_parallel=PARTS), ((0, 0), (1, 0))
    given: dict[str, Any] = {"layout": layout, "precision": precision, "device": device}
    plan = plan_of(trace(model, (), inputs, dynamic=dims, **given), loaded)
    shares = calls(plan, ops.partition_activation)
    assert len(shares) == KEPT and all(
        isinstance(s.meta["val"].shape[0], torch.SymInt) for s in shares
    )
    assert [hint(share.meta["val"].numel()) for share in shares] == [BOUNDARY // 4 // PARTS] * KEPT
    (arena,) = plan.graph.placeholders("arena")
    assert [hint(n) for n in arena.meta["val"].shape] == [KEPT, BOUNDARY // 4 // PARTS]
    assert isinstance(arena.meta["val"].shape[1], torch.SymInt)


def test_without_a_group_it_advises() -> None:
    """What would be shared is kept whole, in an arena if there are some."""
    inputs, given = tiny.batch(ROWS, parallel.WIDTH), config(0, contiguous_memory_optimization=True)
    plan = zerograph.plan(parallel.Parallel(DEPTH), given, example_inputs=inputs, world_size=2)
    assert calls(plan, ops.partition_activation) == []
    assert len(calls(plan, ops.place)) == KEPT
    assert "partition_activations=true: no model-parallel group was given" in plan.short()


def test_what_a_plan_refuses() -> None:
    with pytest.raises(PlanError, match=r"Parallel has no regions; give .*number_checkpoints"):
        planned(activation_checkpointing={"partition_activations": True})
    with pytest.raises(
        ConfigError, match=r"mics_shard_size=2: .* not built beside a model-parallel"
    ):
        planned(zero_optimization={"stage": 3, "mics_shard_size": 2})
    inputs = tiny.batch(ROWS, parallel.WIDTH)
    with pytest.raises(PlanError, match="model_parallel=3 does not divide world_size=8"):
        zerograph.plan(
            parallel.Parallel(), {}, example_inputs=inputs, world_size=8, model_parallel=3
        )


# On four ranks


def trained(model: nn.Module, given: dict[str, Any], **groups: Any) -> tuple[Any, ...]:
    """(losses, norms, gradients, state, peak held, plan, sizes of arenas) of two steps."""
    engine = zerograph.compile(model, given, **groups)
    torch.manual_seed(100 + engine.world.rank)
    losses, norms, gradients = [], [], []
    for step in range(2):
        inputs = batch(engine.world.rank, step)
        memory = engine._run.arenas.tensors()
        with Storages([*held_by(engine), *inputs.values(), *memory]) as seen:
            loss = engine(**inputs)
            engine.backward(loss)
            gradients.append(engine.gradients())
            engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
        del loss
    rows = [len(each) for each in memory]
    return losses, norms, gradients, engine.state_dict(), seen.peak, engine.plan, rows


def differing(one: tuple[Any, ...], other: tuple[Any, ...]) -> list[str]:
    """What is not the same to the bit."""
    found = [n for n, a, b in zip(("losses", "norms"), one, other) if a != b]
    pairs = [*zip(one[2], other[2], strict=True), (one[3], other[3])]
    return found + [n for a, b in pairs for n in a if not torch.equal(a[n], b[n])]


def dense(world: int) -> tuple[Any, ...]:
    """(losses by rank, norms, gradients, state) of the whole model in one process, by torch alone."""
    model = parallel.whole(DEPTH)
    options = config_for(0)["optimizer"]["params"]
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    losses, norms, gradients = [], [], []
    for step in range(2):
        terms = [model(**batch(rank, step)) for rank in range(world)]
        losses.append([term.item() for term in terms])
        (sum(terms) / world).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})  # type: ignore[union-attr]
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, gradients, model.state_dict()


def apart(own: dict[str, Tensor], full: dict[str, Tensor], index: int) -> float:
    """How far this rank's parts are from those of the whole model's values."""
    parts = {n: parallel.part_of(n, v, PARTS, index) for n, v in full.items()}
    gaps = [((own[n] - v).abs() / v.abs().clamp(min=1.0)).max().item() for n, v in parts.items()]
    return max(gaps)


def error_of(make: Any) -> str:
    try:
        make()
    except ZerographError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@captured_once()
def on_four(rank: int, world: int) -> dict[str, Any]:
    mpu = parallel.Mpu(rank, world, PARTS)
    mesh = init_device_mesh("cpu", (world // PARTS, PARTS), mesh_dim_names=("dp", "mp"))
    index, group = mpu.get_model_parallel_rank(), mpu.model.group_name

    def model() -> nn.Module:
        return parallel.cut(parallel.whole(DEPTH), PARTS, index, group)

    whole = trained(model(), config(0, False), mpu=mpu)
    checkpointing.configure(mpu)
    forms = {"stage 0": trained(model(), config(0))}
    checkpointing.configure()
    arena = {"contiguous_memory_optimization": True}
    forms["in arenas"] = trained(model(), config(0, **arena), mpu=mpu)
    forms["on the host"] = trained(model(), config(3, cpu_checkpointing=True, **arena), mesh=mesh)
    expected = dense(world // PARTS)
    gaps = [apart(a, b, index) for a, b in zip(whole[2], expected[2], strict=True)]
    norms = [abs(a - b) / b for a, b in zip(whole[1], expected[1], strict=True)]
    return {
        "forms": {name: compared(whole, after) for name, after in forms.items()},
        "beside dense": max(*gaps, *norms, apart(whole[3], expected[3], index)),
        "losses": (whole[0], [each[rank // PARTS] for each in expected[0]]),
        "norms": whole[1],
        "refused": refused(rank, mpu, model),
    }


def compared(whole: tuple[Any, ...], shared: tuple[Any, ...]) -> dict[str, Any]:
    """What differs, the bytes kept by each, and how far the held peaks are from the planned ones."""
    plans = whole[5], shared[5]
    return {
        "differing": differing(whole, shared),
        "saved": [plan.memory.saved for plan in plans],
        "host": plans[1].memory.host,
        "beyond": [run[4] - run[5].memory.peak for run in (whole, shared)],
        "gathers": plans[1].traffic["gather_activation over mp"].nbytes,
        "arenas": shared[6],
    }


def refused(rank: int, mpu: Any, model: Any) -> dict[str, str]:
    """The errors of what is wrong or not built, by name."""
    unmarked = model()
    unmarked.layers[1].up.weight.tensor_model_parallel = False
    late = config(0) | {"gradient_clipping": 0.0, "compile": {"update_in_backward": True}}
    lamb = config(0) | {"optimizer": {"type": "Lamb"}}
    other = parallel.Mpu(rank, 4, 4)
    crossed = parallel.Mpu(rank, 4, PARTS)
    crossed.data = other.model
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    engine = zerograph.compile
    return {
        "unmarked": error_of(lambda: engine(unmarked, config(0), mpu=mpu)),
        "unequal": error_of(lambda: engine(model(), config(rank % 2), mpu=mpu)),
        "late": error_of(lambda: engine(model(), late, mpu=mpu)),
        "lamb": error_of(lambda: engine(model(), lamb, mpu=mpu)),
        "crossed": error_of(lambda: engine(model(), config(0), mpu=crossed)),
        "mesh": error_of(lambda: engine(model(), config(0), mesh=mesh)),
        "both": error_of(lambda: engine(model(), config(0), mesh=mesh, mpu=mpu)),
        "nothing": error_of(lambda: engine(model(), config(0), mpu=object())),
    }


REFUSED = {
    "unmarked": "PlanError: parameter layers.1.up.weight has other values .*tensor_model_parallel",
    "unequal": "AgreementError: .*stage",
    "late": "ConfigError: compile.update_in_backward: .*model-parallel",
    "lamb": "PlanError: lamb needs norms of whole parameters, .*use AdamW",
    "crossed": "PlanError: data-parallel ranks .* are no grid of all 4 ranks",
    "mesh": "PlanError: mesh= has the axes 'dp', 'tp'; give it two, named 'dp'",
    "both": "PlanError: mpu= and mesh= both say",
    "nothing": "PlanError: mpu= .object. has no get_data_parallel_group",
}


@functools.cache
def reports() -> list[dict[str, Any]]:
    return run_ranks(4, on_four)


def test_no_bit_changes_and_kept_bytes_halve() -> None:
    """Losses, norms, gradients and parameters, at stage 0, with arenas, and at stage 3 with those on the
    host."""
    for report in reports():
        for name, found in report["forms"].items():
            assert found["differing"] == [], name
            whole, shared = found["saved"]
            half = KEPT * BOUNDARY // PARTS
            hosted = half if name == "on the host" else 0
            assert (whole - shared, found["host"]) == (half + hosted, hosted), name
            assert found["gathers"] == KEPT * BOUNDARY
            assert found["arenas"] == [half // 4] * (name != "stage 0")
            before, after = found["beyond"]
            assert name == "on the host" or abs(after - before) < BOUNDARY / 4


def test_it_is_the_whole_model_s_step() -> None:
    """Losses, gradients, norms and updates, clipped, against the whole model in one process."""
    for report in reports():
        assert report["beside dense"] < CLOSE
        assert report["losses"][0] == pytest.approx(report["losses"][1], rel=CLOSE)
        assert report["norms"] == reports()[0]["norms"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    for report in reports():
        assert re.match(REFUSED[name], report["refused"][name], re.DOTALL), report["refused"][name]
