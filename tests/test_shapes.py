"""Sizes that vary: which calls share a program, what it computes, and what the user is told."""

import copy
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zerograph
from tests.models import batch_for, loss_of, make
from tests.oracle import config_for, differing, gradient_error
from tests.ranks import run_ranks
from zerograph.errors import ProgramWarning
from zerograph.runtime import planner, programs

CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "gradient_clipping": 0.0,
}


class Watch:
    """An engine beside its eager model; counts traces and keeps warnings."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.eager = copy.deepcopy(model)
        self.engine = zerograph.compile(model, CONFIG)
        self.traces = 0
        self.said: list[str] = []
        trace = planner.trace

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.traces += 1
            return trace(*args, **kwargs)

        monkeypatch.setattr(planner, "trace", counted)

    def step(self, *args: Any, loss: Callable[[Any], Tensor] = loss_of, **kwargs: Any) -> int:
        """A forward and backward that must give eager's bits; answers the traces so far."""
        self.eager.zero_grad()
        expected = loss(self.eager(*args, **kwargs))
        expected.backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = loss(self.engine(*args, **kwargs))
        self.said += [str(w.message) for w in caught if w.category is ProgramWarning]
        assert all(w.filename == __file__ for w in caught if w.category is ProgramWarning)
        self.engine.backward(found)
        assert torch.equal(found, expected)
        gradients = {n: p.grad for n, p in self.eager.named_parameters() if p.grad is not None}
        assert differing(self.engine.gradients(), gradients) == []
        self.engine.zero_grad()
        return self.traces


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module], Watch]]:
    yield lambda model: Watch(model, monkeypatch)


class Net(nn.Module):
    """Two linear layers over [batch, length, 4] with `inside` between; answers what `inside` makes."""

    def __init__(self, inside: Callable[..., Any] = lambda h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 4)
        self.inside = inside

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.inside(self.second(torch.tanh(self.first(x))), *rest)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(sum(shape)))


def total(y: Tensor) -> Tensor:
    return y.square().sum()


# What a dynamic program computes

TEXT = [(2, 16), (2, 17), (3, 9), (5, 33), (2, 3), (7, 64), (16, 16), (2, 16), (17, 40)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_text_of_any_size_gives_eagers_bits(name: str, watch: Callable[..., Watch]) -> None:
    run = watch(make(name))
    counts, collectives = [], set()
    for seed, size in enumerate(TEXT):
        counts.append(run.step(**batch_for(name, seed, *size)))
        collectives.add(tuple(run.engine.plan.signature()))
    assert counts == [1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert len(collectives) == 1, "ranks with other shapes would not be in step"
    assert run.said == []


def test_images_of_any_size_give_eagers_bits(watch: Callable[..., Watch]) -> None:
    run = watch(make("convnet"))
    counts = []
    for size, height, width in [(2, 16, 16), (3, 16, 16), (3, 20, 24), (5, 8, 32), (20, 9, 9)]:
        pixels = torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(size))
        counts.append(run.step(pixels, torch.arange(size) % 5))
    assert counts == [1, 2, 3, 3, 4]  # a convolution takes another kernel from 16 images on
    (said,) = run.said
    assert "pixels.size(0) < 16, but pixels.size(0) is 20" in said


def test_two_hundred_lengths_are_two_traces(watch: Callable[..., Watch]) -> None:
    run, draw = watch(Net()), random.Random(0)
    for _ in range(200):
        run.step(x(3, draw.randint(2, 500)), loss=total)
    assert run.traces == 2
    assert run.said == []


def test_a_backward_for_other_gradients_and_materialised_zeros(watch: Callable[..., Watch]) -> None:
    """The backward of a part of the outputs at sizes other than the captured ones."""
    pair = watch(Net(lambda h: (h.sum(1, keepdim=True), torch.cat([h, h.sin()], 1))))
    for size in [(3, 5), (3, 6), (4, 7), (5, 9)]:
        pair.step(x(*size), loss=lambda y: total(y[0]))
        pair.step(x(*size), loss=lambda y: total(y[1]))
        pair.step(x(*size), loss=lambda y: total(y[0]) + total(y[1].transpose(0, 1).contiguous()))
    assert pair.traces == 3


def test_guards_are_fixed_when_the_program_is(watch: Callable[..., Watch]) -> None:
    """Planning, text and costs assume nothing more about a symbol."""
    run = watch(make("llama"))
    run.step(**batch_for("llama", 0, 2, 16))
    run.step(**batch_for("llama", 0, 3, 17))
    run.step(**batch_for("llama", 0, 3, 17), loss=lambda o: o.logits.square().mean())
    plan = run.engine.plan
    assert plan.graph.sizes.symbols
    assert str(plan) and plan.short() and plan.memory and plan.text(skeleton=True)
    assert len(plan.graph.fake_mode.shape_env.guards) == len(plan.graph.sizes.guards)


def test_the_text_shows_symbols_guards_and_the_captured_sizes(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h, y: h[:, : y.shape[0]] * y[:, None]))
    run.step(x(3, 5), torch.ones(5), loss=total)
    run.step(x(3, 7), torch.ones(7), loss=total)
    text = str(run.engine.plan)
    assert "sizes  s0 = x.size(1) (7), s1 = arg1.size(0) (7)" in text
    assert "%x: f32[3,s0,4]" in text
    assert text == str(zerograph_plan_again(run))


def zerograph_plan_again(run: Watch) -> Any:
    """The same plan from the same calls in another engine."""
    other = zerograph.compile(copy.deepcopy(run.eager), CONFIG)
    total(other(x(3, 5), torch.ones(5))).backward()
    total(other(x(3, 7), torch.ones(7))).backward()
    return other.plan


def test_sizes_among_the_outputs(watch: Callable[..., Watch]) -> None:
    run = watch(
        Net(lambda h: {"loss": h.square().sum(), "length": h.shape[1], "n": h.numel() // 4})
    )
    for length in (5, 6, 9):
        run.step(x(3, length))
        found = run.engine(x(3, length))
        assert (found["length"], found["n"]) == (length, 3 * length)
        assert type(found["length"]) is int
    assert (run.traces, run.said) == (2, [])


def test_an_input_of_which_the_size_alone_is_used(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h, like: h * like.shape[0]))
    for length, used in [(5, 2), (6, 3), (9, 9), (9, 4)]:
        run.step(x(3, length), torch.empty(used), loss=total)
    assert run.traces == 2


def test_gradients_of_inputs_that_vary(watch: Callable[..., Watch]) -> None:
    run = watch(Net())
    for length in (5, 6, 9):
        ours = x(3, length).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        total(run.engine(ours)).backward()
        total(run.eager(theirs)).backward()
        assert torch.equal(ours.grad, theirs.grad)
    assert run.traces == 2


def test_an_input_that_varies_and_is_changed(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h, y: h.sum() * y.add_(1).sum()))
    for length in (5, 6, 9):
        ours, theirs = torch.ones(length), torch.ones(length)
        expected, found = run.eager(x(2, 2), theirs), run.engine(x(2, 2), ours)
        assert torch.equal(found, expected)
        assert torch.equal(ours, theirs) and ours[0] == 2
    assert run.traces == 2


# Which calls share a program


def test_batch_and_length_both_vary(watch: Callable[..., Watch]) -> None:
    run = watch(Net())
    sizes = [(8, 5), (8, 5), (8, 6), (8, 7), (3, 9), (4, 2), (8, 5)]
    assert [run.step(x(*s), loss=total) for s in sizes] == [1, 1, 2, 2, 3, 3, 3]


def test_sizes_of_zero_and_one_are_programs_of_their_own(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h: h.sum(1)))
    sizes = [(8, 5), (8, 6), (8, 1), (8, 1), (8, 7), (8, 0), (8, 0)]
    assert [run.step(x(*s), loss=total) for s in sizes] == [1, 2, 3, 3, 3, 4, 4]


def test_a_last_batch_of_one_is_one_more_program_for_all_lengths(
    watch: Callable[..., Watch],
) -> None:
    run = watch(Net())
    sizes = [(8, 5), (8, 6), (1, 7), (1, 9), (8, 4), (5, 4), (1, 2)]
    assert [run.step(x(*s), loss=total) for s in sizes] == [1, 2, 3, 3, 3, 4, 4]


def test_equal_sizes_are_not_tied_unless_the_forward_needs_it(watch: Callable[..., Watch]) -> None:
    """Captured with batch = length = the other input's length; later they all differ."""
    run = watch(Net(lambda h, y: h.sum() * y.sum()))
    calls = [((3, 3), 3), ((4, 4), 4), ((5, 6), 7), ((7, 2), 2)]
    counts = [run.step(x(*s), torch.ones(n), loss=lambda y: y) for s, n in calls]
    assert counts == [1, 2, 2, 2]


def test_an_equality_that_the_forward_asks_is_a_guard(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h, y: total(h) if h.shape[1] == y.shape[0] else h.sum() * y.sum()))
    calls = [((3, 3), 3), ((4, 4), 4), ((5, 5), 5), ((5, 6), 7), ((2, 9), 3), ((2, 9), 9)]
    counts = [run.step(x(*s), torch.ones(n), loss=lambda y: y) for s, n in calls]
    assert counts == [1, 2, 2, 3, 3, 3]


def test_layouts_are_kinds_of_their_own(watch: Callable[..., Watch]) -> None:
    """Contiguous, transposed, and slices of a padded batch: two programs each."""
    run = watch(Net())
    for length in (5, 6, 9, 7):
        run.step(x(3, length), loss=total)
    assert run.traces == 2
    for length in (5, 6, 9, 7):
        run.step(x(length, 3).transpose(0, 1), loss=total)
    assert run.traces == 4
    padded = x(3, 20)
    for length in (5, 6, 9, 7):
        run.step(padded[:, :length], loss=total)
    assert run.traces == 6


def test_python_numbers_stay_part_of_the_key(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h, n: h[:, :n]))
    counts = [run.step(x(3, s), n, loss=total) for s, n in [(5, 2), (6, 2), (7, 2), (7, 3), (7, 3)]]
    assert counts == [1, 2, 2, 3, 3]


def test_forward_only_programs_vary_as_well(watch: Callable[..., Watch]) -> None:
    run = watch(make("gpt2"))
    run.engine.eval(), run.eager.eval()
    for length in (5, 6, 9):
        batch = batch_for("gpt2", length, 2, length)
        with torch.no_grad():
            assert torch.equal(run.engine(**batch).logits, run.eager(**batch).logits)
    assert run.traces == 2


# Models that depend on a size

TABLE = list(range(40))


def test_a_branch_on_the_length_is_a_program_for_each_side(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h: h * 2 if h.shape[1] > 8 else h.sin()))
    lengths = [5, 6, 9, 12, 7, 8, 30]
    assert [run.step(x(3, n), loss=total) for n in lengths] == [1, 2, 3, 3, 3, 3, 3]
    assert run.said == []


def test_a_forward_that_settles_a_size_gets_a_program_for_each(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h: h * TABLE[h.shape[1]]))
    lengths = [5, 6, 7, 8, 6, 7, 9]
    assert [run.step(x(3, n), loss=total) for n in lengths] == [1, 2, 3, 4, 4, 4, 5]
    assert len(run.said) == 2
    assert "program 4 of Net" in run.said[0]
    assert "x.size(1)" in run.said[0] and "is 8" in run.said[0]


def test_a_reshape_to_fixed_numbers(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h: h.reshape(2, 16, 4)))
    for shape in [(2, 16), (4, 8), (8, 4), (16, 2), (32,), (4, 8)]:
        run.step(x(*shape), loss=total)
    with pytest.raises(RuntimeError, match="shape"):
        run.engine(x(3, 3))
    run.step(x(4, 8), loss=total)


@torch.library.custom_op("zerograph_tests::rolled", mutates_args=())
def rolled(h: Tensor, by: int) -> Tensor:
    return h.roll(by, 1)


@rolled.register_fake
def _(h: Tensor, by: int) -> Tensor:
    if not all(isinstance(size, int) for size in h.shape):
        raise NotImplementedError("rolled has no symbolic shapes")
    return torch.empty_like(h)


rolled.register_autograd(
    lambda ctx, grad: (grad.roll(-ctx.by, 1), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "by", inputs[1]),
)


def test_an_operator_without_symbols_falls_back_to_static(watch: Callable[..., Watch]) -> None:
    run = watch(Net(lambda h: rolled(h, 1)))
    for length in (5, 6, 7, 5, 6):
        run.step(x(3, length), loss=total)
    assert len(run.engine._programs) == 3
    (said,) = run.said
    assert "rolled has no symbolic shapes" in said
    assert "every new shape of its inputs is a new capture" in said


def test_an_error_of_the_forward_itself_is_no_fallback(watch: Callable[..., Watch]) -> None:
    def inside(h: Tensor) -> Tensor:
        if h.shape[1] == 6:
            raise KeyError("six")
        return h

    run = watch(Net(inside))
    run.step(x(3, 5), loss=total)
    with pytest.raises(KeyError, match="six"):
        run.engine(x(3, 6))
    run.step(x(3, 7), loss=total)
    run.step(x(3, 8), loss=total)
    assert run.said == []
    assert len(run.engine._programs) == 2


# The bound


def test_the_least_recently_used_program_goes(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 3)
    run = watch(Net(lambda h, n: h * n))
    for n in (1, 2, 3):
        run.step(x(2, 2), n, loss=total)
    run.step(x(2, 2), 1, loss=total)
    assert run.step(x(2, 2), 4, loss=total) == 4  # 2 goes
    assert len(run.engine._programs) == 3
    assert run.step(x(2, 2), 1, loss=total) == 4
    assert run.step(x(2, 2), 3, loss=total) == 4
    assert run.step(x(2, 2), 2, loss=total) == 5
    assert [f"arg1 is {n}" in said for n, said in zip((4, 2), run.said)] == [True, True]


def test_a_program_with_a_backward_outstanding_stays(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 1)
    run = watch(Net(lambda h, n: h * n))
    losses = [total(run.engine(x(2, 2), n)) for n in (1, 2, 3)]
    assert len(run.engine._programs) == 3
    for loss in losses:
        loss.backward()
    run.engine(x(2, 2), 1)
    assert run.traces == 3
    del losses, loss
    gc.collect()
    run.engine.zero_grad()
    run.step(x(2, 2), 4, loss=total)
    assert len(run.engine._programs) == 1


# Ranks


LENGTHS = [(16, 16), (16, 20), (7, 16), (31, 2), (16, 16), (2, 40)]
"""Lengths of the two ranks in each step: both static, one dynamic, both dynamic."""


def _ranks(rank: int, world: int, name: str, stage: int) -> dict[str, Any]:
    """Gradients of every step beside DDP's, and how many programs the rank has."""
    model = make(name)
    wrapped = DistributedDataParallel(model)
    engine = zerograph.compile(make(name), config_for(stage))
    report: dict[str, Any] = {"differing": [], "error": 0.0, "losses": []}
    for step, lengths in enumerate(LENGTHS):
        batch = batch_for(name, rank + 10 * step, 3 - (step % 2), lengths[rank])
        model.zero_grad()
        expected = loss_of(wrapped(**batch))
        expected.backward()
        found = loss_of(engine(**batch))
        engine.backward(found)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        ours = engine.gradients()
        report["differing"] += differing(ours, gradients)
        report["error"] = max(report["error"], gradient_error(ours, gradients))
        report["losses"].append(torch.equal(found, expected))
        engine.zero_grad()
    report["programs"] = len(engine._programs)
    engine.backward(loss_of(engine(**batch_for(name, rank, 2, 5 + rank))))
    engine.step()
    state = engine.state_dict()
    report["state"] = {n: t for n, t in state.items() if t.is_floating_point()}
    return report


@pytest.mark.parametrize(("name", "stage", "programs"), [("llama", 3, [3, 2]), ("bert", 2, [3, 2])])
def test_ranks_with_other_lengths_get_ddps_gradients(
    name: str, stage: int, programs: list[int]
) -> None:
    reports = run_ranks(2, _ranks, name, stage)
    for report in reports:
        assert report["losses"] == [True] * len(LENGTHS)
        assert report["error"] <= 1.0
        assert report["differing"] == []
    assert differing(reports[0]["state"], reports[1]["state"]) == []
    assert [report["programs"] for report in reports] == programs


def _late(rank: int, world: int) -> int:
    """Rank 0 has every program already when rank 1 captures its dynamic ones, and the reverse."""
    engine = zerograph.compile(Net(), config_for(3))
    lengths = [(5, 5), (6, 5), (7, 5), (8, 6), (5, 7), (9, 1)]
    for pair in lengths:
        engine.backward(total(engine(x(2, pair[rank]))))
        engine.step()
    return len(engine._programs)


def test_one_rank_captures_while_the_other_runs() -> None:
    assert run_ranks(2, _late, timeout=120) == [2, 3]
