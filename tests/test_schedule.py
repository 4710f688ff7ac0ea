"""The schedule: how early gathers start, how late reductions end, and the bounds that hold."""

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests import tiny
from zerograph import ops, pipeline
from zerograph.config import load_config
from zerograph.cost import memory_of, peak_gathered
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import bucket_of, is_ahead, is_call, region_of
from zerograph.optimizer import optimizer_of
from zerograph.passes import Gather, Schedule
from zerograph.planning import default_arriving, passes_for
from zerograph.runtime.agree import first_difference
from zerograph.trace import Trace

WORLD = 4
BLOCKS = (64 + 32 + 32, 192, 192, 128)
"""Elements of the four buckets of `tiny.Blocks` for 4 ranks."""


FAR = 10**9
"""More than anything here: a bound or a reach that never counts."""


def scheduled(
    trace: Trace,
    prefetch: int,
    max_live: int = FAR,
    reach: int | None = None,
    across: bool = True,
    reuse: int = 0,
    optimizer: bool = True,
    any_size: bool = False,
) -> TrainGraph:
    """The plan of stage 3 with the schedule's bounds, verified after each pass.

    The pass is given what to prefetch, not the config, which would have blocks cut to that size as well.
    """
    graph = trace.graph.copy()
    zero = {"stage": 3, "stage3_max_live_parameters": max_live}
    zero |= {"stage3_max_reuse_distance": reuse}
    given = tiny.config(3, zero_optimization=zero)
    if not optimizer:
        del given["optimizer"]
    config = load_config(given)
    spec = optimizer_of(config, graph.layout) if optimizer else None
    *passes, last = passes_for(config, graph, default_arriving(graph), spec)
    assert isinstance(last, Schedule)
    reach = last.reach if reach is None else reach
    last = replace(last, prefetch=prefetch, across=across, reach=reach, any_size=any_size)
    passes = [replace(each, across=across) if isinstance(each, Gather) else each for each in passes]
    pipeline.run(graph, [*passes, last])
    return graph


def blocks(prefetch: int, max_live: int = FAR, **more: Any) -> TrainGraph:
    return scheduled(tiny.trace_of("blocks", WORLD), prefetch, max_live, **more)


def events(graph: TrainGraph, region: Any) -> str:
    """The region's gathers, waits, releases, updates, and gathers for the next step: "g0 w0 g1 r0 ..."."""
    found = []
    for node in graph.nodes(region):
        if is_call(node, ops.gather):
            found.append(f"g{node.args[1][1:]}")
        elif is_call(node, ops.wait) and is_call(node.args[0], ops.gather):
            found.append(f"w{node.args[0].args[1][1:]}")
        elif is_call(node, ops.release):
            found.append(f"r{node.args[1][1:]}")
        elif is_call(node, ops.update):
            found.append(f"u{node.args[7][1:]}")
        elif is_call(node, ops.gather_ahead):
            found.append(f"a{node.args[1][1:]}")
    return " ".join(found)


def line(graph: TrainGraph) -> list[str]:
    """The events of forward and backward, one after the other."""
    return f"{events(graph, 'forward')} {events(graph, 'backward')}".split()


def ahead(graph: TrainGraph) -> str:
    """The buckets that the forward takes from the step before: "012". The step starts the same ones."""
    taken = "".join(n.args[1][1:] for n in graph.nodes("forward") if is_ahead(n))
    assert taken == "".join(e[1:] for e in events(graph, "step").split() if e[0] == "a")
    assert not any(is_ahead(n) for n in graph.nodes() if region_of(n) != "forward")
    return taken


def most_alive(graph: TrainGraph) -> int:
    """Gathered elements alive at once, counted event by event around the ring of one step."""
    sizes = {name[1:]: bucket.numel for name, bucket in graph.layout.buckets.items()}
    taken = ahead(graph)
    most = alive = sum(sizes[bucket] for bucket in taken)
    left = list(taken)
    for event in [*line(graph), *events(graph, "step").split()]:
        kind, bucket = event[0], event[1:]
        if kind == "g" and bucket in left:
            left.remove(bucket)  # counted: it is under way since the step before
        elif kind in "ga":
            alive += sizes[bucket]
        elif kind == "r":
            alive -= sizes[bucket]
        most = max(most, alive)
    assert alive == sum(sizes[bucket] for bucket in taken), "a step leaves what it found"
    return most


def wait_of(node: fx.Node) -> fx.Node:
    return next(user for user in node.users if is_call(user, ops.wait))


# Gathers


def test_sizes_of_the_blocks() -> None:
    layout = tiny.trace_of("blocks", WORLD).graph.layout
    assert tuple(b.numel for b in layout.buckets.values()) == BLOCKS


@pytest.mark.parametrize("region, order", [("forward", "012"), ("backward", "21")])
def test_no_prefetch_gathers_just_in_time(region: str, order: str) -> None:
    graph = blocks(prefetch=0)
    inner = " ".join(f"g{b} w{b} r{b}" for b in order)
    kept = {"forward": f"{inner} g3 w3", "backward": f"r3 {inner}"}  # used last and first again
    assert events(graph, region) == kept[region]
    assert ahead(graph) == ""
    for gather in (n for n in graph.nodes(region) if is_call(n, ops.gather)):
        assert wait_of(gather) is gather.next


@pytest.mark.parametrize(
    "prefetch, forward, backward",
    [
        (127, "g0 w0 r0 g1 w1 r1 g2 w2 r2 g3 w3", "r3 g2 w2 r2 g1 w1 r1"),
        (128, "g0 w0 r0 g1 w1 r1 g2 g3 w2 r2 w3", "r3 g2 w2 r2 g1 w1 r1"),
        (192, "g0 g1 w0 r0 g2 w1 r1 g3 w2 r2 g2 w3", "r3 g1 w2 r2 w1 r1"),
        (319, "g0 g1 w0 r0 g2 w1 r1 g3 w2 r2 g2 w3", "r3 g1 w2 r2 w1 r1"),
        (320, "g0 g1 w0 r0 g2 g3 w1 r1 w2 r2 g2 w3", "r3 g1 w2 r2 w1 r1"),
        (384, "g0 g1 g2 w0 r0 g3 w1 r1 w2 r2 g2 w3", "g1 r3 w2 r2 w1 r1"),
        (FAR, "g0 g1 g2 g3 w0 r0 w1 r1 w2 r2 g2 w3", "g1 r3 w2 r2 w1 r1"),
    ],
)
def test_prefetch_is_what_may_be_in_flight_beside_the_one_waited_for(
    prefetch: int, forward: str, backward: str
) -> None:
    graph = blocks(prefetch, reach=FAR)
    assert (events(graph, "forward"), events(graph, "backward")) == (forward, backward)


def starts(graph: TrainGraph) -> list[int]:
    """For each gather of the line, how many waits stand before it."""
    found = line(graph)
    kinds = [event[0] for event in found]
    return [kinds[:index].count("w") for index, kind in enumerate(kinds) if kind == "g"]


def test_a_block_larger_than_the_default_prefetch_starts_early_all_the_same() -> None:
    assert events(blocks(10), "forward") == events(blocks(0), "forward")
    assert events(blocks(10, any_size=True), "forward") == events(blocks(192), "forward")
    bound = BLOCKS[0] + BLOCKS[1] - 1
    tight = blocks(10, max_live=bound, any_size=True)
    assert peak_gathered(tight) <= bound
    for key, expected in (({}, True), ({"stage3_prefetch_bucket_size": 5e7}, False)):
        config = load_config(tiny.config(3, zero_optimization={"stage": 3, **key}))
        graph = tiny.trace_of("blocks", WORLD).graph.copy()
        last = passes_for(config, graph, default_arriving(graph), None)[-1]
        assert isinstance(last, Schedule) and last.any_size is expected


def test_more_prefetch_or_reach_starts_no_gather_later() -> None:
    by_prefetch = [blocks(prefetch, reach=FAR) for prefetch in (0, 100, 200, 300, 400, 600, FAR)]
    by_reach = [blocks(FAR, reach=reach) for reach in range(6)]
    for graphs in (by_prefetch, by_reach):
        for less, more in pairwise(graphs):
            assert all(a >= b for a, b in zip(starts(less), starts(more), strict=True))
            assert ahead(more).startswith(ahead(less))
        assert starts(graphs[0]) == list(range(6)), "just in time"
        assert starts(graphs[-1]) == [0, 0, 0, 0, 3, 4], "at the turn one is under way"


@pytest.mark.parametrize(
    "reach, forward, backward",
    [
        (0, "g0 w0 r0 g1 w1 r1 g2 w2 r2 g3 w3", "r3 g2 w2 r2 g1 w1 r1"),
        (1, "g0 g1 w0 r0 g2 w1 r1 g3 w2 r2 g2 w3", "r3 g1 w2 r2 w1 r1"),
        (2, "g0 g1 g2 w0 r0 g3 w1 r1 w2 r2 g2 w3", "g1 r3 w2 r2 w1 r1"),
        (3, "g0 g1 g2 g3 w0 r0 w1 r1 w2 r2 g2 w3", "g1 r3 w2 r2 w1 r1"),
    ],
)
def test_reach_is_how_many_gathers_wait_behind_the_one_needed_next(
    reach: int, forward: str, backward: str
) -> None:
    graph = blocks(FAR, reach=reach)
    assert (events(graph, "forward"), events(graph, "backward")) == (forward, backward)
    assert ahead(graph) == "0123"[: reach + 1]


def test_a_plan_reaches_two_gathers_ahead() -> None:
    assert line(blocks(FAR)) == line(blocks(FAR, reach=2)) != line(blocks(FAR, reach=3))


# From one region into the one before


def test_gathers_of_the_backward_may_start_in_the_forward() -> None:
    graph = blocks(FAR)
    crossing = [n for n in graph.nodes("forward") if is_call(n, ops.gather)]
    crossing = [n for n in crossing if region_of(wait_of(n)) == "backward"]
    assert [n.args[1] for n in crossing] == ["b2"]
    for gather in crossing:
        assert gather in graph.outputs("saved"), "the backward gets what is under way"
        assert wait_of(gather) not in graph.outputs("saved")
    first = next(n for n in graph.nodes() if is_call(n, ops.wait) and n.args[0].args[1] == "b3")
    assert crossing[-1].next is first, "at the last place in the forward"


@pytest.mark.parametrize("reach", [0, 1, 2, FAR])
def test_nothing_crosses_where_another_backward_may_run(reach: int) -> None:
    graph = blocks(FAR, reach=reach, across=False)
    for region, buckets in (("forward", "0123"), ("backward", "321")):
        found = events(graph, region).split()
        for kind in "gwr":
            assert of_kind(found, kind) == [f"{kind}{bucket}" for bucket in buckets]
    assert ahead(graph) == ""
    assert not [n for n in graph.outputs("saved") if is_call(n, ops.gather, ops.wait)]


@pytest.mark.parametrize(
    "prefetch, reach, expected",
    [
        (0, 2, ""),
        (127, 2, ""),
        (128, 2, "0"),
        (319, 2, "0"),
        (320, 2, "01"),
        (511, 2, "01"),
        (512, 2, "012"),
        (FAR, 2, "012"),
        (639, FAR, "012"),
        (640, FAR, "0123"),
        (FAR, FAR, "0123"),
    ],
)
def test_the_step_starts_what_fits_in_flight(prefetch: int, reach: int, expected: str) -> None:
    assert ahead(blocks(prefetch, reach=reach)) == expected


@pytest.mark.parametrize(
    "bound, expected",
    [(192, "0"), (319, "0"), (320, "01"), (511, "01"), (512, "012"), (639, "012"), (640, "0123")],
)
def test_the_step_starts_what_may_be_alive(bound: int, expected: str) -> None:
    graph = blocks(FAR, bound, reach=FAR)
    assert ahead(graph) == expected
    assert most_alive(graph) <= bound


def test_the_step_starts_a_gather_right_behind_the_update_of_its_bucket() -> None:
    """A frozen bucket has none: its gather is first, behind the first update."""
    assert events(blocks(0), "step") == "u1 u2 u3"
    assert events(blocks(FAR), "step") == "u1 a0 a1 u2 a2 u3"
    assert events(blocks(FAR, reach=FAR), "step") == "u1 a0 a1 u2 a2 u3 a3"


def test_without_an_update_nothing_is_started_for_a_next_step() -> None:
    graph = blocks(FAR, optimizer=False)
    assert ahead(graph) == "" and events(graph, "step") == ""


@pytest.mark.parametrize("bound", [192, 200, 256, 320, 384, 450, 512, 640, FAR])
def test_live_bound_holds_with_any_prefetch(bound: int) -> None:
    for reach in (0, 1, 2, FAR):
        graph = blocks(FAR, bound, reach=reach)
        assert peak_gathered(graph) == most_alive(graph) <= bound
    assert peak_gathered(blocks(0, bound)) == max(BLOCKS)


def test_live_bound_is_used() -> None:
    assert peak_gathered(blocks(FAR, FAR, reach=FAR)) == sum(BLOCKS)
    assert peak_gathered(blocks(FAR, sum(BLOCKS), reach=FAR)) == sum(BLOCKS)
    assert peak_gathered(blocks(FAR, sum(BLOCKS) - 1, reach=FAR)) < sum(BLOCKS)


def test_a_bound_too_small_names_the_bucket_and_the_smallest_that_works() -> None:
    with pytest.raises(
        PlanError,
        match=r"stage3_max_live_parameters is 191, but 192 gathered elements are alive when "
        r"bucket b1 \(blocks\.0, 192 elements\) is used; set it to at least 192",
    ):
        tiny.planned(
            tiny.trace_of("blocks", WORLD),
            3,
            zero_optimization={"stage": 3, "stage3_max_live_parameters": 191},
        )
    assert peak_gathered(blocks(FAR, 192)) == 192


def test_the_error_names_a_bound_that_works_where_several_buckets_do_not_fit() -> None:
    with pytest.raises(PlanError, match=f"at least {max(BLOCKS)}"):
        blocks(0, 64)
    assert peak_gathered(blocks(0, max(BLOCKS))) == max(BLOCKS)


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return (hidden @ self.embed.weight.t()).square().mean()


def test_a_tied_bucket_is_not_gathered_twice_at_once() -> None:
    """It is gathered again for the head, and not ahead of its first use."""
    trace = tiny.traced(Tied(), {"ids": torch.zeros(2, 3, dtype=torch.long)}, WORLD)
    for reach in (2, FAR):
        graph = scheduled(trace, FAR, reach=reach)
        order = events(graph, "forward").split()
        assert order.count("g0") == 2
        again = len(order) - 1 - order[::-1].index("g0")
        assert order.index("w0") < again
        assert ahead(graph) == "012", "what the step starts is the first of the two"


def test_a_bucket_is_gathered_again_only_behind_its_release() -> None:
    """The first bucket is kept over a list, 40 elements, and not over two."""
    kinds = ("list", "again", "list", "list", "again")
    graph = scheduled(chain(kinds), FAR, reach=FAR, reuse=40)
    order = events(graph, "forward").split()
    assert [e for e in order if e[1:] == "0"][:5] == ["g0", "w0", "r0", "g0", "w0"]
    again = order.index("g0", 1)
    assert order[again:] and order.index("w2") < order.index("r0") < again < order.index("w4")


# The turn from forward to backward


class Headed(nn.Module):
    """Layers of 16 x 16 and a head, whose output is the largest value if there are many classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.cross_entropy(self.head(x), y)


@functools.cache
def headed(classes: int, rows: int = 8) -> Trace:
    batch = {"x": torch.randn(rows, 16), "y": torch.zeros(rows, dtype=torch.long)}
    return tiny.traced(Headed(classes), batch, 2)


def passes_of(trace: Trace, stage: int) -> list[Any]:
    graph = trace.graph.copy()
    config = load_config(tiny.config(stage))
    spec = optimizer_of(config, graph.layout)
    return passes_for(config, graph, default_arriving(graph), spec)


def test_one_gather_for_the_backward_is_under_way_at_the_turn() -> None:
    """The head is kept; of the two layers that would start beside it one starts where its gradients do."""
    graph = headed(4096).graph.copy()
    pipeline.run(graph, passes_of(headed(4096), 3))
    assert events(graph, "forward").split()[-2:] == ["g2", "w3"]
    assert [bucket_of(n) for n in graph.outputs("saved") if n is not None and is_start(n)] == ["b2"]
    first = next(n for n in graph.nodes("backward") if is_call(n, ops.param, ops.grad_buffer))
    assert is_start(first.prev) and bucket_of(first.prev) == "b1"
    assert region_of(first.prev) == "backward"
    peak = memory_of(graph).peak_moment
    assert peak is not None and peak.node < graph.nodes().index(first.prev), "behind the peak"


def is_start(node: fx.Node) -> bool:
    return is_call(node, ops.gather)


# Reductions


def test_a_reduction_ends_behind_the_start_of_the_next() -> None:
    graph = blocks(0)
    found = []
    for node in graph.nodes("backward"):
        if is_call(node, ops.reduce_scatter):
            found.append(f"start {node.args[1]}")
        elif is_call(node, ops.accumulate):
            assert node.prev is node.args[1], "right behind its wait"
            found.append(f"end {node.args[2]}")
    assert found == ["start b3", "start b2", "end b3", "start b1", "end b2", "end b1"]


@pytest.mark.parametrize(
    ("in_flight", "expected"),
    [
        (1, "s3 e3 s2 e2 s1 e1 s0 e0"),
        (2, "s3 s2 s1 e3 e2 s0 e1 e0"),
        (3, "s3 s2 s1 s0 e3 e2 e1 e0"),
    ],
)
def test_a_reduction_larger_than_the_next_ends_one_later(in_flight: int, expected: str) -> None:
    *passes, last = passes_of(headed(40), 2)
    graph = headed(40).graph.copy()
    pipeline.run(graph, [*passes, replace(last, in_flight=in_flight)])
    assert [graph.layout.buckets[f"b{i}"].numel for i in range(4)] == [288, 288, 288, 704]
    found = []
    for node in graph.nodes("backward"):
        if is_call(node, ops.reduce_scatter):
            found.append(f"s{bucket_of(node)[1:]}")
        elif is_call(node, ops.accumulate):
            found.append(f"e{bucket_of(node)[1:]}")
    assert " ".join(found) == expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 9])
def test_no_more_reductions_are_under_way_than_allowed(in_flight: int, stage: int) -> None:
    kind = ops.all_reduce if stage == 0 else ops.reduce_scatter
    graph = tiny.trace_of("blocks", WORLD).graph.copy()
    config = load_config(tiny.config(stage))
    spec = optimizer_of(config, graph.layout)
    *passes, _ = passes_for(config, graph, default_arriving(graph), spec)
    pipeline.run(graph, [*passes, Schedule(0, FAR, in_flight)])
    alive = most = 0
    for node in graph.nodes("backward"):
        alive += is_call(node, kind)
        most = max(most, alive)
        if is_call(node, ops.wait):
            alive -= is_call(node.args[0], kind)
    assert most == min(in_flight, 3)
    assert alive == 0


# Any chain of modules

KINDS = ("linear", "norm", "frozen", "again", "list")


class Chain(nn.Module):
    """Small modules one after the other; "again" uses the first one's weight once more."""

    def __init__(self, kinds: tuple[str, ...], width: int = 4) -> None:
        super().__init__()
        self.kinds = kinds
        self.first = nn.Linear(width, width)
        for index, kind in enumerate(kinds):
            self.add_module(f"m{index}", self._make(kind, width))

    def _make(self, kind: str, width: int) -> nn.Module:
        if kind == "norm":
            return nn.LayerNorm(width)
        if kind == "list":
            return nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        if kind == "again":
            return nn.Identity()
        return nn.Linear(width, width).requires_grad_(kind == "linear")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.first(x)
        for index, kind in enumerate(self.kinds):
            module = getattr(self, f"m{index}")
            if kind == "list":
                for inner in module:
                    x = torch.tanh(inner(x))
            elif kind == "again":
                x = F.linear(x, self.first.weight)
            else:
                x = torch.tanh(module(x))
        return F.mse_loss(x, target)


@functools.cache
def chain(kinds: tuple[str, ...], size: int = 2) -> Trace:
    return tiny.traced(Chain(kinds), tiny.batch(size, 4), WORLD)


def of_kind(found: list[str], kind: str) -> list[str]:
    return [event for event in found if event[0] == kind]


def collectives(graph: TrainGraph) -> list[tuple[str, Any, str]]:
    """What all ranks must start in the same order, with the region in which each does."""
    kinds = (*ops.COLLECTIVES, ops.gather_ahead)
    return [(region_of(n), n.target, bucket_of(n)) for n in graph.nodes() if is_call(n, *kinds)]


def least_alive(kinds: tuple[str, ...], reuse: int) -> int:
    """The smallest bound that works: just in time, nothing kept for the backward."""
    return most_alive(scheduled(chain(kinds), 0, across=False, reuse=reuse))


BOUNDS = st.tuples(st.integers(0, 900), st.integers(0, 900), st.sampled_from((0, 1, 2, 3, FAR)))
REUSE = st.sampled_from((0, 20, 40, 80, FAR))


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink a case takes minutes
)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(tuple),
    st.lists(BOUNDS, min_size=3, max_size=3),
    REUSE,
)
@example(("linear", "list"), [(64, 0, 2), (659, 0, 2), (0, 0, 2)], 0)
@example(("list", "again", "list", "list", "again"), [(900, 900, FAR)], 40)  # kept, then again
def test_chains(kinds: tuple[str, ...], bounds: list[tuple[int, int, int]], reuse: int) -> None:
    """Nothing is read too early, the bound holds, buckets keep their order, on every rank, in every run."""
    least = least_alive(kinds, reuse)
    for prefetch, more, reach in bounds:
        bound = least + more
        just_in_time = scheduled(chain(kinds), 0, bound, reuse=reuse)
        graph = scheduled(
            chain(kinds), prefetch, bound, reach, reuse=reuse
        )  # verified after each pass
        assert peak_gathered(graph) == most_alive(graph) <= bound
        before, now = line(just_in_time), line(graph)
        assert all(of_kind(before, kind) == of_kind(now, kind) for kind in "gwr")
        for region in ("forward", "backward"):  # only gathers move
            before, now = (events(g, region).split() for g in (just_in_time, graph))
            assert [e for e in before if e[0] != "g"] == [e for e in now if e[0] != "g"]
        check_line(graph, prefetch, reach)
        again = scheduled(chain(kinds), prefetch, bound, reach, reuse=reuse)
        # a rank with a larger batch
        other = scheduled(chain(kinds, 7), prefetch, bound, reach, reuse=reuse)
        assert collectives(graph) == collectives(again) == collectives(other)
    with pytest.raises(PlanError, match="stage3_max_live_parameters"):
        scheduled(chain(kinds), 0, least - 1, reuse=reuse)


def check_line(graph: TrainGraph, prefetch: int, reach: int) -> None:
    """What is under way beside the gather that is waited for is within `prefetch` and `reach`."""
    sizes = {name[1:]: bucket.numel for name, bucket in graph.layout.buckets.items()}
    pending: list[str] = []
    alive: set[str] = set()
    for event in line(graph):
        if event[0] == "g":
            assert event[1:] not in alive, "gathered twice at once"
            alive.add(event[1:])
            pending.append(event[1:])
        elif event[0] == "w":
            assert pending.pop(0) == event[1:], "waited for in the order of their starts"
            assert len(pending) <= reach
            assert sum(sizes[bucket] for bucket in pending) <= prefetch
        else:
            alive.remove(event[1:])
    assert not pending and not alive
    taken = ahead(graph)
    assert len(taken) <= reach + 1 and sum(sizes[bucket] for bucket in taken) <= prefetch
    step = events(graph, "step").split()
    for bucket in taken:
        assert f"u{bucket}" not in step[step.index(f"a{bucket}") :], "behind the update"
    assert "".join(e[1:] for e in of_kind(line(graph), "g")).startswith(taken)


@pytest.mark.parametrize("stage", range(4))
def test_the_order_of_collectives_does_not_depend_on_input_shapes(stage: int) -> None:
    kinds = ("linear", "list", "again", "norm")
    small, large = (tiny.planned(chain(kinds, size), stage).signature() for size in (2, 7))
    assert small == large, first_difference(0, small, 1, large)
