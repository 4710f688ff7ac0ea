"""Bucket sizes and persistent parameters: the arithmetic of cutting, what plans show, and the same bits."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zerograph
from tests import tiny
from tests.oracle import differing
from tests.ranks import run_ranks
from tests.test_layout import AS_IS, any_model, bf16, check_bucket
from zerograph import Engine, ops
from zerograph.bucketing import UNLIMITED, Limits, limits_of, within
from zerograph.config import load_config
from zerograph.cost import peak_gathered
from zerograph.errors import ConfigError, PlanError, VerifyError
from zerograph.layout import Bucket, Layout, layout_of
from zerograph.nodes import bucket_of, is_call
from zerograph.plan import Plan
from zerograph.precision import Precision
from zerograph.verify import verify

# Arithmetic

counts = st.integers(0, 3000)
limits = st.builds(Limits, st.integers(1, 3000), counts, counts | st.just(10**9))


@settings(max_examples=150, deadline=None)
@given(any_model(), st.integers(1, 70), st.sampled_from([AS_IS, bf16()]), limits)
def test_buckets_are_within_their_size(
    model: nn.Module, world: int, precision: Precision, sizes: Limits
) -> None:
    whole = layout_of(model, world, precision)
    layout = within(whole, sizes)
    homes = [name for bucket in layout.buckets.values() for name in bucket.params]
    assert homes == list(layout.params) and sorted(homes) == sorted(whole.params)
    for name in layout.buckets:
        check_bucket(layout, name, world)
        held = layout.bucket_params(name)
        assert len(held) == 1 or sum(p.numel for p in held) <= sizes.bucket
    for one, other in pairwise(layout.buckets.values()):
        if kind(layout, one) == kind(layout, other):
            first = layout.bucket_params(other.name)[0]
            assert sum(p.numel for p in layout.bucket_params(one.name)) + first.numel > sizes.bucket
    for bucket in layout.buckets.values():
        assert list(bucket.params) == [name for name in whole.params if name in bucket.params]
    assert within(layout, sizes) == layout, "what is within its limits stays"
    assert within(whole, UNLIMITED) == whole == layout_of(model, world, precision)


def kind(layout: Layout, bucket: Bucket) -> tuple[Any, ...]:
    """What parameters of one uncut bucket have in common."""
    return bucket.block if not bucket.persistent else "", bucket.dtype, bucket.trainable


@settings(max_examples=150, deadline=None)
@given(any_model(), limits)
def test_the_smallest_persist_up_to_the_limit_of_the_model(model: nn.Module, sizes: Limits) -> None:
    layout = within(layout_of(model, 4, AS_IS), sizes)
    persistent = {n for b in layout.buckets.values() if b.persistent for n in b.params}
    count = sum(layout.params[name].numel for name in persistent)
    assert count <= sizes.persistent
    assert all(layout.params[name].numel < sizes.persistence for name in persistent)
    left = [p.numel for n, p in layout.params.items() if n not in persistent]
    small = [numel for numel in left if numel < sizes.persistence]
    assert not small or count + min(small) > sizes.persistent, "no further one has room"
    assert not small or all(layout.params[name].numel <= min(small) for name in persistent)


def test_the_same_limits_twice_are_the_same_layout() -> None:
    """Also where some of several equal parameters of one block persist."""
    for persistent in range(0, 100, 8):
        sizes = Limits(persistence=64, persistent=persistent)
        layout = within(layout_of(tiny.Blocks(), 4, AS_IS), sizes)
        assert within(layout, sizes) == layout


def test_persistent_parameters_of_all_blocks_share_a_bucket() -> None:
    layout = within(layout_of(tiny.Blocks(), 4, AS_IS), Limits(persistence=64))
    shown = [(b.block, b.trainable, len(b.params), b.persistent) for b in layout.buckets.values()]
    assert shown == [
        ("inlet", False, 1, False),
        ("inlet", False, 1, True),
        ("blocks.0", True, 1, False),
        ("blocks.0.norm .. head", True, 7, True),
        ("blocks.1", True, 1, False),
        ("head", True, 1, False),
    ]


# Keys

SIZES = {"reduce_bucket_size": 70, "allgather_bucket_size": 50, "stage3_prefetch_bucket_size": 60}


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3}, Limits(500_000_000, 0)),
        ({"stage": 0, **SIZES}, Limits(70)),
        ({"stage": 1, **SIZES}, Limits(50)),
        ({"stage": 2, **SIZES}, Limits(50)),
        ({"stage": 3, **SIZES}, Limits(60)),
        ({"stage": 3, **SIZES, "stage3_prefetch_bucket_size": 0}, Limits(70)),
        ({"stage": 3, "stage3_param_persistence_threshold": 9}, Limits(500_000_000, 9)),
        ({"stage": 2, "stage3_param_persistence_threshold": 9}, Limits(500_000_000)),
        ({"stage": 3, "stage3_model_persistence_threshold": 5}, Limits(500_000_000, 0, 5)),
    ],
)
def test_which_keys_bind_at_which_stage(zero: dict[str, Any], expected: Limits) -> None:
    found = limits_of(load_config({"zero_optimization": zero}))
    assert (found.bucket, found.persistence) == (expected.bucket, expected.persistence)
    assert "stage3_model_persistence_threshold" not in zero or found == expected


@pytest.mark.parametrize("key", ["reduce_bucket_size", "allgather_bucket_size"])
def test_a_size_is_positive(key: str) -> None:
    with pytest.raises(ConfigError, match=f"zero_optimization.{key}: must be above 0"):
        load_config({"zero_optimization": {key: 0}})


# Plans


def planned(stage: int = 3, world: int = 4, **zero: int) -> Plan:
    made = {"stage": stage, "stage3_max_reuse_distance": 0, **zero}
    return tiny.planned(tiny.trace_of("blocks", world), stage, zero_optimization=made)


def test_persistent_parameters_are_never_gathered_and_always_refreshed() -> None:
    plan = planned(stage3_param_persistence_threshold=64)
    kept = {b.name for b in plan.graph.layout.buckets.values() if b.persistent}
    trained = {name for name in kept if plan.graph.layout.buckets[name].trainable}
    nodes = plan.graph.nodes()
    assert kept and not kept & {bucket_of(n) for n in nodes if is_call(n, ops.gather, ops.release)}
    assert trained == {bucket_of(n) for n in nodes if is_call(n, ops.refresh)}
    assert all("refresh" not in line for line in planned().signature())
    everything = planned(stage3_param_persistence_threshold=10**6)
    assert everything.count("gather") == 0 and everything.memory.gathered == 0
    full = sum(b.nbytes for b in everything.graph.layout.buckets.values())
    assert everything.memory.parameters == full


def test_persistent_parameters_count_in_what_may_be_alive() -> None:
    """Buckets of 64 elements each are gathered beside a frozen bias and the rest, 64 elements each padded."""
    persists = {"stage3_param_persistence_threshold": 64}
    graph = planned(**persists).graph
    resident = graph.resident
    assert resident == sum(b.numel for b in graph.layout.buckets.values() if b.persistent) > 0
    least = resident + max(b.numel for b in graph.layout.buckets.values() if not b.persistent)
    tight = planned(**persists, stage3_max_live_parameters=least)
    assert peak_gathered(tight.graph) == tight.memory.gathered_elements == least
    with pytest.raises(
        PlanError,
        match=rf"is {least - 1}, but {least} .* is used; set it to at least {least}, or lower "
        rf"stage3_param_persistence_threshold \(persistent parameters are {resident} of them\)",
    ):
        planned(**persists, stage3_max_live_parameters=least - 1)
    whole = planned(stage3_param_persistence_threshold=10**6).graph.resident
    with pytest.raises(PlanError, match=rf"but {whole} gathered elements are alive; set it to"):
        planned(stage3_param_persistence_threshold=10**6, stage3_max_live_parameters=100)


def test_a_smaller_bucket_mends_a_bound_that_is_too_small() -> None:
    with pytest.raises(
        PlanError,
        match=r"bucket b1 \(blocks\.0, 192 elements\) is used; set it to at least 192, or cut the block "
        r"with a smaller zero_optimization\.reduce_bucket_size",
    ):
        planned(stage3_max_live_parameters=128)
    cut = planned(stage3_max_live_parameters=128, reduce_bucket_size=72)
    assert peak_gathered(cut.graph) <= 128


def test_no_reduction_is_larger_than_the_user_said() -> None:
    for stage in range(4):
        plan = planned(stage, world=1, reduce_bucket_size=72)
        layout = plan.graph.layout
        assert [len(b.params) for b in layout.buckets.values()] == [2, 2, 2, 2, 2, 2]
        assert max(sum(p.numel for p in layout.bucket_params(b)) for b in layout.buckets) == 72


def test_without_overlap_every_collective_is_waited_for_where_it_starts() -> None:
    accumulated = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    for stage in range(4):
        for more in ({}, accumulated):
            zero = {"stage": stage, "overlap_comm": False}
            given: Any = {"zero_optimization": zero, **more}
            plan = tiny.planned(tiny.trace_of("blocks", 4), stage, **given)
            for node in plan.graph.nodes():
                assert not is_call(node, ops.gather_ahead)
                if is_call(node, ops.gather, ops.reduce_scatter, ops.all_reduce):
                    assert is_call(node.next, ops.wait) and node.next.args[0] is node
                if is_call(node, ops.refresh):
                    assert is_call(node.next, ops.refreshed)


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 3, "stage3_param_persistence_threshold": 64},
        {"stage": 3, "stage3_param_persistence_threshold": 64, "overlap_comm": False},
        {"stage": 2, "overlap_comm": False},
    ],
)
def test_a_refresh_that_nobody_waits_for_is_found(zero: dict[str, Any]) -> None:
    """In the forward, or in the step where nothing overlaps."""
    provided = frozenset({"updated", "reduced", "sharded", "gathered"})
    for target in (ops.refreshed, ops.refresh):
        graph = planned(**zero).graph
        verify(graph, provided, "schedule")
        node = next(n for n in graph.nodes() if is_call(n, target))
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.graph.erase_node(node)
        with pytest.raises(VerifyError, match="refresh"):
            verify(graph, provided, "schedule")


# The same bits

CUT = {"reduce_bucket_size": 72, "allgather_bucket_size": 100}
PERSISTS = {"stage3_param_persistence_threshold": 64, "stage3_model_persistence_threshold": 24}
BF16 = {
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
}
PLAIN: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 2 cut and at once": (2, {**CUT, "overlap_comm": False}),
    "stage 3 cut and persistent": (3, {**CUT, **PERSISTS, "stage3_max_live_parameters": 1000}),
}
"""Each trains as the default layout does at stage 0."""


def engine_for(stage: int, zero: dict[str, Any], **more: Any) -> Engine:
    torch.manual_seed(0)
    config = tiny.config(stage, gradient_clipping=0.0, **more)
    config["zero_optimization"] = {"stage": stage, **zero}
    return zerograph.compile(tiny.Blocks(dropout=0.0), config)


def step(engine: Engine, rank: int, index: int) -> None:
    for micro in range(engine.batch.accumulation):
        generator = torch.Generator().manual_seed(rank + 10 * index + 100 * micro)
        x, target = (torch.randn(4, tiny.WIDTH, generator=generator) for _ in range(2))
        engine.backward(engine(x, target)["loss"])
        engine.step()


def trained(engine: Engine, rank: int) -> dict[str, Any]:
    """Train, change values, load; answers all values and whole states."""
    step(engine, rank, 0)
    before = copy.deepcopy(engine.state_dict())
    step(engine, rank, 1)
    with zerograph.gathered(engine), torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.mul_(0.75)
    step(engine, rank, 2)
    engine.load_state_dict({name: value * 0.5 for name, value in before.items()})
    step(engine, rank, 3)
    return everything(engine)


def everything(engine: Engine) -> dict[str, Any]:
    assert engine.optimizer is not None
    full = engine.optimizer._full_states()
    states = {f"{n}/{s}": v for n, named in full.items() for s, v in named.items()}
    return {**states, **engine.state_dict()}


def thawed(engine: Engine, rank: int) -> dict[str, Any]:
    """Go on with what was frozen so far."""
    engine.module.get_submodule("inlet").requires_grad_(True)
    step(engine, rank, 4)
    step(engine, rank, 5)
    return everything(engine)


def held(engine: Engine) -> list[str]:
    """What a rank holds that is not what the plan says."""
    memory, live = engine.plan.memory, engine.state.nbytes()
    wanted = {"parameters": memory.parameters, "optimizer": memory.optimizer}
    return [f"{live[k]} bytes of {k}, not {v}" for k, v in wanted.items() if live[k] != v]


def _layouts(rank: int, world: int) -> dict[str, list[str]]:
    """What is wrong with each layout."""
    plain = engine_for(0, {})
    expected, wrong = trained(plain, rank), {}
    for name, (stage, zero) in PLAIN.items():
        engine = engine_for(stage, zero)
        wrong[name] = differing(trained(engine, rank), expected) + held(engine)
        wrong[name] += ["the default layout"] * (len(engine.state.storages) == 4)
    wrong["thawed"] = differing(thawed(engine, rank), thawed(plain, rank)) + held(engine)
    last = everything(engine)
    given_back = engine.destroy().state_dict()
    wrong["given back"] = differing(given_back, {name: last[name] for name in given_back})
    whole, engine = engine_for(2, {}, **BF16), engine_for(3, PERSISTS, **BF16)
    wrong["bf16"] = differing(trained(engine, rank), trained(whole, rank)) + held(engine)
    return wrong


def test_every_layout_trains_to_the_same_bits() -> None:
    for wrong in run_ranks(2, _layouts):
        assert not any(wrong.values()), wrong
