"""The cost model of time: work, clusters, timeline; calibration's arithmetic; recordings of real runs."""

import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zerograph
from tests import models, tiny
from tests.ranks import run_ranks
from zerograph import ops
from zerograph.calibrate import calibrate, links, operators, reference, timing
from zerograph.calibrate.links import _solve, shares
from zerograph.codegen.in_place import is_in_place
from zerograph.cost import (
    CLUSTERS,
    Cluster,
    Device,
    Link,
    Timeline,
    Work,
    cluster_of,
    collective_bytes,
    op_of,
    timeline_of,
    traffic_of,
    work_of,
)
from zerograph.cost.traffic import name_of
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import bucket_of, is_ahead, is_call, is_view
from zerograph.plan import Plan
from zerograph.recording import Recording
from zerograph.trace import Trace

CPU = CLUSTERS["cpu"]
TWICE = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
KINDS = ("gather", "reduce_scatter", "all_reduce")


@functools.cache
def traced(name: str, world: int) -> Trace:
    return tiny.traced(models.make(name), models.batch_for(name, 0), world)


@functools.cache
def plan_of(name: str, stage: int = 3, world: int = 2) -> Plan:
    return tiny.planned(traced(name, world), stage)


def ran(module: nn.Module, inputs: Any, stage: int = 2) -> TrainGraph:
    """The planned graph of a small module that answers its loss."""
    return zerograph.plan(module, tiny.config(stage), example_inputs=inputs, world_size=2).graph


def work_by_op(graph: TrainGraph) -> dict[str, list[Work]]:
    found: dict[str, list[Work]] = {}
    for node in graph.nodes():
        found.setdefault(op_of(node), []).append(work_of(node))
    return found


# FLOPs


_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
UNCOUNTED = dict.fromkeys((_ON_CPU, _ON_CPU_BACKWARD), lambda *args, **kwargs: 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "convnet", "lowrank"])
def test_flops_are_those_that_torch_counts_in_a_real_run(name: str) -> None:
    """FlopCounterMode counts what runs; CPU attention, which not every torch knows, is left out."""
    model, batch = models.make(name), models.batch_for(name, 0)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        models.loss_of(model(**batch)).backward()
    graph = plan_of(name).graph
    counted = sum(work_of(n).flops for n in graph.nodes() if "flash" not in op_of(n))
    assert counted == counter.get_total_flops()
    assert counted > 0


class Attention(nn.Module):
    """One attention of two heads, and its parameter."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x * self.scale
        return F.scaled_dot_product_attention(q, q, q, is_causal=self.causal).sum()


@pytest.mark.parametrize("causal", [False, True])
def test_cpu_attention_has_two_products_forward_and_five_backward(causal: bool) -> None:
    found = work_by_op(ran(Attention(causal), {"x": torch.ones(3, 2, 16, 8)}))
    pairs = 16 * 17 // 2 if causal else 16 * 16
    product = 2 * 3 * 2 * pairs * 8
    prefix = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert [work.flops for work in found[prefix]] == [2 * product]
    assert [work.flops for work in found[f"{prefix}_backward"]] == [5 * product]


def test_experts_count_as_products_of_their_rows() -> None:
    found = work_by_op(plan_of("mixtral").graph)
    rows = 2 * 16 * 2  # every token goes to two experts
    first, second = 2 * rows * 32 * 128, 2 * rows * 64 * 32
    assert {w.flops for w in found["transformers.grouped_mm_fallback"]} == {first, second}
    backward = {w.flops for w in found["transformers.grouped_mm_fallback_backward"]}
    assert backward == {2 * first, 2 * second}


# Bytes


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node that calls `target` on tensors."""
    graph = fx.Graph()

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    node = graph.call_function(target, tuple(map(placed, args)), kwargs)
    node.meta["val"] = target(*args, **kwargs)
    return node


def f32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def indices(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


aten = torch.ops.aten
MOVED: list[tuple[str, Any, int]] = [
    ("sum", lambda: call(aten.add.Tensor, f32(4, 8), f32(4, 8)), 3 * 128),
    ("twice the same", lambda: call(aten.mul.Tensor, *[f32(4, 8)] * 2), 3 * 128),
    ("expanded", lambda: call(aten.add.Tensor, f32(4, 8), f32(1, 8).expand(4, 8)), 2 * 128 + 32),
    ("product", lambda: call(aten.mm.default, f32(4, 8), f32(8, 2)), 128 + 64 + 32),
    ("reduction", lambda: call(aten.sum.dim_IntList, f32(4, 8), [1]), 128 + 16),
    ("rows", lambda: call(aten.embedding.default, f32(99, 8), indices(3)), 2 * 96 + 24),
    ("picked", lambda: call(aten.gather.default, f32(9, 8), 0, indices(1, 8)), 2 * 32 + 64),
    ("indexed", lambda: call(aten.index.Tensor, f32(99, 8), [indices(3)]), 2 * 96 + 24),
    ("filled", lambda: call(aten.full.default, [4, 8], 0.0), 128),
    ("empty", lambda: call(aten.empty.memory_format, [4, 8]), 0),
    ("in place", lambda: call(aten.add_.Tensor, f32(4, 8), f32(4, 8)), 3 * 128),
    ("copied", lambda: call(aten.copy_.default, f32(4, 8), f32(4, 8)), 2 * 128),
    ("view", lambda: call(aten.view.default, f32(4, 8), [32]), 0),
    (
        "rows added",
        lambda: call(aten.embedding_dense_backward.default, f32(3, 8), indices(3), 99, -1, False),
        99 * 32 + 24 + 3 * 96,
    ),
    (
        "a copy, and what is put in it",
        lambda: call(aten.index_put.default, f32(9, 8), [indices(3)], f32(3, 8)),
        2 * 288 + 2 * 96 + 24,
    ),
    (
        "one of each row",
        lambda: call(aten.nll_loss_forward.default, f32(5, 99), indices(5), None, 1, -100),
        40 + 20 + 8,
    ),
]


@pytest.mark.parametrize(("make", "nbytes"), [m[1:] for m in MOVED], ids=[m[0] for m in MOVED])
def test_bytes_are_of_what_is_read_and_written(make: Any, nbytes: int) -> None:
    assert work_of(make()).nbytes == nbytes


STATES = {"Adam": 2, "SGD": 0, "Adagrad": 1, "Lion": 1}


@pytest.mark.parametrize("rule", list(STATES))
def test_an_update_moves_master_states_and_gradient(rule: str) -> None:
    optimizer = {"type": rule, "params": {"lr": 1e-3}}
    graph = tiny.planned(tiny.trace_of("mlp"), 2, optimizer=optimizer).graph
    for node in graph.nodes():
        if is_call(node, ops.update):
            shard = node.args[0].meta["val"].numel() * 4
            assert work_of(node).nbytes == shard * (2 + 1 + 2 * STATES[rule])


def test_an_update_writes_the_low_precision_copy() -> None:
    graph = tiny.planned(tiny.trace_of("half"), 3, fp16={"enabled": True}).graph
    update = next(n for n in graph.nodes() if is_call(n, ops.update))
    numel = update.args[0].meta["val"].numel()
    assert work_of(update).nbytes == numel * (4 * (2 + 1 + 4) + 2)


def test_gradients_are_put_with_one_copy_or_none_and_kept_for_nothing_or_added() -> None:
    once = tiny.planned(tiny.trace_of("mlp"), 2).graph
    puts = [n for n in once.nodes() if is_call(n, ops.put)]
    copied = [n for n in puts if not is_in_place(n)]
    assert [n.args[2] for n in copied] == ["norm.weight", "norm.bias"]
    assert {work_of(n).nbytes for n in copied} == {2 * 4 * tiny.WIDTH}
    assert {work_of(n).nbytes for n in puts if n not in copied} == {0}
    kept = [work_of(n).nbytes for n in once.nodes() if is_call(n, ops.accumulate)]
    assert set(kept) == {0}
    often = tiny.planned(tiny.trace_of("mlp"), 2, **TWICE).graph
    node = next(n for n in often.nodes() if is_call(n, ops.accumulate))
    assert work_of(node).nbytes == 3 * 4 * node.meta["val"].numel()


def test_views_waits_and_collectives_do_no_work() -> None:
    for node in plan_of("llama").graph.nodes():
        if is_view(node) or is_call(node, *ops.COLLECTIVES, ops.wait, ops.release):
            assert work_of(node) == Work()


# Clusters


def flat(world: int, bandwidth: float = 1e9, latency: float = 1e-5) -> Cluster:
    """`world` ranks on equal links, one a node, with no efficiencies and no other costs."""
    link = Link(bandwidth=bandwidth, latency=latency)
    return CLUSTERS["h100"].model_copy(
        update={"per_node": 1, "intra": link, "inter": link, "start": 0.0}
    )


def ring_of_messages(world: int, rounds: int, chunk: float, link: Link) -> float:
    """Each rank sends a chunk to the next, then what came, until all went round: message by message."""
    ready = [0.0] * world
    for _ in range(rounds * (world - 1)):
        arrives = [moment + link.latency + chunk / link.bandwidth for moment in ready]
        ready = [max(arrives[rank - 1], ready[rank]) for rank in range(world)]
    return max(ready)


def messages_to_all(world: int, part: float, link: Link) -> float:
    """Each rank sends a part to the next rank, then to the one behind it, as fast as its link sends."""
    arrives = [0.0] * world
    for rank in range(world):
        for step in range(1, world):
            receiver = (rank + step) % world
            moment = step * part / link.bandwidth + link.latency
            arrives[receiver] = max(arrives[receiver], moment)
    return max(arrives)


def doubling_of_messages(world: int, chunk: float, link: Link) -> float:
    """A gather in which ranks at distance 1, 2, 4, ... exchange all that they have."""
    have, ready, distance = [1] * world, [0.0] * world, 1
    while distance < world:
        pairs = [(rank, rank ^ distance) for rank in range(world)]
        moments = [
            max(ready[a], ready[b]) + link.latency + have[b] * chunk / link.bandwidth
            for a, b in pairs
        ]
        have = [have[a] + have[b] for a, b in pairs]
        ready, distance = moments, 2 * distance
    assert have == [world] * world
    return max(ready)


sizes = st.integers(1, 10**9)


@given(world=st.integers(2, 16), nbytes=sizes, kind=st.sampled_from(KINDS))
@settings(deadline=None)
def test_a_ring_costs_what_its_messages_cost(world: int, nbytes: int, kind: str) -> None:
    cluster = flat(world)
    rounds = 2 if kind == "all_reduce" else 1
    simulated = ring_of_messages(world, rounds, nbytes / world, cluster.inter)
    assert cluster._ring(kind, nbytes, world) == pytest.approx(simulated)  # type: ignore[arg-type]
    gloo = cluster.model_copy(update={"backend": "gloo"})
    if kind == "all_reduce":
        assert gloo.collective(kind, nbytes, world) == pytest.approx(simulated)
    else:
        direct = messages_to_all(world, nbytes / world, cluster.inter)
        assert gloo.collective(kind, nbytes, world) == pytest.approx(direct)


@given(depth=st.integers(1, 5), nbytes=sizes, kind=st.sampled_from(KINDS[:2]))
@settings(deadline=None)
def test_a_tree_of_a_gather_costs_what_its_messages_cost(
    depth: int, nbytes: int, kind: str
) -> None:
    """A reduce-scatter is the same exchange backwards."""
    world = 2**depth
    simulated = doubling_of_messages(world, nbytes / world, flat(world).inter)
    assert flat(world)._tree(kind, nbytes, world) == pytest.approx(simulated)  # type: ignore[arg-type]


def parents_of(world: int, shift: int) -> dict[int, int]:
    """A binary tree in which odd places are leaves: the parent of each rank but the root's."""
    parents = {}
    for place in range(1, world):
        bit = place & -place
        above = (place ^ bit) | (bit << 1)
        parents[(place + shift) % world] = (
            (above if above < world else place ^ bit) + shift
        ) % world
    return parents


@given(depth=st.integers(1, 6))
@settings(deadline=None)
def test_two_trees_send_at_most_twice_the_buffer_and_are_log_deep(depth: int) -> None:
    """An all-reduce up and down two trees, each with half of the buffer, leaves of one inner in the other."""
    world = 2**depth
    trees = [parents_of(world, 0), parents_of(world, 1)]
    sends = dict.fromkeys(range(world), 0.0)
    for parents in trees:
        for child, parent in parents.items():
            sends[child] += 0.5
            sends[parent] += 0.5
    cluster = flat(world, bandwidth=1.0, latency=0.0)
    assert max(sends.values()) <= cluster._tree("all_reduce", 1, world) == 2.0
    hops = 0
    for child in trees[0]:
        at, steps = child, 0
        while at in trees[0]:
            at, steps = trees[0][at], steps + 1
        hops = max(hops, steps)
    silent = flat(world, bandwidth=1e30, latency=1.0)
    assert 2 * hops == round(silent._tree("all_reduce", 1, world))


@given(
    name=st.sampled_from(sorted(CLUSTERS)),
    kind=st.sampled_from(KINDS),
    world=st.integers(2, 65536),
    nbytes=sizes,
)
@settings(deadline=None)
def test_a_collective_is_never_below_its_bytes_and_grows_with_them(
    name: str, kind: str, world: int, nbytes: int
) -> None:
    cluster = CLUSTERS[name]
    took = cluster.collective(kind, nbytes, world)
    assert 0 < took <= cluster.collective(kind, 2 * nbytes, world)
    fastest = max(cluster.intra.bandwidth, cluster.inter.bandwidth * cluster.per_node)
    assert took >= cluster.bytes_per_link(kind, nbytes, world) / fastest


def test_small_messages_of_large_worlds_go_by_tree_and_large_ones_by_ring() -> None:
    h100 = CLUSTERS["h100"]
    assert h100._tree("gather", 8 * 4096, 4096) < h100._ring("gather", 8 * 4096, 4096)
    assert h100._ring("gather", 2**30, 64) < h100._tree("gather", 2**30, 64)
    assert h100._tree("all_reduce", 8, 65536) < h100._ring("all_reduce", 8, 65536) / 100


def test_a_ring_over_nodes_has_the_networks_of_all_its_ranks() -> None:
    """8 GPUs with 50 GB/s each are 400 GB/s a node, which is less than what NVLink gives a GPU."""
    h100, n = CLUSTERS["h100"], 8 * 10**12
    within, between = h100.collective("gather", n, 8), h100.collective("gather", n, 16)
    assert within == pytest.approx(n * 7 / 8 / 360e9, rel=1e-3)
    assert between == pytest.approx(n * 15 / 16 / 360e9, rel=1e-3)
    slow = h100.model_copy(update={"inter": Link(bandwidth=10e9, latency=0.0)})
    assert slow.collective("gather", n, 16) == pytest.approx(n * 15 / 16 / 80e9, rel=1e-3)


def test_on_gloo_buckets_go_point_to_point() -> None:
    """Four ranks: each sends a quarter to each other rank, copies its own, and sums four in place."""
    for kind in ("gather", "refresh", "reduce_scatter"):
        assert CPU.bytes_per_link(kind, 400, 4) == 300
        assert CPU.hops(kind, 4) == 1
    assert CPU.bytes_per_link("all_reduce", 400, 4) == 600
    assert CPU.hops("gather_partials", 4) == 3, "small messages go round gloo's ring"
    assert CPU.hops("all_reduce", 4) == 6
    assert CPU.copied("gather", 400, 4) == 200
    assert CPU.summed("reduce_scatter", 400, 4) == 700
    nccl = CLUSTERS["h100"]
    for touched in (CPU.copied, CPU.summed):
        assert touched("all_reduce", 400, 4) == touched("gather", 400, 1) == 0
    for kind in ("gather", "reduce_scatter"):
        assert nccl.copied(kind, 400, 4) == nccl.summed(kind, 400, 4) == 0


@pytest.mark.parametrize("name", sorted(CLUSTERS))
def test_a_cluster_is_the_same_after_saving(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    CLUSTERS[name].save(path)
    assert cluster_of(str(path)) == CLUSTERS[name]


def without(path: str) -> Any:
    def drop(given: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for part in outer:
            given = given[part]
        del given[last]

    return drop


BROKEN: dict[str, tuple[Any, str]] = {
    "missing": (without("device.bandwidth"), "device.bandwidth: Field required"),
    "no f32": (without("device.flops.f32"), 'device.flops: Value error, needs at least "f32"'),
    "negative": (lambda g: g["inter"].update(latency=-1), "inter.latency: Input should be"),
    "unknown": (lambda g: g.update(nodes=3), "nodes: Extra inputs are not permitted"),
    "kind": (lambda g: g["intra"].update(efficiency={"send": 1}), "intra.efficiency.send"),
    "backend": (lambda g: g.update(backend="mpi"), "backend: Input should be 'nccl' or 'gloo'"),
}


@pytest.mark.parametrize("fault", list(BROKEN))
def test_a_broken_cluster_file_is_one_clear_line(fault: str, tmp_path: Path) -> None:
    change, message = BROKEN[fault]
    described = json.loads(CPU.dumps())
    change(described)
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(described))
    with pytest.raises(PlanError) as raised:
        cluster_of(str(path))
    assert str(raised.value).startswith(f"{path} is not a cluster: {message}")
    assert "\n" not in str(raised.value)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no cluster 'h1000' .*; did you mean 'h100'\?"):
        cluster_of("h1000")
    with pytest.raises(
        PlanError, match=r"no cluster 'slow machine' .*; there are a100, h100, .*, cpu"
    ):
        cluster_of("slow machine")
    with pytest.raises(PlanError, match=r"none\.json: No such file"):
        cluster_of(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(PlanError, match=r"text\.json is not a cluster: the file: Invalid JSON"):
        cluster_of(str(tmp_path / "text.json"))


# The timeline


def by_stream(timeline: Timeline, stream: str) -> list[Any]:
    return sorted(
        (span for span in timeline.spans if span.stream == stream), key=lambda s: (s.start, s.end)
    )


@pytest.mark.parametrize("cluster", ["cpu", "h100"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_timeline_keeps_the_order_of_streams_and_waits(stage: int, cluster: str) -> None:
    plan = plan_of("llama", stage, world=16)
    timeline = plan.timeline(cluster)
    nodes = plan.graph.nodes()
    for stream in ("compute", "communication"):
        spans = by_stream(timeline, stream)
        assert [s.node for s in spans] == sorted(s.node for s in spans)
        for before, after in pairwise(spans):
            assert before.end <= after.start + 1e-12
    compute = [span for span in timeline.spans if span.stream == "compute"]
    moved = {nodes[s.node]: s for s in timeline.spans if s.stream == "communication"}
    assert len(moved) == sum(t.count for t in traffic_of(plan.graph).values())
    for index, node in enumerate(nodes):
        if is_call(node, ops.wait, ops.refreshed):
            done = end_of(node, moved, timeline)
            assert all(s.start >= done - 1e-9 for s in compute if s.node > index)
        if node in moved:
            before = [s.end for s in compute if s.node < index]
            assert moved[node].start >= max(before, default=0.0) - 1e-12
    assert timeline.waited <= timeline.busy["communication"] + 1e-12
    longest = max(timeline.busy.values())
    assert longest <= timeline.seconds <= 1.000001 * (sum(timeline.busy.values()) + host(plan))


def end_of(wait: fx.Node, moved: dict[fx.Node, Any], timeline: Timeline) -> float:
    """When the collective of a wait is done, counted from the start of the step that waits.

    What the step before has started is its span in a step like it, one step earlier.
    """
    start: Any = wait.args[0]
    if is_call(wait, ops.refreshed):
        (start,) = (n for n in moved if is_call(n, ops.refresh) and bucket_of(n) == wait.args[1])
    elif is_ahead(start):
        (start,) = (n for n in moved if is_call(n, ops.gather_ahead) and n.args[1] == start.args[1])
    else:
        return float(moved[start].end)
    return float(moved[start].end) - timeline.seconds


def nothing_ahead(plan: Plan) -> TrainGraph:
    """The plan's graph with a step that starts nothing for the next: it waits, and the forward gathers."""
    graph = plan.graph.copy()
    refreshes = [n for n in graph.nodes("step") if is_call(n, ops.refresh)]
    with graph.inserting(graph.end("step"), "step") as insert:
        for node in refreshes:
            insert(ops.wait, node)
    for node in graph.nodes():
        if is_call(node, ops.refreshed):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif is_ahead(node):
            node.args = node.args[:3]
        elif is_call(node, ops.gather_ahead):
            graph.graph.erase_node(node)
    return graph


def slow() -> Cluster:
    """A link of a tenth of the described one."""
    link = CPU.intra.model_copy(update={"bandwidth": CPU.intra.bandwidth / 10})
    return CPU.model_copy(update={"intra": link, "inter": link})


@pytest.mark.parametrize("model", ["llama", "gpt2", "blocks"])
@pytest.mark.parametrize("cluster", [CPU, slow()], ids=["cpu", "slow"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_starts_the_next_ones_collectives_is_no_longer(
    stage: int, cluster: Cluster, model: str
) -> None:
    """One among others like it: what it starts at its end, the next one need not."""
    blocks = model == "blocks"
    plan = tiny.planned(tiny.trace_of("blocks", 2), stage) if blocks else plan_of(model, stage)
    bare = nothing_ahead(plan)
    started = [n for n in plan.graph.nodes() if is_call(n, ops.gather_ahead, ops.refresh)]
    assert started and not [n for n in bare.nodes() if is_call(n, ops.gather_ahead, ops.refreshed)]
    now, before = timeline_of(plan.graph, cluster), timeline_of(bare, cluster)
    assert now.seconds <= before.seconds * (1 + 1e-9)
    assert now.waited <= before.waited * (1 + 1e-9)
    moved = [sum(s.stream == "communication" for s in each.spans) for each in (now, before)]
    assert moved[0] == moved[1], "every bucket still moves once"


@pytest.mark.parametrize("cluster", ["cpu", "h100"])
def test_the_span_of_a_gather_ahead_stands_for_its_gather(cluster: str) -> None:
    plan = plan_of("llama", 3, world=16)
    nodes = plan.graph.nodes()
    spans = {nodes[s.node]: s for s in plan.timeline(cluster).spans}
    taken = {bucket_of(n) for n in nodes if is_ahead(n)}
    ahead = [n for n in nodes if is_call(n, ops.gather_ahead)]
    assert taken == {bucket_of(n) for n in ahead} != set()
    assert not [n for n in spans if is_ahead(n)]
    described = cluster_of(cluster)
    for node in ahead:
        span = spans[node]
        assert (span.region, span.stream) == ("step", "communication")
        nbytes = collective_bytes(node)
        assert nbytes == collective_bytes(
            next(n for n in nodes if is_ahead(n) and n.args[1] == node.args[1])
        )
        least = described.collective(name_of(node), nbytes, plan.graph.world)
        assert span.seconds >= least * (1 - 1e-6)
        assert least == described.collective("gather", nbytes, plan.graph.world)
    update = {bucket_of(n): spans[n] for n in nodes if is_call(n, ops.update)}
    for node in ahead:
        if bucket_of(node) in update:
            assert spans[node].start >= update[bucket_of(node)].end - 1e-12


def host(plan: Plan) -> float:
    """More than the host can need for all nodes."""
    return 1e-5 * len(plan.graph.nodes())


def llama_graph() -> TrainGraph:
    return plan_of("llama", 3, world=16).graph


@given(
    factor=st.floats(1.0, 1e4),
    start=st.floats(1e5, 1e11),
    share=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    asynchronous=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_more_bandwidth_is_never_slower(
    factor: float, start: float, share: tuple[float, float], asynchronous: bool
) -> None:
    device = CPU.device.model_copy(update={"asynchronous": asynchronous})

    def seconds(bandwidth: float) -> float:
        link = Link(bandwidth=bandwidth, latency=1e-6)
        slows = {"slows_compute": share[0], "slowed_by_compute": share[1]}
        described = {"device": device, "intra": link, "inter": link, **slows}
        return timeline_of(llama_graph(), CPU.model_copy(update=described)).seconds

    assert seconds(start * factor) <= seconds(start) * (1 + 1e-9)


def test_without_sharing_cores_a_collective_hides_behind_compute() -> None:
    """Two ends of one scale: cores of its own, and one core for both."""
    graph = llama_graph()
    free = CPU.model_copy(update={"slows_compute": 0.0, "slowed_by_compute": 0.0})
    link = Link(bandwidth=1e9, latency=0.0)
    free = free.model_copy(update={"intra": link, "inter": link, "start": 0.0})
    apart = timeline_of(graph, free)
    shared = timeline_of(graph, free.model_copy(update={"slows_compute": 0.9}))
    assert apart.seconds < shared.seconds
    assert shared.busy["compute"] > apart.busy["compute"]


def test_a_host_that_runs_ahead_is_the_limit_of_small_kernels() -> None:
    graph = llama_graph()
    h100 = CLUSTERS["h100"]
    assert timeline_of(graph, h100).seconds >= h100.device.launch * sum(
        1 for n in graph.nodes() if work_of(n).nbytes
    )


def test_one_rank_communicates_nothing() -> None:
    timeline = tiny.planned(tiny.trace_of("blocks", 1), 3).timeline("cpu")
    assert not by_stream(timeline, "communication")
    assert timeline.waited == 0.0
    assert timeline.hidden == 1.0


def test_planning_time_does_not_depend_on_the_world() -> None:
    """Nothing loops over ranks: the same nodes, and closed forms."""
    small, large = (tiny.planned(tiny.trace_of("blocks", world), 3) for world in (2, 65536))
    assert len(small.graph.nodes()) == len(large.graph.nodes())
    assert large.timeline("h100").busy["communication"] > 0


# Calibration


@given(slows=st.floats(0, 0.6), slowed=st.floats(0, 0.6), compute=st.floats(0.5, 2))
def test_shares_are_found_again(slows: float, slowed: float, compute: float) -> None:
    """What the two measurements see is inverted."""
    late, stretched = slows / (1 - slowed), slowed / (1 - slows)
    if abs(1 - late * stretched) >= 0.1:
        assert shares(late, stretched) == pytest.approx((slows, slowed))
    else:
        assert shares(late, stretched) == (0.5, 0.5)


def test_what_nonsense_measures_stays_a_share() -> None:
    for late, stretched in ((3.0, 0.0), (-1.0, 2.0), (1.4, 1.3), (0.2, 9.0)):
        assert all(0 <= share <= 0.9 for share in shares(late, stretched))


def test_alpha_and_beta_are_found_again() -> None:
    rows = [(1, 1e4), (1, 1e6), (2, 3e6)]
    times = [hops * 2e-4 + nbytes / 5e8 for hops, nbytes in rows]
    assert _solve(rows, times) == pytest.approx((2e-4, 5e8))


def _calibrated(rank: int, world: int) -> str:
    """With less of everything that is measured."""
    timing.ROUNDS, operators.COPIES = 2, (1 << 20,)
    reference.LAYERS, reference.STEPS, reference.WORDS = 1, 1, 2048
    links.SIZES = (1 << 14, 1 << 16, 1 << 18)
    return calibrate().dumps()


def test_calibration_describes_the_group_that_it_runs_in() -> None:
    first, second = run_ranks(2, _calibrated)
    assert first == second
    found = Cluster.model_validate_json(first)
    assert (found.name, found.backend, found.per_node) == ("this machine", "gloo", 2)
    assert set(found.device.flops) == {"f32", "f64", "bf16", "f16"}
    assert not found.device.asynchronous
    assert 1e8 < found.device.host_bandwidth < 1e12
    assert found.device.host_bandwidth != Device.model_fields["host_bandwidth"].default
    assert max(found.intra.efficiency.values()) == 1.0


def test_calibrating_one_rank_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 2 ranks to measure a link, got 1"):
        calibrate(1)


# Recordings


def _recorded(rank: int, world: int, stage: int) -> tuple[str, list[tuple[str, str, str]], str]:
    engine = zerograph.compile(tiny.Blocks(dropout=0.0), tiny.config(stage, **TWICE))
    batch = tiny.batch()

    def step() -> torch.Tensor:
        for _ in range(2):
            loss = engine(**batch)["loss"]
            engine.backward(loss)
            engine.step()
        return loss.detach()

    step()
    with zerograph.record(engine) as run:
        step()
        step()
    kept = run.recording
    step()
    assert run.recording == kept, "what runs later is not recorded"
    nodes = [(n.op, n.region, n.stream) for n in engine.plan.document("cpu").nodes]
    return kept.dumps(), nodes, repr(engine.get_global_grad_norm())


def _unrecorded(rank: int, world: int, stage: int) -> str:
    engine = zerograph.compile(tiny.Blocks(dropout=0.0), tiny.config(stage, **TWICE))
    for _ in range(8):
        engine.backward(engine(**tiny.batch())["loss"])
        engine.step()
    return repr(engine.get_global_grad_norm())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_recording_is_of_the_plans_nodes(stage: int) -> None:
    for rank, (dumped, nodes, norm) in enumerate(run_ranks(2, _recorded, stage)):
        recording = Recording.model_validate_json(dumped)
        assert (recording.rank, recording.world, recording.stage) == (rank, 2, stage)
        assert recording.model == "Blocks"
        found = {(s.node, s.stream) for s in recording.spans}
        assert len(found) == len(recording.spans)
        for span in recording.spans:
            op, region, stream = nodes[span.node]
            assert span.region == region
            assert (span.stream == "communication") == (stream == "communication"), op
        timed = {i for i, (_, _, stream) in enumerate(nodes) if stream}
        missing = timed - {s.node for s in recording.spans}
        assert not missing, [nodes[i] for i in missing]
        compute = [s for s in recording.spans if s.stream == "compute"]
        for before, after in pairwise(compute):
            assert before.start + before.seconds <= after.start + 1e-9
        assert norm == NORMS.setdefault(stage, run_ranks(2, _unrecorded, stage)[0])


NORMS: dict[int, str] = {}


def test_nothing_recorded_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    engine = zerograph.compile(tiny.Mlp(), tiny.config(0))
    with zerograph.record(engine) as run:
        engine(**tiny.batch())
    with pytest.raises(PlanError, match=r"no complete step was recorded; run the forward"):
        run.save(tmp_path / "run.json")


def test_a_recording_is_the_same_after_saving(tmp_path: Path) -> None:
    engine = zerograph.compile(tiny.Mlp(), tiny.config(0))
    with zerograph.record(engine) as run:
        engine.backward(engine(**tiny.batch()))
        engine.step()
    path = tmp_path / "run.json"
    run.save(path)
    assert Recording.load(path) == run.recording
    assert run.recording.seconds >= run.recording.busy("compute") > 0
    path.write_text(path.read_text().replace('"compute"', '"tensor"', 1))
    with pytest.raises(PlanError, match=r"run\.json is not a recording: spans\.\d+\.stream"):
        Recording.load(path)
