"""Each pass on a small graph: what goes in, what comes out, and that the numbers stay the same."""

import copy
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import zerograph
from tests import tiny
from zerograph import ops, pipeline
from zerograph.cost import peak_gathered
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.layout import Layout
from zerograph.nodes import bucket_of, is_call, region_of, role_of, view_root
from zerograph.passes import (
    Gather,
    Normalize,
    Reduce,
    Release,
    Schedule,
    Shard,
    Specialize,
    Update,
)
from zerograph.passes.lower import Program, starts_collective, waits_for_collective
from zerograph.plan import Plan
from zerograph.text import text
from zerograph.trace import Trace

aten = torch.ops.aten


def c10d(name: str) -> str:
    return f"_c10d_functional.{name}.default"


REDUCED = [c10d("reduce_scatter_tensor")] * 3
TWICE = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
ADAM = Update(rule="adamw", states=("exp_avg", "exp_avg_sq"), scalars=5)


def after(
    passes: list[pipeline.Pass], trace: Trace | None = None, accumulation: int = 2
) -> TrainGraph:
    """The MLP's graph (or another's) after some passes, of a step of so many backwards."""
    graph = (trace or tiny.trace_of("mlp", 4)).graph.copy()
    graph.notes["accumulation"] = accumulation
    pipeline.run(graph, passes)
    return graph


def lines(graph: TrainGraph, region: str) -> list[str]:
    """The region's lines of the canonical text, without bytes and modules."""
    body = text(graph, "").split(f"{region}(", 1)[1].splitlines()[1:]
    end = next((i for i, line in enumerate(body) if not line.startswith("  ")), len(body))
    return [line.split("  # ")[0].strip() for line in body[:end]]


def zero_lines(graph: TrainGraph, region: str) -> list[str]:
    return [line for line in lines(graph, region) if "zero." in line]


def calls(graph: TrainGraph, target: Any, region: Any = None) -> list[fx.Node]:
    return [n for n in graph.nodes(region) if is_call(n, target)]


# Order


def test_a_pass_without_what_it_requires_is_refused_before_anything_runs() -> None:
    graph = tiny.trace_of("mlp", 4).graph.copy()
    before = text(graph, "")
    with pytest.raises(
        PlanError,
        match=r"pass shard requires specialized, which no pass before it provides "
        r"\(passes so far: normalize\)",
    ):
        pipeline.run(graph, [Normalize(), Shard(3)])
    assert text(graph, "") == before


@pytest.mark.parametrize(
    "each", [Specialize(), Shard(3), Gather(0), Release(), Reduce(), ADAM, Schedule(0, 100)]
)
def test_no_pass_but_the_first_may_come_first(each: pipeline.Pass) -> None:
    with pytest.raises(PlanError, match=rf"pass {each.name} requires .* \(passes so far: none\)"):
        pipeline.run(tiny.trace_of("mlp", 4).graph.copy(), [each])


def test_history_keeps_words_and_text_of_every_pass() -> None:
    history = tiny.planned(tiny.trace_of("mlp", 4), 3).history
    assert history.names() == [
        *("trace", "normalize", "checkpoint", "specialize", "scale", "shard", "gather", "release"),
        *("reduce", "in_place", "update", "schedule"),
    ]
    assert all(f"| after {n}\n" in t for n, t in zip(history.names(), history.texts()))
    assert history["gather"] == history[6]
    assert {r.name: r.did for r in history.records}["reduce"] == "1 buckets reduced"
    with pytest.raises(PlanError, match="no pass 'offload'; the passes are trace, normalize"):
        history["offload"]


# normalize


def test_normalize_makes_a_view_again_that_the_backward_reuses() -> None:
    graph = tiny.trace_of("mlp", 4).graph.copy()
    weight = graph.placeholder("param", "second.weight")
    reused = [n for n in weight.users if {region_of(u) for u in n.users} == {"forward", "backward"}]
    assert reused, "autograd reads the forward's t(w) in the backward"
    pipeline.run(graph, [Normalize()])
    assert {region_of(user) for user in weight.users} == {"forward", "backward"}
    for view in weight.users:
        assert {region_of(user) for user in view.users} == {region_of(view)}


def test_normalize_lets_no_view_of_a_parameter_cross() -> None:
    graph = after([Normalize()])
    for node in graph.nodes("backward"):
        for source in node.all_input_nodes:
            if source.op == "call_function" and region_of(source) == "forward":
                assert view_root(source).op == "call_function"


def test_at_stage_3_no_cast_of_a_parameter_is_kept_for_the_backward() -> None:
    def casts(stage: int) -> list[fx.Node]:
        config = tiny.config(stage, torch_autocast={"enabled": True})
        plan = zerograph.plan(tiny.Mlp(), config, example_inputs=tiny.batch(), world_size=2)
        roots = [view_root(node) for node in plan.graph.outputs("saved")]
        cast = [root for root in roots if is_call(root, aten._to_copy.default)]
        return [root for root in cast if is_call(root.args[0], ops.param)]

    assert casts(2) and not casts(3)


def test_normalize_copies_an_output_that_is_a_view_of_a_parameter() -> None:
    graph = tiny.trace_of("blocks", 4).graph.copy()
    loss, logits = graph.outputs("forward")
    view = next(iter(graph.placeholder("param", "head.weight").users))
    graph.set_outputs(forward=[loss, view])
    pipeline.run(graph, [Normalize()])
    _, shown = graph.outputs("forward")
    assert is_call(shown, aten.clone.default) and shown.args == (view,)
    assert region_of(shown) == "forward" and logits in graph.nodes("forward")


class ReturnsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x).square().mean(), self.linear.weight.t()


def test_a_returned_parameter_is_copied_before_its_bucket_is_released() -> None:
    made = tiny.planned(tiny.traced(ReturnsWeight(), (torch.ones(2, 8),), 4), 3).graph
    _, shown = made.outputs("forward")
    assert is_call(shown, aten.clone.default)
    assert shown < calls(made, ops.release, "forward")[-1]


def test_normalize_keeps_the_old_value_of_a_buffer_that_the_forward_updates() -> None:
    graph = tiny.trace_of("batch_norm", 4).graph.copy()
    buffer = graph.placeholder("buffer", "norm.running_mean")
    backward = calls(graph, aten.native_batch_norm_backward.default)[0]
    backward.args = (*backward.args[:3], buffer, *backward.args[4:])
    pipeline.run(graph, [Normalize(), Specialize()])
    old = backward.args[3]
    assert is_call(old, aten.clone.default) and old.args == (buffer,)
    assert old is graph.nodes("forward")[0], "copied before the update can happen"
    assert old in graph.outputs("saved") and buffer not in graph.outputs("saved")


def test_normalize_removes_identities() -> None:
    graph = tiny.trace_of("mlp", 4).graph.copy()
    relu = calls(graph, aten.relu.default)[0]
    with graph.inserting(relu.next, "forward") as insert:
        alias = insert(aten.detach.default, relu)
    relu.replace_all_uses_with(alias, delete_user_cb=lambda user: user is not alias)
    pipeline.run(graph, [Normalize()])
    assert not calls(graph, aten.detach.default)


# specialize


def specialized(model: nn.Module, *arriving: str) -> TrainGraph:
    trace = tiny.traced(model, tiny.batch(), 4)
    return after([Normalize(), Specialize(arriving)], trace)


def test_specialize_drops_a_gradient_of_the_logits_that_does_not_arrive() -> None:
    both = specialized(tiny.Blocks(), "loss", "logits")
    loss = specialized(tiny.Blocks(), "loss")
    assert [role_of(n).name for n in both.placeholders("tangent")] == ["loss", "logits"]
    assert [role_of(n).name for n in loss.placeholders("tangent")] == ["loss"]
    assert len(both.nodes("backward")) == len(loss.nodes("backward")) + 1  # the addition
    assert loss.unused == both.unused == ()
    assert {r.name for r in loss.results if r.differentiable} == {"loss", "logits"}


def test_specialize_saves_the_same_whichever_gradients_arrive() -> None:
    saved = {
        arriving: [n.name for n in specialized(tiny.Partly(), *arriving).outputs("saved")]
        for arriving in [("loss",), ("aside",), ("loss", "aside")]
    }
    assert saved["loss",] == saved["aside",] == saved["loss", "aside"]


@pytest.mark.parametrize(
    "arriving, unused",
    [
        (("loss",), ("other.weight", "other.bias")),
        (("aside",), ("head.weight", "head.bias")),
        (("loss", "aside"), ()),
    ],
)
def test_specialize_drops_the_gradients_of_what_another_loss_used(
    arriving: tuple[str, ...], unused: tuple[str, ...]
) -> None:
    graph = specialized(tiny.Partly(), *arriving)
    assert graph.unused == unused
    assert not {g.name for g in graph.gradients} & set(unused)
    assert len(graph.gradients) == len(graph.outputs("backward")) == 6 - len(unused)


class Stacked(nn.Module):
    """A loss, and a stack of two values that the loss is made of: gradients meet in additions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(x)
        return {"loss": F.mse_loss(hidden, target), "both": torch.stack([hidden, hidden.sin()])}


def test_specialize_of_a_loss_beside_a_stack() -> None:
    check_specialized(Stacked(), ["loss"])
    check_specialized(Stacked(), ["both"])


def test_specialize_puts_zeros_where_an_addition_cannot_be_dropped() -> None:
    """`add(zero, x)` whose result has another shape than x is not x."""
    graph = tiny.trace_of("partly", 4).graph.copy()
    tangents = {role_of(n).name: n for n in graph.placeholders("tangent")}
    first = graph.first("backward")
    with graph.inserting(first, "backward") as insert:
        wide = insert(aten.expand.default, tangents["aside"], [3])
        total = insert(aten.add.Tensor, wide, tangents["loss"])
        scalar = insert(aten.sum.default, total)
    for user in [u for u in tangents["loss"].users if u is not total]:
        user.replace_input_with(tangents["loss"], scalar)
    pipeline.run(graph, [Normalize(), Specialize(("loss",))])
    zeros, added = total.all_input_nodes
    assert is_call(zeros, aten.full.default) and zeros.args == ([3], 0)
    assert added is tangents["loss"]
    assert [role_of(n).name for n in graph.placeholders("tangent")] == ["loss"]


def test_specialize_keeps_a_scaled_addition() -> None:
    """`add(zero, x, alpha=2)` is not x either."""
    graph = tiny.trace_of("partly", 4).graph.copy()
    tangents = {role_of(n).name: n for n in graph.placeholders("tangent")}
    with graph.inserting(graph.first("backward"), "backward") as insert:
        total = insert(aten.add.Tensor, tangents["aside"], tangents["loss"], alpha=2)
    for user in [u for u in tangents["loss"].users if u is not total]:
        user.replace_input_with(tangents["loss"], total)
    pipeline.run(graph, [Normalize(), Specialize(("loss",))])
    assert total in graph.nodes() and is_call(total.all_input_nodes[0], aten.full.default)


# Numbers before and after


def run_graph(graph: TrainGraph, values: dict[tuple[str, str], Tensor]) -> dict[str, Any]:
    """Interpret the joint graph on real values, by role; its outputs by section."""
    given = [values[role_of(n).kind, role_of(n).name] for n in graph.placeholders()]
    graph.module.recompile()
    torch.manual_seed(5)
    found: dict[str, Any] = fx.Interpreter(graph.module).run(*given, enable_io_processing=False)
    return found


def values_of(model: nn.Module, trace: Trace, seed: int = 1) -> dict[tuple[str, str], Tensor]:
    torch.manual_seed(seed)
    values: dict[tuple[str, str], Tensor] = {}
    for node in trace.graph.placeholders():
        role, value = role_of(node), node.meta["val"]
        sources = {"param": model.get_parameter, "buffer": model.get_buffer}
        if role.kind in sources:
            values[role.kind, role.name] = sources[role.kind](role.name).detach().clone()
        else:
            values[role.kind, role.name] = torch.randn(value.shape, dtype=value.dtype)
    return values


def same(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left is right is None or torch.equal(left, right)


@pytest.mark.parametrize("name", sorted(set(tiny.MODELS) - set(tiny.GIVEN)))
def test_normalize_and_specialize_keep_every_bit(name: str) -> None:
    trace = tiny.trace_of(name, 4)
    torch.manual_seed(0)
    values = values_of(tiny.MODELS[name](), trace)
    before = run_graph(trace.graph.copy(), values)
    for passes in ([Normalize()], [Normalize(), Specialize()]):
        now = run_graph(after(passes, trace), values)
        same(now["forward"], before["forward"])
        same(now["backward"], before["backward"])


def check_specialized(model: nn.Module, arriving: list[str]) -> None:
    """The same bits as the whole backward with zeros for the gradients that do not arrive."""
    trace = tiny.traced(model, tiny.batch(), 4)
    values = values_of(model, trace)
    for role in [role_of(n) for n in trace.graph.placeholders("tangent")]:
        if role.name not in arriving:
            values["tangent", role.name].zero_()
    before = run_graph(trace.graph.copy(), values)
    graph = after([Normalize(), Specialize(tuple(arriving))], trace)
    now = run_graph(graph, values)
    whole = dict(zip(trace.graph.gradients, before["backward"], strict=True))
    for gradient, value in zip(graph.gradients, now["backward"], strict=True):
        assert torch.equal(value, whole.pop(gradient)), gradient
    for gradient, value in whole.items():
        assert not value.any(), f"{gradient} was dropped"


@pytest.mark.parametrize("arriving", [["loss"], ["aside"], []])
def test_specialized_backward_of_two_losses(arriving: list[str]) -> None:
    check_specialized(tiny.Partly(), arriving)


@pytest.mark.parametrize("arriving", [["loss"], ["logits"]])
def test_specialized_backward_of_loss_and_logits(arriving: list[str]) -> None:
    check_specialized(tiny.Blocks(dropout=0.0), arriving)


# shard, gather, release, reduce, update


UP_TO_RELEASE = [Normalize(), Specialize(), Shard(3), Gather(0), Release()]


def test_shard_reads_parameters_as_views_of_their_bucket() -> None:
    graph = after([Normalize(), Specialize(), Shard(1)])
    assert not graph.placeholders("param")
    assert [role_of(n).name for n in graph.placeholders("full")] == ["b0"]
    assert lines(graph, "forward")[:4] == [
        "%first.weight: f32[8,8] = zero.param %b0.full",
        "%0: f32[8,8] = aten.t(%first.weight)",
        "%first.bias: f32[8] = zero.param %b0.full",
        "%1: f32[4,8] = aten.addmm(%first.bias, %x, %0)",
    ]
    for view in calls(graph, ops.param):
        param = graph.layout.params[view.args[1]]
        assert view.args[2:] == (param.offset, list(param.shape), list(param.stride))


def test_shard_at_stage_3_leaves_a_slice() -> None:
    graph = after([Normalize(), Specialize(), Shard(3), Gather(0)])
    (shard,) = graph.placeholders("shard")
    assert shard.meta["val"].numel() * 4 == graph.layout.buckets["b0"].numel


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gather_has_nothing_to_do_below_stage_3(stage: int) -> None:
    graph = after([Normalize(), Specialize(), Shard(stage), Gather(0), Release()])
    assert not calls(graph, ops.gather) and not calls(graph, ops.release)


def test_gather_and_release_stand_around_each_blocks_uses() -> None:
    graph = after(UP_TO_RELEASE, tiny.trace_of("blocks", 4))
    assert zero_lines(graph, "forward")[:5] == [
        "%b0 = zero.gather b0",
        "zero.wait %b0",
        "%inlet.weight: f32[8,8] = zero.param %b0",
        "%inlet.bias: f32[8] = zero.param %b0",
        "zero.release %b0",
    ]
    expected: dict[str, list[str]] = {"forward": [], "backward": ["zero.release %b3"]}
    for region, buckets in (("forward", "b0 b1 b2 b3"), ("backward", "b2 b1")):
        for b in buckets.split():
            steps = [f"%{b} = zero.gather {b}", f"zero.wait %{b}", f"zero.release %{b}"]
            expected[region] += steps
    assert expected["forward"].pop() == "zero.release %b3", "it is in the backward"
    for region, steps in expected.items():
        assert [x for x in zero_lines(graph, region) if "param" not in x] == steps


def test_a_bucket_used_last_and_first_again_is_kept_for_the_backward() -> None:
    graph = after(UP_TO_RELEASE, tiny.trace_of("blocks", 4))
    (gather,) = (n for n in calls(graph, ops.gather) if n.args[1] == "b3")
    (full,) = gather.users
    assert is_call(full, ops.wait) and full in graph.outputs("saved")
    views = [n for n in full.users if is_call(n, ops.param)]
    assert {region_of(view) for view in views} == {"forward", "backward"}
    (release,) = (n for n in full.users if is_call(n, ops.release))
    assert all(view < release for view in views)
    apart = after(
        [Normalize(), Specialize(), Shard(3), Gather(0, across=False), Release()],
        tiny.trace_of("blocks", 4),
    )
    for region, buckets in (("forward", "0123"), ("backward", "321")):
        for target in (ops.gather, ops.release):
            assert [n.args[1] for n in calls(apart, target, region)] == [f"b{b}" for b in buckets]


@pytest.mark.parametrize(
    "distance, order",
    [(0, "b0 b1 b2 b0"), (175, "b0 b1 b2 b0"), (176, "b0 b1 b2"), (10**9, "b0 b1 b2")],
)
def test_max_reuse_distance_decides_whether_a_tied_matrix_is_gathered_again(
    distance: int, order: str
) -> None:
    """Between its two uses lie two blocks of 88 elements, padding left out."""
    trace = tiny.traced(tiny.Tied(), tiny.batch(), 4)
    graph = after([Normalize(), Specialize(), Shard(3), Gather(distance), Release()], trace)
    found = [n.args[1] for n in calls(graph, ops.gather, "forward")]
    assert found == order.split()


def test_a_kept_bucket_counts_while_it_is_kept() -> None:
    trace = tiny.traced(tiny.Tied(), tiny.batch(), 4)
    passes = [Normalize(), Specialize(), Shard(3)]
    apart = after([*passes, Gather(0), Release()], trace)
    kept = after([*passes, Gather(10**9, across=False), Release()], trace)
    assert peak_gathered(apart) == 192
    assert peak_gathered(kept) == 192 + 64


@pytest.mark.parametrize("stage", [2, 3])
def test_reduce_fills_a_buffer_and_scatters_it(stage: int) -> None:
    graph = after([Normalize(), Specialize(), Shard(stage), Gather(0), Reduce(0.5)])
    made = zero_lines(graph, "backward")
    made = made[made.index("%b0.grad: f32[256] = zero.grad_buffer b0") + 1 :]
    puts = [line.split('"')[1] for line in made if "zero.put" in line]
    assert sorted(puts) == sorted(graph.layout.params)
    assert [line for line in made if "zero.put" not in line and "zero.param" not in line] == [
        "%b0.mean: f32[64] = zero.reduce_scatter %b0.grad",
        "zero.wait %b0.mean",
        "%b0.sum: f32[64] = zero.accumulate %b0.kept, %b0.mean, 0.5",
    ]


@pytest.mark.parametrize("stage", [0, 1])
def test_reduce_only_accumulates_below_stage_2_with_accumulation(stage: int) -> None:
    graph = after([Normalize(), Specialize(), Shard(stage), Gather(0), Reduce()], accumulation=2)
    assert not graph.reduces_early
    assert not calls(graph, ops.reduce_scatter) and not calls(graph, ops.all_reduce)
    assert lines(graph, "backward")[-2:] == [
        "%b0.sum: f32[256] = zero.accumulate %b0.kept, %b0.grad",
        "return b0=%b0.sum",
    ]


@pytest.mark.parametrize(
    "stage, started",
    [
        (0, "%b0.mean: f32[256] = zero.all_reduce %b0.grad"),
        (1, "%b0.mean: f32[64] = zero.reduce_scatter %b0.grad"),
        (2, "%b0.mean: f32[64] = zero.reduce_scatter %b0.grad"),
    ],
)
def test_reduce_reduces_in_the_one_backward_of_a_step(stage: int, started: str) -> None:
    graph = after([Normalize(), Specialize(), Shard(stage), Gather(0), Reduce()], accumulation=1)
    assert graph.reduces_early
    kept = "f32[256]" if stage == 0 else "f32[64]"
    assert [x for x in lines(graph, "backward")[-5:] if "zero.put" not in x] == [
        started,
        "zero.wait %b0.mean",
        f"%b0.sum: {kept} = zero.accumulate %b0.kept, %b0.mean",
        "return b0=%b0.sum",
    ]


class NamedLikeABucket(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, b0: Tensor) -> Tensor:
        return self.linear(x).square().sum() + b0.sum()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_input_may_be_called_like_a_bucket(stage: int) -> None:
    inputs = {"x": torch.ones(2, 8), "b0": torch.ones(3)}
    graph = tiny.planned(tiny.traced(NamedLikeABucket(), inputs, 4), stage).graph
    (buffer,) = calls(graph, ops.grad_buffer)
    assert role_of(buffer.args[0]).kind in ("full", "shard")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_update_steps(stage: int, accumulation: int) -> None:
    clipped = Update(rule="sgd", states=(), scalars=4, max_norm=2.0)
    passes = [Normalize(), Specialize(), Shard(stage), Gather(0), Reduce(), clipped]
    graph = after(passes, accumulation=accumulation)
    late = stage < 2 and accumulation > 1
    mean = "%b0.mean" if late else "%b0.sum"
    slices = "full" if stage == 0 else "shard"
    reduction = {0: "%b0.mean: f32[256] = zero.all_reduce %b0.sum"}
    reduction[1] = "%b0.mean: f32[64] = zero.reduce_scatter %b0.sum"
    expected = [reduction[stage], "zero.wait %b0.mean"] if late else []
    expected += [f"%partial: f64[{4 if stage == 0 else 1}] = zero.norm_partials [{mean}]"]
    expected[-1] += ", 4" if stage == 0 else ", 1"
    if stage > 0:
        expected += ["%partials: f64[4] = zero.gather_partials %partial", "zero.wait %partials"]
    expected += [
        f"%finish: (f64[], f32[2]) = zero.finish {'%partial' if stage == 0 else '%partials'}, max_norm=2.0",
        "%norm: f64[] = %finish[0]",
        "%control: f32[2] = %finish[1]",
        f"zero.update.sgd %b0.{slices}, {mean}, [], %hyper, %used, control=%control",
    ]
    if stage in (1, 2):
        expected += ["%b0.full: f32[256] = zero.refresh %b0.full, %b0.shard"]
    assert lines(graph, "step") == [*expected, "return norm=%norm"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_updates_are_in_layout_order_each_refresh_right_behind_its_own(stage: int) -> None:
    graph = tiny.planned(tiny.trace_of("blocks", 4), stage).graph
    found = [n for n in graph.nodes("step") if is_call(n, ops.update, ops.refresh)]
    kinds = [ops.update, ops.refresh] if stage in (1, 2) else [ops.update]
    given = [(kind, bucket) for bucket in ("b1", "b2", "b3") for kind in kinds]
    assert [(n.target, bucket_of(n)) for n in found] == given
    for node in calls(graph, ops.refresh):
        assert is_call(node.prev, ops.update) and not node.users, "the next forward waits for it"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_refreshed_bucket_is_waited_for_where_it_is_first_read(stage: int) -> None:
    """Once a step, in the forward that comes next; what is frozen is not refreshed."""
    graph = tiny.planned(tiny.trace_of("blocks", 4), stage).graph
    waits = calls(graph, ops.refreshed)
    assert [n.args[1] for n in waits] == (["b1", "b2", "b3"] if stage in (1, 2) else [])
    assert {region_of(n) for n in waits} <= {"forward"}
    layout = graph.layout
    for wait in waits:
        views = [
            n for n in calls(graph, ops.param) if layout.params[n.args[1]].bucket == wait.args[1]
        ]
        assert wait.next is min(views)
        for view in views:
            own = region_of(view) == "forward"
            assert view.args[0] is (wait if own else wait.args[0])


def test_without_an_optimizer_nothing_is_refreshed_or_waited_for() -> None:
    none = Update(rule="", states=(), scalars=0)
    graph = after([Normalize(), Specialize(), Shard(2), Gather(0), Reduce(), none])
    assert not calls(graph, ops.refresh) and not calls(graph, ops.refreshed)


# Loss scale, weights and averages


def half(stage: int, **more: Any) -> TrainGraph:
    return tiny.planned(tiny.trace_of("half", 4), stage, **tiny.GIVEN["half"], **more).graph


def test_scale_multiplies_what_arrives_and_divides_what_leaves() -> None:
    graph = half(3)
    backward = lines(graph, "backward")
    assert re.fullmatch(r"%\d+: f32\[\] = aten\.mul\.Tensor\(%d_loss, %scale\)", backward[0])
    assert sum("%d_loss" in line for line in backward) == 1
    assert re.match(r"return .*grad x=(%\d+)$", backward[-1])
    last = backward[-1].rpartition("=")[2]
    (made,) = [line for line in backward if line.startswith(f"{last}: ")]
    assert re.fullmatch(r"%\d+: f16\[4,8\] = aten\.div\.Tensor\(%\d+, %scale\)", made)


def test_fp16_update_divides_the_scale_out_and_may_be_skipped() -> None:
    step = [line for line in lines(half(2), "step") if "refresh" not in line]
    start = next(i for i, line in enumerate(step) if "reciprocal" in line)
    assert [re.sub(r"%\d+", "%_", line) for line in step[start : start + 5]] == [
        "%_: f32[] = aten.reciprocal(%scale)",
        "%finish: (f64[], f32[2]) = zero.finish %partials, divided=%_, max_norm=1.0, skips",
        "%norm: f64[] = %finish[0]",
        "%control: f32[2] = %finish[1]",
        "zero.update.adamw %b1.master, %b1.sum, [%b1.exp_avg, %b1.exp_avg_sq], low=%b1.shard, "
        "%hyper, %used, control=%control",
    ]


def test_bf16_checks_for_overflow_unless_told_not_to() -> None:
    for check in (True, False):
        given = {"bf16": {"enabled": True, "check_grad_overflow": check}}
        trace = tiny.traced(tiny.Blocks(), tiny.batch(), 4, tiny.config(1, **given))
        step = lines(tiny.planned(trace, 1, **given).graph, "step")
        assert any("zero.finish" in line and "skips" in line for line in step) is check


def test_weights_are_summed_over_ranks_and_divided_out() -> None:
    weighted = tiny.planned(
        tiny.trace_of("blocks", 4),
        3,
        compile={"weighted_accumulation": True},
        train_micro_batch_size_per_gpu=4,
        gradient_accumulation_steps=4,
    ).graph
    step = [re.sub(r"%\d+", "%_", line) for line in lines(weighted, "step")]
    start = step.index("%weights: f64[] = zero.sum_weights %weight")
    assert step[start : start + 4] == [
        "%weights: f64[] = zero.sum_weights %weight",
        "zero.wait %weights",
        "%_: f64[] = aten.reciprocal(%weights)",
        "%_: f64[] = aten.mul.Scalar(%_, 4.0)",
    ]
    assert {n.args[3] for n in calls(weighted, ops.accumulate)} == {1.0}


@pytest.mark.parametrize(
    ("given", "factors"),
    [
        ({}, (1.0, 0.25)),
        ({"prescale_gradients": True}, (0.25, 1.0)),
        ({"gradient_predivide_factor": 2.0}, (0.5, 0.5)),
        ({"gradient_allreduce_op": "sum"}, (1.0, 1.0)),
    ],
)
@pytest.mark.parametrize(
    "stage, more, region",
    [
        (0, {}, "backward"),
        (0, TWICE, "step"),
        (1, {}, "backward"),
        (1, TWICE, "step"),
        (3, {}, "backward"),
        (3, TWICE, "backward"),
    ],
)
def test_how_ranks_are_averaged(
    stage: int,
    more: dict[str, Any],
    region: str,
    given: dict[str, Any],
    factors: tuple[float, float],
) -> None:
    graph = tiny.planned(tiny.trace_of("blocks", 4), stage, **given, **more).graph
    kind = ops.all_reduce if stage == 0 else ops.reduce_scatter
    assert len(calls(graph, kind)) == len(calls(graph, kind, region)) == 3
    reductions = calls(graph, kind, region)
    assert {node.args[2:4] for node in reductions} == {factors}
    shown = [line for line in zero_lines(graph, region) if "_reduce" in line or "reduce_s" in line]
    said = "" if not given else f", {factors[0]}, {factors[1]}"
    assert all(re.search(rf"%b\d\.\w+{re.escape(said)}$", line) for line in shown) and shown


def test_types_of_what_is_sent_and_kept() -> None:
    given = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "fp16"}}
    trace = tiny.traced(tiny.Blocks(), tiny.batch(), 4, tiny.config(3, **given))
    for stage in (1, 2):
        graph = tiny.planned(trace, stage, **given).graph
        (sent,) = {n.meta["val"].dtype for n in calls(graph, ops.reduce_scatter)}
        (kept,) = {n.meta["val"].dtype for n in calls(graph, ops.accumulate)}
        assert (sent, kept) == (torch.bfloat16, torch.float16)


def test_update_asks_other_ranks_only_where_a_gradient_may_be_missing() -> None:
    partly, blocks = (tiny.planned(tiny.trace_of(n, 4), 2).graph for n in ("partly", "blocks"))
    assert partly.unused and len(calls(partly, ops.any_rank)) == 1
    assert not blocks.unused and not calls(blocks, ops.any_rank)


# lower


class Optimizer:
    """Stands for `hyper` in a lowered step; writes down what it is asked to update."""

    def __init__(self) -> None:
        self.updated: dict[str, Tensor] = {}

    def update(self, bucket: str, master: Tensor, grad: Tensor, *rest: Any) -> None:
        self.updated[bucket] = grad.clone()
        master.sub_(grad, alpha=0.1)


def flat(layout: Layout, model: nn.Module, bucket: str) -> Tensor:
    values = torch.zeros(layout.buckets[bucket].numel)
    for param in layout.bucket_params(bucket):
        place = values.as_strided(param.shape, param.stride, param.offset)
        place.copy_(model.get_parameter(param.name).detach())
    return values


def run_programs(plan: Plan, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Run a step of a world of one: "forward" results, "gradients" by name, and the "step"'s."""
    layout = plan.graph.layout
    buckets = {name: flat(layout, model, name) for name in layout.buckets}
    optimizer = Optimizer()
    saved: dict[str, Tensor] = {}
    kept: dict[str, Tensor | None] = dict.fromkeys(layout.buckets)

    def values(program: Program) -> list[Any]:
        tables: dict[str, Any] = {"input": inputs, "saved": saved, "kept": kept}
        tables |= dict.fromkeys(("full", "shard"), buckets)
        tables |= {"tangent": {"loss": torch.ones(())}, "hyper": {"hyper": optimizer}}
        return [tables[r.kind][r.name] if r.kind in tables else None for r in program.inputs]

    forward, backward, step = (plan.program(r) for r in ("forward", "backward", "step"))
    returned = forward.module(values(forward))
    results, kept_back = returned[: forward.outputs], returned[forward.outputs :]
    saved.update(zip(forward.saved, kept_back, strict=True))
    grads = backward.module(values(backward))
    kept.update({g.name: v.clone() for g, v in zip(plan.graph.gradients, grads, strict=True)})
    gradients = {
        p.name: kept[p.bucket].as_strided(p.shape, p.stride, p.offset).clone()
        for p in layout.params.values()
        if p.trainable
    }
    (norm,) = step.module(values(step))
    return {"results": results, "gradients": gradients, "norm": norm, "optimizer": optimizer}


@pytest.mark.parametrize("stage", range(4))
def test_lowered_programs_of_one_rank_are_eager_to_the_bit(stage: int) -> None:
    torch.manual_seed(0)
    model, inputs = tiny.Blocks(), tiny.batch()
    plan = tiny.planned(tiny.trace_of("blocks", 1), stage, gradient_clipping=0.0)
    eager = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = eager(**inputs)
    expected["loss"].backward()
    torch.manual_seed(3)
    found = run_programs(plan, model, inputs)
    same(found["results"], (expected["loss"], expected["logits"]))
    trained = {n: p for n, p in eager.named_parameters() if p.requires_grad}
    assert found["gradients"].keys() == trained.keys()
    for name, parameter in trained.items():
        assert torch.equal(found["gradients"][name], parameter.grad), name
    norm = nn.utils.get_total_norm([p.grad for p in trained.values()])
    torch.testing.assert_close(found["norm"].float(), norm)
    assert found["optimizer"].updated.keys() == {"b1", "b2", "b3"}


@pytest.mark.parametrize("stage", range(4))
def test_lowered_programs_of_one_rank_have_no_collective(stage: int) -> None:
    plan = tiny.planned(tiny.trace_of("blocks", 1), stage)
    for region in ("forward", "backward", "step"):
        assert "_c10d_functional" not in plan.program(region).module.code


def test_a_program_empties_the_list_of_its_inputs() -> None:
    plan = tiny.planned(tiny.trace_of("mlp", 1), 0)
    torch.manual_seed(0)
    model = tiny.Mlp()
    program = plan.program("forward")
    tables: dict[str, Any] = {"full": {"b0": flat(plan.graph.layout, model, "b0")}}
    tables["input"] = tiny.batch()
    values = [tables[role.kind][role.name] for role in program.inputs]
    loss, *_ = program.module(values)
    assert values == []
    assert torch.equal(loss, model(**tiny.batch()))


@pytest.mark.parametrize(
    "prefetch, region, started, taken, read",
    [
        (0, "forward", "0123", "", "0123"),
        (0, "backward", "21", "", "321"),
        (10**9, "forward", "32", "012", "0123"),
        (10**9, "backward", "1", "", "321"),
    ],
)
@pytest.mark.parametrize("algorithm", ["point-to-point", "native"])
def test_no_copy_out_of_a_gathered_bucket(
    algorithm: Any, prefetch: int, region: Any, started: str, taken: str, read: str
) -> None:
    """Whether the program gathers it, takes it from the step before, or has it from the forward."""
    zero = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": prefetch}
    plan = tiny.planned(tiny.trace_of("blocks", 8), 3, algorithm, zero_optimization=zero)
    nodes = list(plan.program(region).module.graph.nodes)
    gathers = [n for n in nodes if starts_collective(n) and "gather" in str(n.target)]
    if algorithm == "native":
        native = c10d("all_gather_into_tensor_out")
        assert [str(n.target) for n in gathers] == [native] * len(started)
        assert {n.args[1:] for n in gathers} <= {(8, "dp")}
    else:
        assert [(n.target, n.args[3]) for n in gathers] == [("gather", f"b{b}") for b in started]
    takes = [n for n in nodes if n.op == "call_method" and n.target == "take"]
    assert [n.args[2] for n in takes] == [f"b{b}" for b in taken]
    for start in gathers + takes:
        (user,) = start.users
        assert waits_for_collective(user) or (user.op == "output" and region == "forward")
    places = {n.kwargs["out"] for n in nodes if "out" in n.kwargs}  # of gradients
    views = [n for n in nodes if n.target is aten.as_strided.default and n not in places]
    assert len(views) == len(calls(plan.graph, ops.param, region))
    wholes = {view.args[0] for view in views}
    assert len(wholes) == len(read)
    kept = [n for n in wholes if not waits_for_collective(n)]
    assert [n.op for n in kept] == (["placeholder"] if region == "backward" else [])  # b3
    for whole in wholes:
        assert {u.target for u in whole.users} <= {aten.as_strided.default, "output"}
    copies = (aten.clone.default, aten.copy.default, aten._to_copy.default)
    assert not [user for view in views for user in view.users if user.target in copies]


SMALL = [c10d("all_gather_into_tensor_out")]
"""The norm's partial sums go as the backend does it, with either algorithm."""
SUMMED, SCATTERED = [c10d("all_reduce_")] * 3, ["reduce_scatter"] * 3
AHEAD = {"refresh", "begin"}
"""Started for the next step, which waits, with either algorithm."""


@pytest.mark.parametrize(
    "stage, more, region, native, channel",
    [
        (0, {}, "backward", SUMMED, ["all_reduce"] * 3),
        (0, {}, "step", [], []),
        (0, TWICE, "backward", [], []),
        (0, TWICE, "step", SUMMED, ["all_reduce"] * 3),
        (1, {}, "forward", [], []),
        (1, {}, "backward", REDUCED, SCATTERED),
        (1, {}, "step", SMALL + ["refresh"] * 3, SMALL + ["refresh"] * 3),
        (1, TWICE, "backward", [], []),
        (1, TWICE, "step", REDUCED + SMALL + ["refresh"] * 3, SCATTERED + SMALL + ["refresh"] * 3),
        (2, {}, "backward", REDUCED, SCATTERED),
        (2, TWICE, "backward", REDUCED, SCATTERED),
        (2, {}, "step", SMALL + ["refresh"] * 3, SMALL + ["refresh"] * 3),
        (3, {}, "step", SMALL + ["begin"] * 3, SMALL + ["begin"] * 3),
    ],
)
def test_collectives_of_each_stage(
    stage: int, more: dict[str, Any], region: Any, native: list[str], channel: list[str]
) -> None:
    trace = tiny.trace_of("blocks", 8)
    for algorithm, expected in (("native", native), ("point-to-point", channel)):
        program = tiny.planned(trace, stage, algorithm, **more).program(region)
        nodes = program.module.graph.nodes
        starts = [n for n in nodes if starts_collective(n)]
        assert [str(n.target) for n in starts] == expected
        waits = [n for n in nodes if waits_for_collective(n)]
        assert {n.args[0] for n in waits} == {n for n in starts if n.target not in AHEAD}
        refreshed = [n.args[2] for n in nodes if n.target == "refreshed"]
        awaited = stage in (1, 2) and region == "forward"
        assert refreshed == (["b1", "b2", "b3"] if awaited else [])
        names = dict.fromkeys(AHEAD, "ahead") | {"gather": "gathers"}
        names |= dict.fromkeys(("reduce_scatter", "all_reduce"), "reductions")
        channels = [role.name for role in program.inputs if role.kind == "channel"]
        used = {names[kind] for kind in expected if kind in names} | (
            {"ahead"} if awaited else set()
        )
        assert channels == sorted(used)


def test_only_padding_of_a_gradient_buffer_is_zeroed() -> None:
    """As (start, stop): what lies behind each parameter's last element."""
    plan = tiny.planned(tiny.trace_of("partly", 8), 2)
    (buffer,) = (
        n
        for n in plan.program("backward").module.graph.nodes
        if getattr(n.target, "__name__", "") == "grad_buffer"
    )
    layout = plan.graph.layout
    written = [layout.params[n] for n in layout.buckets["b0"].params if n not in plan.graph.unused]
    covered = torch.zeros(layout.buckets["b0"].numel, dtype=torch.int)
    for param in written:
        covered[param.offset : param.offset + param.numel] += 1
    for start, stop in buffer.args[3]:
        covered[start:stop] += 1
    assert covered.eq(1).all()
    gaps = buffer.args[3]
    assert all(one[1] < other[0] for one, other in pairwise(gaps)), "neighbours are joined"
