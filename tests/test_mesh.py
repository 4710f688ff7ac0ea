"""Groups within the world: MiCS and hpZ, on four ranks, two by two, against plain stage 3.

hpZ moves the same values by another way, so it has plain stage 3's bits. MiCS sums in another order, within
groups and then over them, so it has them up to rounding; its copies have each other's bits.
"""

import copy
import os
import re
import signal
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import zerograph
from tests import tiny
from tests.oracle import differing
from tests.ranks import outcomes_of, run_ranks
from tests.storages import BOUND, Storages, held_by
from zerograph import Engine, ops
from zerograph.config import load_config
from zerograph.cost import cluster_of
from zerograph.errors import CommunicationError, ConfigError
from zerograph.mesh import ALL, Mesh, mesh_of
from zerograph.nodes import axis_of, is_call, is_recomputed
from zerograph.runtime.world import World

WIDTH, ROWS, STEPS = 32, 4, 3
MICS, HPZ = {"mics_shard_size": 2}, {"zero_hpz_partition_size": 2}
SEVERAL = {"train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": 2}
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
CLIP = 0.5
CLOSE = 1e-6
"""Of one, and of the value: a few roundings of fp32 in a sum of four terms, after three updates."""


class Layers(nn.Module):
    """Three layers, a bucket each; the first one's bias is frozen until it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x, target)


class Pairs(Layers):
    """With something in each layer that can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        pairs = (nn.Sequential(each, nn.GELU(), nn.Linear(WIDTH, WIDTH)) for each in self.layers)
        self.layers = nn.ModuleList(pairs)


def engine_for(groups: dict[str, Any], model: type[nn.Module] = Layers, **more: Any) -> Engine:
    optimizer = {"type": "AdamW", "params": ADAMW}
    config = tiny.config(3, optimizer=optimizer, gradient_clipping=CLIP) | more
    config["zero_optimization"] |= groups
    return zerograph.compile(model(), config)


def batch_for(rank: int, index: int, micro: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * index + 100 * micro + rank)
    return {n: torch.randn(ROWS, WIDTH, generator=generator) for n in ("x", "target")}


def train(engine: Engine, rank: int) -> dict[str, Tensor]:
    """Norms, the first mean gradients, and the parameters after some updates."""
    found = {}
    for index in range(STEPS):
        for micro in range(engine.batch.accumulation):
            engine.backward(engine(**batch_for(rank, index, micro)))
            if index == 0 and micro == engine.batch.accumulation - 1:
                means = engine.gradients()
                found = {f"gradient of {n}": g for n, g in means.items() if g is not None}
            engine.step()
        found[f"norm {index}"] = torch.tensor(engine.get_global_grad_norm())
    return found | engine.state_dict()


def eager(world: int, micros: int) -> dict[str, Tensor]:
    """The same in one process, by torch alone."""
    model, found = Layers(), {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), **ADAMW)  # type: ignore[arg-type]
    for index in range(STEPS):
        for micro in range(micros):
            for rank in range(world):
                (model(**batch_for(rank, index, micro)) / (world * micros)).backward()
        if index == 0:
            found = {f"gradient of {n}": p.grad.clone() for n, p in trained.items()}  # type: ignore[union-attr]
        found[f"norm {index}"] = nn.utils.clip_grad_norm_(trained.values(), CLIP).double()
        optimizer.step()
        optimizer.zero_grad()
    return found | {n: t.clone() for n, t in model.state_dict().items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, of one and of the value."""
    assert one.keys() == other.keys()
    gaps = ((v - other[n]).abs() / other[n].abs().clamp(min=1.0) for n, v in one.items())
    return max(gap.max().item() for gap in gaps)


def slices(engine: Engine) -> dict[str, Tensor]:
    """All that this rank keeps from step to step, by a name."""
    storages = engine.state.storages
    found = {f"{b}.shard": s.shard for b, s in storages.items()}
    found |= {f"{b}/{n}": t for b, s in storages.items() for n, t in s.states.items()}
    return {name: value.clone() for name, value in found.items()}


def _numbers(rank: int, world: int) -> dict[str, Any]:
    plain, hpz, mics = (engine_for(groups) for groups in ({}, HPZ, MICS))
    expected = train(plain, rank)
    found: dict[str, Any] = {"hpz differs": differing(train(hpz, rank), expected)}
    found["hpz's slices differ"] = differing(slices(hpz), slices(plain))
    scattered = train(mics, rank)
    found["mics"] = apart(scattered, expected)
    whole = engine_for(MICS | {"reduce_scatter": False})
    found["mics in whole differs"] = differing(train(whole, rank), scattered)
    found["slices"] = slices(mics)
    found["bytes"] = [engine.state.nbytes() for engine in (plain, hpz, mics)]
    found["peaks"] = [_peaks(engine, rank) for engine in (hpz, mics)]
    with hpz.profile(1) as profile:
        hpz.backward(hpz(**batch_for(rank, 8)))
        hpz.step()
    found["profiled"] = sorted({each.kind for each in profile.collectives})
    found["values"] = _values(mics, rank)
    return found


def _peaks(engine: Engine, rank: int) -> tuple[int, int]:
    """Bytes alive at most in a step, and as planned."""
    batch = batch_for(rank, 7)
    with Storages([*held_by(engine), *batch.values()]) as seen:
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
    return seen.peak, engine.plan.memory.peak


def _values(engine: Engine, rank: int) -> dict[str, Any]:
    """What goes into slices that have copies, and comes out of them."""
    assert engine.optimizer is not None
    before, saved = engine.state_dict(), copy.deepcopy(engine.optimizer.state_dict())
    kept = slices(engine)
    engine.backward(engine(**batch_for(rank, 20)))
    engine.step()
    assert differing(engine.state_dict(), before)
    engine.load_state_dict(before)
    engine.optimizer.load_state_dict(saved)
    found: dict[str, Any] = {"reloaded": differing(slices(engine), kept)}
    with zerograph.gathered(engine), torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.mul_(0.5)
    halved = {name: value * 0.5 for name, value in before.items()}
    found["halved"] = differing(engine.state_dict(), halved)
    engine.module.get_parameter("layers.0.bias").requires_grad_(True)
    engine.backward(engine(**batch_for(rank, 21)))
    engine.step()
    after = engine.state_dict()
    assert not torch.equal(after["layers.0.bias"], halved["layers.0.bias"])
    found["slices"] = slices(engine)
    found["given back"] = differing(dict(engine.destroy().named_parameters()), after)  # type: ignore[arg-type]
    return found


def test_groups_train_as_the_whole_world_does() -> None:
    ranks = run_ranks(4, _numbers)
    for found in ranks:
        assert found["hpz differs"] == found["hpz's slices differ"] == []
        assert found["mics"] < CLOSE
        assert found["mics in whole differs"] == []
        for measured, planned in found["peaks"]:
            assert abs(measured - planned) <= BOUND * measured
        kinds = "gather", "gather over node", "gather_partials", "reduce_scatter"
        assert found["profiled"] == sorted(kinds)
        values = found["values"]
        assert values["reloaded"] == values["halved"] == values["given back"] == []
        plain, hpz, mics = found["bytes"]
        assert hpz == plain and mics == {name: 2 * size for name, size in plain.items()}
    for left, right in ((0, 2), (1, 3)):  # the copies
        one, other = ranks[left], ranks[right]
        assert not differing(one["slices"], other["slices"])
        assert not differing(one["values"]["slices"], other["values"]["slices"])
    assert differing(ranks[0]["slices"], ranks[1]["slices"])


def _against_eager(rank: int, world: int) -> list[float]:
    """Several backwards a step; then the backend's own collectives, as on NCCL, along each axis."""
    found = [apart(train(engine_for(MICS, **SEVERAL), rank), eager(world, 2))]
    World.algorithm = property(lambda self: "native")  # type: ignore[assignment,method-assign]
    for groups in (MICS, HPZ):
        engine = engine_for(groups)
        found.append(apart(train(engine, rank), eager(world, 1)))
        assert "all_gather_into_tensor_out" in engine.plan.program("forward").module.code
    return found


def test_groups_train_as_one_process_does() -> None:
    for found in run_ranks(4, _against_eager):
        assert max(found) < CLOSE, found


LOOSE = {"gradient_clipping": 0.0}
EARLY = {"compile": {"update_in_backward": True}}
AGAIN = {"activation_checkpointing": {"number_checkpoints": 3}}
SMALL = {"reduce_bucket_size": 1024, "stage3_param_persistence_threshold": 100}
"""Persistent biases, and weights in buckets of their own."""


def _together(rank: int, world: int) -> dict[str, float]:
    """Groups and all else that changes a graph at stage 3, against groups alone; and those against none."""
    plain, found = _after(engine_for({}, Pairs, **LOOSE), rank), {}
    for name, groups in (("mics", MICS), ("hpz", HPZ)):
        expected = _after(engine_for(groups, Pairs, **LOOSE), rank)
        found[name] = apart(expected, plain)
        early = engine_for(groups | SMALL, Pairs, **LOOSE, **AGAIN, **EARLY)
        found[f"{name} early"] = apart(_after(early, rank), expected)
        at_once = engine_for(groups | SMALL | {"overlap_comm": False}, Pairs, **LOOSE, **AGAIN)
        found[f"{name} at once"] = apart(_after(at_once, rank), expected)
        for graph in (early.plan.graph, at_once.plan.graph):
            assert graph.resident > 0 and any(map(is_recomputed, graph.nodes("backward")))
            moved = {axis_of(n) for n in graph.nodes("backward") if is_call(n, ops.gather)}
            assert moved == {"dp_shard" if name == "mics" else "node"}
    return found


def _after(engine: Engine, rank: int) -> dict[str, Tensor]:
    for index in range(STEPS):
        engine.backward(engine(**batch_for(rank, index)))
        engine.step()
    return engine.state_dict()


def test_groups_go_together_with_the_rest() -> None:
    """Persistence, other buckets, recomputation and where updates stand change no bit."""
    for found in run_ranks(4, _together):
        assert found.pop("mics") < CLOSE
        assert set(found.values()) == {0.0}, found


def _lost(rank: int, world: int) -> str:
    engine = engine_for(MICS)
    for step in range(100):
        if rank == 3 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            engine.backward(engine(**batch_for(rank, step)))
            engine.step()
        except CommunicationError as error:
            return str(error)
    return "none"


def test_an_error_names_the_axis() -> None:
    outcomes = outcomes_of(4, _lost, timeout=90, collectives=5.0)
    said = r"rank {}: the (gather|reduction) of bucket b\d over dp_(shard|replicate) failed"
    for rank, (kind, error) in enumerate(outcomes[:3]):
        assert kind == "value" and re.match(said.format(rank), error), (kind, error)
    assert "of bucket" in outcomes[2][1] and "over dp_shard" in outcomes[2][1]


# Numbers alone


@given(inner=st.integers(2, 9), outer=st.integers(2, 9), hpz=st.booleans())
def test_axes_cut_the_world_into_groups(inner: int, outer: int, hpz: bool) -> None:
    world = inner * outer
    mesh = mesh_of(*((-1, inner) if hpz else (inner, 1)), world)
    assert (mesh.world, mesh.slices) == (world, world if hpz else inner)
    for axis in (ALL, *(each.name for each in mesh.axes)):
        groups = {tuple(mesh.members(axis, rank)) for rank in range(world)}
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        for group in groups:
            assert [mesh.index(axis, rank) for rank in group] == list(range(mesh.size(axis)))
            assert {b - a for a, b in pairwise(group)} <= {mesh.stride(axis)}
    near = mesh.members(mesh.axes[-1].name, world - 1)
    assert near == list(range(world - inner, world)), "ranks that follow each other"


@pytest.mark.parametrize(
    ("mics", "hpz", "world"), [(-1, 1, 8), (0, 0, 8), (8, 1, 8), (16, 1, 8), (-1, 8, 8), (4, 1, 1)]
)
def test_groups_that_are_the_world_are_none(mics: int, hpz: int, world: int) -> None:
    assert mesh_of(mics, hpz, world) == Mesh.flat(world)


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        (
            {"stage": 2, "mics_shard_size": 4},
            "mics_shard_size=4 cuts parameters, which stage 2 does not",
        ),
        ({"stage": 1, "zero_hpz_partition_size": 4}, "zero_hpz_partition_size=4 cuts parameters"),
        (
            {"stage": 3, "mics_shard_size": 4, "zero_hpz_partition_size": 4},
            "mics_shard_size=4 and zero_optimization.zero_hpz_partition_size=4: .*keep one",
        ),
        ({"stage": 3, "mics_shard_size": 1}, "mics_shard_size=1: such a group shards nothing"),
        ({"stage": 3, "mics_shard_size": -2}, "mics_shard_size=-2: such a group shards nothing"),
    ],
)
def test_groups_that_make_no_sense(zero: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config({"zero_optimization": zero})


@pytest.mark.parametrize("key", ["mics_shard_size", "zero_hpz_partition_size"])
def test_a_size_that_does_not_divide_the_world(key: str) -> None:
    says = rf"zero_optimization.{key}=5 does not divide the world of 12 .* one of 2, 3, 4, 6, 12"
    config = {"zero_optimization": {"stage": 3, key: 5}}
    with pytest.raises(ConfigError, match=says):
        load_config(config).mesh(12)
    with pytest.raises(ConfigError, match=says):
        zerograph.plan(Layers(), config, example_inputs=tiny.batch(width=WIDTH), world_size=12)


def plan_of(groups: dict[str, int], **zero: Any) -> zerograph.Plan:
    config = tiny.config(3, zero_optimization={"stage": 3, **groups, **zero})
    return zerograph.plan(Layers(), config, example_inputs=batch_for(0, 0), world_size=8)


def test_a_forward_alone_keeps_no_slice() -> None:
    with torch.no_grad():
        assert plan_of(HPZ, stage3_max_reuse_distance=0).count("partition") == 0


def test_a_bucket_that_is_kept_needs_no_slice() -> None:
    kept, again = plan_of(HPZ), plan_of(HPZ, stage3_max_reuse_distance=0)
    assert kept.count("partition") == 0 < again.count("partition")
    plain = plan_of({}, stage3_max_reuse_distance=0)
    assert again.memory.saved - plain.memory.saved == again.bytes("partition") > 0


def test_ranks_agree_on_axes() -> None:
    plain, hpz, mics = (plan_of(g, stage3_max_reuse_distance=0) for g in ({}, HPZ, MICS))
    assert plain.signature() != hpz.signature() != mics.signature()
    moved = [n for n in hpz.graph.nodes("backward") if is_call(n, ops.gather)]
    assert {axis_of(n) for n in moved} <= {"node"}
    assert hpz.traffic["gather over node"].count == hpz.count("partition")
    assert "gather over dp_shard" in mics.traffic and "gather" not in mics.traffic


@pytest.mark.parametrize("kind", ["gather", "reduce_scatter", "all_reduce", "gather_partials"])
@pytest.mark.parametrize("cluster", ["a100", "mi300x"])
def test_a_group_costs_what_its_links_cost(kind: str, cluster: str) -> None:
    """Within a node nothing of the network; with one rank a node nothing else."""
    described = cluster_of(cluster)
    slow = described.model_copy(
        update={"inter": described.inter.model_copy(update={"bandwidth": 1.0})}
    )
    assert slow.collective(kind, 1 << 30, 8) == described.collective(kind, 1 << 30, 8)
    one_each = described.model_copy(update={"per_node": 1})
    for world in (2, 8, 128):
        along = described.collective(kind, 1 << 30, world, stride=8)
        assert along == one_each.collective(kind, 1 << 30, world)
        assert along == described.collective(kind, 1 << 30, world, stride=16)
    halves = described.collective(kind, 1 << 30, 8, stride=4)  # two of a node's eight
    assert halves == described.model_copy(update={"per_node": 2}).collective(kind, 1 << 30, 8)
