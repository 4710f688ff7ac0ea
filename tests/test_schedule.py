"""The schedule: how early gathers start, how late reductions end, and the bounds that hold."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests import tiny
from zerograph import ops, pipeline
from zerograph.config import load_config
from zerograph.cost import peak_gathered
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph, is_call
from zerograph.optimizer import optimizer_of
from zerograph.passes import Schedule
from zerograph.planning import default_arriving, passes_for
from zerograph.runtime.agree import first_difference
from zerograph.trace import Trace

WORLD = 4
BLOCKS = (64 + 32 + 32, 192, 192, 128)
"""Elements of the four buckets of `tiny.Blocks` for 4 ranks."""


def scheduled(trace: Trace, prefetch: int, max_live: int = 10**9, **more: Any) -> TrainGraph:
    """The plan of stage 3 with the schedule's bounds, verified after each pass."""
    graph = trace.graph.copy()
    zero = {"stage": 3, "stage3_max_live_parameters": max_live, **more}
    zero |= {"stage3_prefetch_bucket_size": prefetch, "stage3_max_reuse_distance": 0}
    config = load_config(tiny.config(3, zero_optimization=zero))
    spec = optimizer_of(config, graph.layout)
    pipeline.run(graph, passes_for(config, graph, default_arriving(graph), spec), keep_text=False)
    return graph


def blocks(prefetch: int, max_live: int = 10**9) -> TrainGraph:
    return scheduled(tiny.trace_of("blocks", WORLD), prefetch, max_live)


def events(graph: TrainGraph, region: Any) -> str:
    """The region's gathers, waits, releases in order: "g0 w0 g1 r0 ..."."""
    found = []
    for node in graph.nodes(region):
        if is_call(node, ops.gather):
            found.append(f"g{node.args[1][1:]}")
        elif is_call(node, ops.wait) and is_call(node.args[0], ops.gather):
            found.append(f"w{node.args[0].args[1][1:]}")
        elif is_call(node, ops.release):
            found.append(f"r{node.args[1][1:]}")
    return " ".join(found)


def wait_of(node: fx.Node) -> fx.Node:
    return next(user for user in node.users if is_call(user, ops.wait))


# Gathers


def test_sizes_of_the_blocks() -> None:
    layout = tiny.trace_of("blocks", WORLD).graph.layout
    assert tuple(b.numel for b in layout.buckets.values()) == BLOCKS


@pytest.mark.parametrize("region, order", [("forward", "0123"), ("backward", "321")])
def test_no_prefetch_gathers_just_in_time(region: str, order: str) -> None:
    graph = blocks(prefetch=0)
    assert events(graph, region) == " ".join(f"g{b} w{b} r{b}" for b in order)
    for gather in (n for n in graph.nodes(region) if is_call(n, ops.gather)):
        assert wait_of(gather) is gather.next


@pytest.mark.parametrize(
    "prefetch, forward",
    [
        (127, "g0 w0 r0 g1 w1 r1 g2 w2 r2 g3 w3 r3"),
        (128, "g0 w0 r0 g1 w1 r1 g2 g3 w2 r2 w3 r3"),
        (192, "g0 g1 w0 r0 g2 w1 r1 g3 w2 r2 w3 r3"),
        (319, "g0 g1 w0 r0 g2 w1 r1 g3 w2 r2 w3 r3"),
        (320, "g0 g1 w0 r0 g2 g3 w1 r1 w2 r2 w3 r3"),
        (384, "g0 g1 g2 w0 r0 g3 w1 r1 w2 r2 w3 r3"),
        (10**9, "g0 g1 g2 g3 w0 r0 w1 r1 w2 r2 w3 r3"),
    ],
)
def test_prefetch_is_what_may_be_in_flight_beside_the_one_waited_for(
    prefetch: int, forward: str
) -> None:
    assert events(blocks(prefetch), "forward") == forward


def test_more_prefetch_starts_no_gather_later() -> None:
    last: dict[tuple[str, str], int] = {}
    for prefetch in (0, 100, 200, 300, 400, 600):
        for region in ("forward", "backward"):
            order = events(blocks(prefetch), region).split()
            for index, event in enumerate(order):
                if event[0] == "g":
                    waits = sum(e[0] == "w" for e in order[:index])
                    assert waits <= last.get((region, event), waits)
                    last[region, event] = waits


@pytest.mark.parametrize("bound", [192, 200, 256, 320, 384, 450, 512, 640, 10**9])
def test_live_bound_holds_with_any_prefetch(bound: int) -> None:
    graph = blocks(10**9, bound)
    assert peak_gathered(graph) <= bound
    assert peak_gathered(blocks(0, bound)) == max(BLOCKS)


def test_live_bound_is_used() -> None:
    assert peak_gathered(blocks(10**9, 10**9)) == sum(BLOCKS)
    assert peak_gathered(blocks(10**9, sum(BLOCKS))) == sum(BLOCKS)
    assert peak_gathered(blocks(10**9, sum(BLOCKS) - 1)) < sum(BLOCKS)


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
    assert peak_gathered(blocks(10**9, 192)) == 192


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
    graph = scheduled(
        tiny.traced(Tied(), {"ids": torch.zeros(2, 3, dtype=torch.long)}, WORLD), 10**9
    )
    order = events(graph, "forward").split()
    assert order.count("g0") == 2
    again = len(order) - 1 - order[::-1].index("g0")
    assert order.index("w0") < again


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


@pytest.mark.parametrize("in_flight", [1, 2, 3, 9])
def test_no_more_reductions_are_under_way_than_allowed(in_flight: int) -> None:
    graph = tiny.trace_of("blocks", WORLD).graph.copy()
    config = load_config(tiny.config(2))
    spec = optimizer_of(config, graph.layout)
    *passes, _ = passes_for(config, graph, default_arriving(graph), spec)
    pipeline.run(graph, [*passes, Schedule(0, 10**9, in_flight)], keep_text=False)
    alive = most = 0
    for node in graph.nodes("backward"):
        alive += is_call(node, ops.reduce_scatter)
        most = max(most, alive)
        if is_call(node, ops.wait):
            alive -= is_call(node.args[0], ops.reduce_scatter)
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


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(tuple),
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=3, max_size=3),
)
def test_chains(kinds: tuple[str, ...], bounds: list[tuple[int, int]]) -> None:
    """Nothing is read too early, the bound holds, and the buckets keep their order."""
    just_in_time = scheduled(chain(kinds), 0)
    least = peak_gathered(just_in_time)
    for prefetch, more in bounds:
        graph = scheduled(chain(kinds), prefetch, least + more)  # verified after each pass
        assert peak_gathered(graph) <= least + more
        for region in ("forward", "backward"):
            before, now = (events(g, region).split() for g in (just_in_time, graph))
            assert all(of_kind(before, kind) == of_kind(now, kind) for kind in "gwr")
    with pytest.raises(PlanError, match="stage3_max_live_parameters"):
        scheduled(chain(kinds), 0, least - 1)


@pytest.mark.parametrize("stage", range(4))
def test_the_order_of_collectives_does_not_depend_on_input_shapes(stage: int) -> None:
    kinds = ("linear", "list", "again", "norm")
    small, large = (tiny.planned(chain(kinds, size), stage).signature() for size in (2, 7))
    assert small == large, first_difference(0, small, 1, large)
