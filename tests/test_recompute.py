"""What to keep of a forward: against brute force, minimum cuts, torch's partitioner, and bit for bit."""

import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tests import models, tiny
from tests.partitioner import cheapest, choices, kept_by_torch
from zerograph.cost import CATEGORIES, work_of
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph, eliminate_dead_code
from zerograph.nodes import is_call, is_random, is_recomputed, is_view, role_of
from zerograph.passes import Checkpoint, Normalize, Specialize
from zerograph.recompute import Chooser, choose
from zerograph.recompute.choose import Solver
from zerograph.recompute.curve import LIMIT, add, pareto
from zerograph.recompute.cut import hull
from zerograph.recompute.exact import solve, width
from zerograph.recompute.pieces import pieces_of
from zerograph.recompute.problem import Op, Problem, Value, key_of, nbytes_of
from zerograph.recompute.regions import Options
from zerograph.trace import Trace

aten = torch.ops.aten


# Random problems


@st.composite
def problems(draw: st.DrawFn, most: int = 7) -> Problem:
    """Operators with one or two results, which read earlier ones; some must not be repeated."""
    ops: list[Op] = []
    values: list[Value] = []
    for index in range(draw(st.integers(1, most))):
        reads = draw(st.sets(st.sampled_from(range(len(values))), max_size=3)) if values else set()
        made = range(len(values), len(values) + draw(st.sampled_from((1, 1, 1, 2))))
        once = draw(st.integers(0, 7)) == 0
        sizes = [draw(st.integers(0, 6)) for _ in made]
        read = [not once and draw(st.booleans()) for _ in made]
        values += [Value(index, n, r) for n, r in zip(sizes, read)]
        cost = None if once else draw(st.integers(0, 9))
        ops.append(Op(tuple(sorted(reads)), tuple(made), cost))
    return Problem(tuple(ops), tuple(values), draw(st.integers(0, 3)))


def is_valid(problem: Problem, kept: set[int]) -> bool:
    try:
        problem.repeated(kept)
    except AssertionError:
        return False
    return True


def all_choices(problem: Problem) -> Iterator[tuple[int, int]]:
    """(bytes, cost) of every set of values that suffices."""
    for flags in itertools.product((False, True), repeat=len(problem.values)):
        kept = {v for v, flag in enumerate(flags) if flag}
        if is_valid(problem, kept):
            yield problem.nbytes(kept), problem.cost(problem.repeated(kept))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_other_choice_is_better_at_any_budget(problem: Problem) -> None:
    solver = Solver.of(problem)
    choices = sorted(all_choices(problem))
    assert solver.least == choices[0][0]
    for budget in range(solver.least, solver.most + 2):
        kept = solver.solve(budget)
        assert problem.nbytes(kept) <= budget
        least = min(cost for nbytes, cost in choices if nbytes <= budget)
        assert problem.cost(problem.repeated(kept)) == least
    assert least == 0 or solver.most == max(n for n, c in choices if c == least)


@settings(max_examples=100, deadline=None)
@given(problems(14))
def test_corners_by_minimum_cuts_are_points_of_the_exact_curve(problem: Problem) -> None:
    """And they are its lower convex hull: no point lies below a chord."""
    for piece in pieces_of(problem):
        corners, points = hull(piece.shape), solve(piece.shape)
        exact = set(zip(points.nbytes.tolist(), points.cost.tolist()))
        found = list(zip(corners.nbytes.tolist(), corners.cost.tolist()))
        assert set(found) <= exact
        assert {found[0], found[-1]} == {min(exact), max(exact)}
        for (x0, y0), (x1, y1) in itertools.pairwise(found):
            for x, y in exact:
                assert (x1 - x0) * (y - y0) >= (y1 - y0) * (x - x0)


@settings(max_examples=60, deadline=None)
@given(problems(14), st.sampled_from((0, 8)))
def test_a_choice_suffices_and_more_bytes_never_mean_more_work(problem: Problem, wide: int) -> None:
    """By dynamic programming (wide 8) and by minimum cuts alone (0)."""
    solver = Solver.of(problem, wide)
    before = None
    for budget in range(solver.least, solver.most + 1):
        kept = solver.solve(budget)
        cost = problem.cost(problem.repeated(kept))
        assert problem.nbytes(kept) <= budget
        assert before is None or cost <= before
        before = cost


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 2**61)), min_size=1, max_size=60))
def test_a_curve_falls_and_loses_no_better_point(points: list[tuple[int, int]]) -> None:
    nbytes, cost = (torch.tensor(column).numpy() for column in zip(*points))
    best = pareto(nbytes, cost)
    found = [(int(nbytes[i]), int(cost[i])) for i in best]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(found))
    for x, y in points:
        assert any(a <= x and b <= y for a, b in found)


def test_a_thinned_curve_keeps_its_hull_and_its_ends() -> None:
    draws = random.Random(0)
    steps = [(draws.randrange(1, 9), draws.randrange(1, 9)) for _ in range(20 * LIMIT)]
    nbytes = torch.tensor([n for n, _ in steps]).cumsum(0).numpy()
    cost = torch.tensor([c for _, c in steps]).cumsum(0).numpy()[::-1].copy()
    best = pareto(nbytes, cost)
    assert best[0] == 0 and best[-1] == len(steps) - 1
    assert len(best) < LIMIT
    gaps = [int(nbytes[b] - nbytes[a]) for a, b in itertools.pairwise(best.tolist())]
    assert max(gaps) <= 2 * (int(nbytes[-1]) // (LIMIT // 4) + 10)


def test_a_thinned_curve_knows_the_fewest_bytes_for_few_flops() -> None:
    """Products of 1 MiB and one cost each, among many small values that hardly save anything."""
    draws = random.Random(0)
    ops, found = [], []
    for index in range(100):
        heavy = index % 5 == 0
        nbytes = 2**20 if heavy else draws.randrange(1000, 100_000)
        cost = 10**9 if heavy else draws.randrange(1000, 100_000)
        ops.append(Op((), (index,), cost))
        found.append(Value(index, nbytes, True))
    problem = Problem(tuple(ops), tuple(found))
    solver = Solver.of(problem)
    for count in range(21):
        cost = problem.cost(problem.repeated(solver.solve(count * 2**20)))
        assert cost // 10**9 == 20 - count


# Graphs of models


@functools.cache
def normal(name: str) -> TrainGraph:
    """The normalized joint graph of a model; dropout is on in those of `tiny`."""
    graph = trace_of(name).graph.copy()
    Normalize().apply(graph)
    return graph


@functools.cache
def trace_of(name: str) -> Trace:
    if name in tiny.MODELS:
        return tiny.trace_of(name, 2)
    return tiny.traced(models.make(name), models.batch_for(name, 0), 2)


@functools.cache
def chooser(name: str) -> Chooser:
    return Chooser.of(normal(name))


NAMES = ("blocks", "batch_norm", "llama", "gpt2", "convnet", "lowrank")


def values(graph: TrainGraph, region: str, known: dict[fx.Node, Any]) -> None:
    """Compute a region's nodes from what is known."""
    for node in graph.nodes(region):  # type: ignore[arg-type]
        known[node] = computed(node, graph, known)


def computed(node: fx.Node, graph: TrainGraph, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return getattr(graph.module, str(node.target))
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def filled(node: fx.Node, generator: torch.Generator) -> Tensor:
    value = node.meta["val"]
    if value.dtype.is_floating_point:
        return torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.1
    return torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)


def recomputed(
    graph: TrainGraph, keep: set[fx.Node], repeat: set[fx.Node], known: dict[fx.Node, Any]
) -> dict[fx.Node, Any]:
    """The backward's values, from `keep` and placeholders alone; what is not in `repeat` may not run."""
    inputs = set(graph.placeholders())
    have = {node: known[node] for node in inputs | keep}

    def value(node: fx.Node) -> Any:
        if node not in have:
            sources = node.all_input_nodes
            is_out = getattr(node.target, "__name__", "") == "getitem" and not is_view(node)
            if is_out and node in repeat:  # a dropout's output, made of its mask
                x, _, p = sources[0].args[0], *sources[0].args[1:2], sources[0].args[1]
                mask = next(user for user in sources[0].users if user.args[1] == 1)
                have[node] = value(x) * value(mask) * (1 / (1 - p))  # type: ignore[arg-type, operator]
                return have[node]
            free = node.op == "get_attr" or is_out or is_view(node)
            assert free or node in repeat or not isinstance(node.meta["val"], Tensor), node
            assert not is_random(node)
            for source in sources:
                value(source)
            have[node] = computed(node, graph, have)
        return have[node]

    for node in graph.nodes("backward"):
        for source in node.all_input_nodes:
            value(source)
        have[node] = computed(node, graph, have)
    return have


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_has_the_same_bits_from_what_is_kept(name: str) -> None:
    graph, generator = normal(name), torch.Generator().manual_seed(0)
    known: dict[fx.Node, Any] = {p: filled(p, generator) for p in graph.placeholders()}
    torch.manual_seed(0)
    values(graph, "forward", known)
    values(graph, "backward", known)
    for fraction in (0.0, 0.3, 0.6, 1.0):
        chosen = chooser(name).choose(chooser(name).budget(fraction))
        again = recomputed(graph, set(chosen.keep), set(chosen.repeat), known)
        for gradient in graph.outputs("backward"):
            assert gradient is not None
            torch.testing.assert_close(again[gradient], known[gradient], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["blocks", "batch_norm", "llama", "gpt2"])
def test_the_pass_keeps_and_repeats_what_was_chosen(name: str) -> None:
    """The bytes that the forward saves, and the FLOPs of what the backward runs again."""
    found = chooser(name)
    for fraction in (0.0, 0.4, 0.8):
        chosen = found.choose(found.budget(fraction))
        graph = normal(name).copy()
        Checkpoint(choose=at(fraction)).apply(graph)
        eliminate_dead_code(graph)
        Specialize().apply(graph)
        results = {key_of(node) for node in graph.outputs("forward") if node is not None}
        saved = {key_of(node) for node in graph.outputs("saved") if node is not None}
        saved = {key for key in saved - results if key[0].op == "call_function"}
        old = {key for key in saved if is_call(key[0], aten.clone.default) and is_buffer(key[0])}
        assert sum(map(nbytes_of, saved - old)) == chosen.nbytes <= found.budget(fraction)
        again = [node for node in graph.nodes("backward") if is_recomputed(node)]
        assert sum(work_of(node).flops for node in again) == chosen.flops
        assert not any(map(is_random, again))


def at(fraction: float) -> Callable[[TrainGraph], tuple[fx.Node, ...]]:
    """A choice between the fewest bytes and all, whatever is alive at once."""

    def choose(graph: TrainGraph) -> tuple[fx.Node, ...]:
        found = Chooser.of(graph)
        return found.choose(found.budget(fraction)).keep

    return choose


def activations(trace: Trace, **more: Any) -> int:
    """Most bytes of activations alive at once in a plan, kept, computed again and temporary."""
    indices = [CATEGORIES.index(name) for name in ("activations", "recomputed")]
    series = tiny.planned(trace, 0, **more).memory.series
    return max(sum(moment.bytes[i] for i in indices) for moment in series)


@pytest.mark.parametrize("name", ["blocks", "normed", "llama", "gpt2"])
def test_the_peak_of_a_choice_is_that_of_its_plan(name: str) -> None:
    """With and without boundaries, told before the other passes run; but for scalars and copied buffers."""
    trace = trace_of(name)
    options = Options.of(normal(name), whole=True)
    for fraction in (0.0, 0.3, 0.7):
        budget = options.budget(fraction)
        _, chosen = options.choose(budget)
        planned = activations(trace, compile={"activation_budget": fraction})
        assert planned == pytest.approx(options.peaks.peak(chosen.keep), rel=0.005, abs=512)
    for option in Options.of(normal(name), whole=False).found:
        planned = activations(trace, activation_checkpointing={"number_checkpoints": option.number})
        assert planned == pytest.approx(option.lowest, rel=0.005, abs=512)


class Burst(nn.Module):
    """Most is alive within the forward, of what the backward never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        spread = torch.cumsum(x.repeat(1, 64), 1)
        return (x * self.weight * (spread > 0).float().mean()).sum()


def test_the_peak_may_be_in_the_forward() -> None:
    trace = tiny.traced(Burst(), torch.randn(64, 16), 2)
    graph = trace.graph.copy()
    Normalize().apply(graph)
    spread = 64 * 64 * 16
    options = Options.of(graph, whole=True)
    peak = options.peaks.peak(options.choose(options.budget(1.0))[1].keep)
    assert peak == pytest.approx(2 * 4 * spread, rel=0.01)  # what is repeated, and its sums
    assert activations(trace) == pytest.approx(peak, rel=0.005, abs=512)


def is_buffer(copied: fx.Node) -> bool:
    source = copied.all_input_nodes[0]
    return source.op == "placeholder" and role_of(source).kind == "buffer"


def test_masks_are_kept_at_every_budget_and_nothing_random_is_repeated() -> None:
    """What the forward returns is there beside them, for nothing."""
    found = chooser("blocks")
    least = found.choose(found.solver.least)
    results = {key_of(node) for node in normal("blocks").outputs("forward") if node is not None}
    masks = [key_of(node)[0] for node in least.keep if key_of(node) not in results]
    assert [str(node.target) for node in masks] == ["aten.native_dropout.default"] * 2
    assert found.solver.least == 2 * 4 * tiny.WIDTH  # a byte an element of each mask
    for fraction in (0.0, 0.2, 0.5, 0.9):
        assert not any(map(is_random, found.choose(found.budget(fraction)).repeat))


def test_too_small_a_budget_names_the_smallest_one() -> None:
    least = chooser("blocks").solver.least
    with pytest.raises(PlanError, match=rf"budget of {least - 1} bytes .* need {least} bytes"):
        choose(normal("blocks"), least - 1)
    assert choose(normal("blocks"), least).nbytes == least


def test_pinned_values_are_kept_at_every_budget() -> None:
    graph = normal("llama")
    product = next(n for n in graph.nodes("forward") if str(n.target) == "aten.mm.default")
    found = Chooser.of(graph, [product])
    least = found.choose(found.solver.least)
    assert product in least.keep and product not in least.repeat
    assert least.nbytes == product.meta["val"].nbytes


def test_the_choice_depends_on_no_name() -> None:
    graph = normal("gpt2")
    renamed = graph.copy()
    for index, node in enumerate(reversed(renamed.graph.nodes)):
        node.name = f"n{index * 7919 % 10007}"
    ours, theirs = Chooser.of(graph), Chooser.of(renamed)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    copied = {node: i for i, node in enumerate(renamed.graph.nodes)}
    for fraction in (0.1, 0.4, 0.8):
        one, other = (c.choose(c.budget(fraction)) for c in (ours, theirs))
        assert [order[n] for n in one.keep] == [copied[n] for n in other.keep]


def test_alike_layers_keep_more_the_later_they_are() -> None:
    """The backward frees the last layers' values first, and computes again when they are gone."""
    trace = tiny.traced(tiny.Blocks(depth=6, dropout=0.0), tiny.batch(), 2)
    graph = trace.graph.copy()
    Normalize().apply(graph)
    found = Chooser.of(graph)
    counts = set()
    for tenth in range(10):
        layers: dict[str, list[int]] = {}
        for node in found.choose(found.budget(tenth / 10)).keep:
            module = node.meta["module"].split(".")
            if module[0] == "blocks":
                layers.setdefault(str(node.target), []).append(int(module[1]))
        for kept in layers.values():
            assert sorted(set(kept)) == list(range(min(kept), 6))
            counts.add(6 - min(kept))
    assert counts >= {1, 6} and len(counts) > 3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_more_flops_than_torchs_partitioner_at_equal_bytes(name: str) -> None:
    found = Chooser.of(normal(name), results_held=False)
    for fraction in (0.1, 0.3, 0.5, 0.7):
        theirs = found.kept(kept_by_torch(normal(name), fraction))
        ours = found.choose(theirs.nbytes)
        assert ours.nbytes <= theirs.nbytes
        assert ours.flops <= 1.02 * theirs.flops
        assert (ours.flops, ours.traffic) <= (theirs.flops, theirs.traffic * 1.02)


@pytest.mark.parametrize("name", ["gpt2"])
def test_no_more_flops_than_torchs_partitioner_at_equal_peaks(name: str) -> None:
    """Where as many bytes are alive at most as with torch's choice; never more of them, either."""
    options = Options.of(normal(name), whole=True)
    tried = choices(options, 128)
    for fraction in (0.1, 0.3, 0.5, 0.7):
        theirs = chooser(name).kept(kept_by_torch(normal(name), fraction))
        most = options.peaks.peak(theirs.keep)
        peak, ours = cheapest(tried, most)
        assert peak <= most and ours.flops <= 1.02 * theirs.flops


# Size


def repeated(problem: Problem, count: int) -> Problem:
    """`count` copies of a problem, one after the other."""
    ops, found = [], []
    for copy in range(count):
        base, first = copy * len(problem.values), copy * len(problem.ops)
        for op in problem.ops:
            reads = tuple(base + v for v in op.reads)
            ops.append(Op(reads, tuple(base + v for v in op.makes), op.cost))
        found += [Value(first + v.op, v.nbytes, v.read) for v in problem.values]
    return Problem(tuple(ops), tuple(found))


def test_eighty_layers_take_seconds() -> None:
    layer = chooser("llama").reading.problem
    start = time.process_time()
    solver = Solver.of(repeated(layer, 40))  # of two layers each
    kept = solver.solve((solver.least + solver.most) // 2)
    assert time.process_time() - start < 10
    assert solver.problem.nbytes(kept) <= (solver.least + solver.most) // 2


class Stream(nn.Module):
    """A residual stream that the backward does not read itself, only its norms in fp32: one long piece."""

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(torch.tanh(x.double()).float())
        return x.sum()


def test_a_long_chain_is_one_piece_and_solved_in_full() -> None:
    graph = tiny.traced(Stream(40), torch.randn(64, 16), 2).graph.copy()
    Normalize().apply(graph)
    found = Chooser.of(graph)
    longest = max(pieces_of(found.reading.problem), key=lambda piece: len(piece.shape))
    assert len(longest.shape) > 40 and width(longest.shape) < 4
    costs = [found.choose(found.budget(f / 20)).flops for f in range(21)]
    assert costs == sorted(costs, reverse=True) and costs[0] > 0 == costs[-1]
    corners = hull(longest.shape)
    points = solve(longest.shape)
    for n, c in zip(corners.nbytes.tolist(), corners.cost.tolist()):
        assert int(points.cost[points.nbytes.searchsorted(n, "right") - 1]) <= c


def test_a_sum_of_curves_picks_a_point_of_each() -> None:
    one, other = (solve(piece.shape) for piece in pieces_of(chooser("llama").reading.problem)[:2])
    both = add_points(one, other)
    for point in range(len(both.nbytes)):
        left, right = both.pick(point)
        assert both.nbytes[point] == one.nbytes[left] + other.nbytes[right]
        assert both.cost[point] == one.cost[left] + other.cost[right]


def add_points(one: Any, other: Any) -> Any:
    from zerograph.recompute.curve import Single

    return add(Single(one.nbytes, one.cost), Single(other.nbytes, other.cost))


def test_roles_of_kept_nodes() -> None:
    """Nothing that is at hand in the backward anyway is in the list."""
    for name in NAMES:
        chosen = chooser(name).choose(chooser(name).budget(1.0))
        assert not any(node.op == "placeholder" or is_view(node) for node in chosen.keep)
        read = {role_of(p).kind for p in normal(name).placeholders()}
        assert "param" in read
