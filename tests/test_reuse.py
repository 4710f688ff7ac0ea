"""Buckets that are kept gathered: which, for how long, and within which bound."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import tiny
from zerograph import ops
from zerograph.config import load_config
from zerograph.cost import peak_gathered
from zerograph.nodes import is_call, region_of
from zerograph.passes.gather import best_within
from zerograph.plan import Plan
from zerograph.planning import default_arriving, plan_of

FAR = 10**9


def planned(reuse: int, max_live: int = FAR, prefetch: int = 0, **more: Any) -> Plan:
    """Blocks of 128, 192, 192 and 128 elements on four ranks."""
    zero = {"stage": 3, "stage3_max_reuse_distance": reuse, "stage3_max_live_parameters": max_live}
    zero["stage3_prefetch_bucket_size"] = prefetch
    return tiny.planned(tiny.trace_of("blocks", 4), 3, zero_optimization=zero, **more)


def within_budget(budget: int, **zero: int) -> Plan:
    """The same blocks, of 512, 768, 768 and 512 bytes, with a budget for what is kept."""
    made = {"stage": 3, "stage3_prefetch_bucket_size": 0, **zero}
    more: Any = {"zero_optimization": made, "compile": {"gathered_budget": budget}}
    return tiny.planned(tiny.trace_of("blocks", 4), 3, **more)


def gathered(plan: Plan, region: Any) -> list[str]:
    return [str(n.args[1]) for n in plan.graph.nodes(region) if is_call(n, ops.gather)]


def kept(plan: Plan) -> list[str]:
    """Buckets that the forward gathers and the backward releases, in the order of the release."""
    releases = [n for n in plan.graph.nodes("backward") if is_call(n, ops.release)]
    return [str(n.args[1]) for n in releases if region_of(n.args[0]) == "forward"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "distance, expected",
    [(0, ""), (1, "b3"), (143, "b3"), (10**3, "b3 b2 b1")],
)
def test_a_bucket_that_is_used_again_within_the_distance_is_kept(
    distance: int, expected: str
) -> None:
    plan = planned(distance)
    assert kept(plan)[: len(expected.split())] == expected.split()
    assert sorted(gathered(plan, "forward")) == ["b0", "b1", "b2", "b3"]
    again = gathered(plan, "backward")
    assert again == [b for b in ("b3", "b2", "b1") if b not in kept(plan)]


def test_the_nearest_are_kept_where_the_bound_has_no_room_for_all() -> None:
    """Just in time 192 elements are alive; b3 and b2 together are 320, and b1 beside them 512."""
    assert [kept(planned(FAR, max_live=bound)) for bound in (192, 320, 512)] == [
        ["b3"],
        ["b3", "b2"],
        ["b3", "b2", "b1"],
    ]
    for bound in (192, 320, 512):
        assert peak_gathered(planned(FAR, max_live=bound).graph) <= bound


def test_what_is_kept_is_saved_and_counted_as_gathered() -> None:
    apart, plan = planned(0), planned(FAR)
    names = {n.name for n in plan.graph.outputs("saved") if n is not None}
    full = [n for n in plan.graph.nodes("forward") if is_call(n, ops.wait)]
    assert {n.name for n in full if gathered_by(n) in kept(plan)} <= names
    assert plan.memory.saved == apart.memory.saved, "a gathered bucket is no activation"
    assert plan.memory.gathered > apart.memory.gathered
    assert plan.traffic["gather"].nbytes < apart.traffic["gather"].nbytes


def gathered_by(wait: Any) -> str:
    return str(wait.args[0].args[1])


def test_a_backward_for_other_gradients_keeps_nothing() -> None:
    """It runs behind the forward that was planned for the loss."""
    trace = tiny.trace_of("blocks", 4)
    names = [r.name for r in trace.graph.results if r.differentiable]
    config = load_config(tiny.config(3, zero_optimization={"stage": 3}))
    assert kept(plan_of(trace, config))
    other = [n for n in names if (n,) != default_arriving(trace.graph)]
    for name in other:
        assert not kept(plan_of(trace, config, (name,)))
    assert other


@pytest.mark.parametrize("reuse", [0, FAR])
@pytest.mark.parametrize(
    "budget, expected",
    [(0, "b3"), (767, "b3"), (768, "b3 b2"), (1535, "b3 b2"), (1536, "b3 b2 b1")],
)
def test_a_budget_says_in_bytes_what_is_kept(budget: int, expected: str, reuse: int) -> None:
    """Whatever the reuse distance. The head, used last and first again, is not counted."""
    plan = within_budget(budget, stage3_max_reuse_distance=reuse)
    assert kept(plan) == expected.split()
    assert len(gathered(plan, "backward")) == 3 - len(kept(plan))


def test_a_budget_does_not_loosen_the_bound_on_what_is_alive() -> None:
    plan = within_budget(10**9, stage3_max_live_parameters=320)
    assert kept(plan) == ["b3", "b2"] and peak_gathered(plan.graph) <= 320


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=8), st.integers(0, 150), st.sampled_from([1, 3, 1 << 24])
)
def test_the_best_choice_within_a_budget(sizes: list[int], budget: int, scale: int) -> None:
    """The largest sum, and of those that have it the one with the earliest entries."""
    scaled = [size * scale for size in sizes]
    taken = best_within(scaled, budget * scale)
    total = sum(size for size, on in zip(scaled, taken, strict=True) if on)
    sums = [
        (sum(scaled[i] for i in chosen), [i in chosen for i in range(len(sizes))])
        for count in range(len(sizes) + 1)
        for chosen in combinations(range(len(sizes)), count)
    ]
    best = max(each for each in sums if each[0] <= budget * scale)
    assert (total, taken) == best


@example([3 * 2**19 + 1, 3 * 2**19 + 2], 3 * 2**20)
@example([1, 2**20 + 1], 2**20 + 1)
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=10), st.integers(1, 10**11))
def test_a_choice_of_uneven_sizes_is_within_the_budget(sizes: list[int], budget: int) -> None:
    """And, to a part for each size, no worse than any that leaves a part for each size free."""
    taken = best_within(sizes, budget)
    total = sum(size for size, on in zip(sizes, taken, strict=True) if on)
    rounded = (len(sizes) + 1) * (budget // (1 << 20) + 1)
    sums = {0}
    for size in sizes:
        sums |= {one + size for one in sums if one + size <= budget - rounded}
    assert max(sums) - rounded <= total <= budget
