"""What a forward reads and changes in Python: compared at every call, or refused."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerograph
from tests.models import batch_for, make
from tests.oracle import config_for
from zerograph.errors import CaptureError, ProgramWarning

BETA = 2.0


class Inner(nn.Module):
    """Reads Python values of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.0)
        self.tau, self.heads, self.options = 1.0, [1, 2], {"gain": 1}
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.mask = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.dropout(self.linear(x))) * self.tau * len(self.heads)
        return hidden * self.options["gain"] * BETA * self.mask


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def _anneal(inner: Inner) -> None:
    inner.tau = 0.5


def _append(inner: Inner) -> None:
    inner.heads.append(3)


def _option(inner: Inner) -> None:
    inner.options["gain"] = 3


def _function(inner: Inner) -> None:
    inner.act = torch.relu


def _mask(inner: Inner) -> None:
    inner.mask = torch.full((4,), 2.0)


def _submodule(inner: Inner) -> None:
    inner.dropout = nn.Identity()  # type: ignore[assignment]


def _hook(inner: Inner) -> None:
    inner.linear.register_forward_hook(lambda module, args, output: output * 2)


def _certain(inner: Inner) -> None:
    inner.dropout.p = 1.0


CHANGES = (_anneal, _append, _option, _function, _mask, _submodule, _hook, _certain)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_value_is_another_program(change: Callable[[Inner], None]) -> None:
    """And changed back it is the first one again, where it can be."""
    model = Outer()
    engine, x = zerograph.compile(copy.deepcopy(model), config_for(3)), torch.ones(2, 4)
    before = engine(x)
    assert torch.equal(before, model(x))
    for each in (engine.module, model):
        change(each.layers[1])
    assert torch.equal(engine(x), model(x))
    assert not torch.equal(before, model(x)) or change is _submodule
    assert len(engine._programs) == 2
    engine(x)
    assert len(engine._programs) == 2


def test_a_changed_global(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Outer()
    engine, x = zerograph.compile(copy.deepcopy(model), config_for(0)), torch.ones(2, 4)
    first = engine(x)
    monkeypatch.setattr("tests.test_effects.BETA", 5.0)
    assert torch.equal(engine(x), model(x))
    monkeypatch.undo()
    assert torch.equal(engine(x), first) and len(engine._programs) == 2


def test_values_of_another_type_are_others() -> None:
    model = Outer()
    engine, x = zerograph.compile(copy.deepcopy(model), config_for(0)), torch.ones(2, 4)
    engine(x)
    engine.module.layers[0].tau = 1
    engine(x)
    assert len(engine._programs) == 2


def test_a_value_that_nobody_reads_changes_nothing() -> None:
    engine, x = zerograph.compile(Outer(), config_for(0)), torch.ones(2, 4)
    for step in range(3):
        engine.module.step = step
        engine.module.layers[0].note = f"step {step}"
        engine(x)
    assert len(engine._programs) == 1


def test_the_warning_names_the_value() -> None:
    engine, x = zerograph.compile(Outer(), config_for(0)), torch.ones(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            engine.module.layers[1].tau = 1.0 / (step + 1)
            engine(x)
    engine.module.layers[1].tau = 0.25
    with pytest.warns(ProgramWarning, match=r"layers\.1\.tau is 0\.25 \(was 0\.33"):
        engine(x)
    engine.module.layers[1].mask = torch.ones(4)
    with pytest.warns(ProgramWarning, match=r"layers\.1\.mask is another tensor"):
        engine(x)


def test_a_value_and_a_length_may_both_change() -> None:
    model = Outer()
    engine = zerograph.compile(copy.deepcopy(model), config_for(0))
    for tau in (1.0, 0.5, 1.0, 0.5):
        for length in (2, 3, 4, 5):
            for each in (engine.module, model):
                each.layers[0].tau = tau
            x = torch.ones(length, 4)
            assert torch.equal(engine(x), model(x))
    assert len(engine._programs) == 3, "the second value finds the length dynamic already"


def test_a_real_model_reads_the_same_at_every_call() -> None:
    engine = zerograph.compile(make("t5"), config_for(3))
    for step in range(3):
        engine(**batch_for("t5", step))
    assert len(engine._programs) == 1
    engine.module.config.dropout_rate = 0.5  # read when the model was built, and not since
    engine(**batch_for("t5", 9))
    assert len(engine._programs) == 1


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.steps, self.seen, self.last = 0, [0], torch.zeros(())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, what: str) -> Tensor:
        if what == "steps":
            self.steps += 1
        if what == "seen":
            self.seen.append(1)
        if what == "last":
            self.last = x.detach().sum()
        if what == "count":
            self.count.add_(1)
        return self.linear(x).sum()


@pytest.mark.parametrize("what", ["steps", "seen", "last"])
def test_a_change_in_python_is_refused_by_name(what: str) -> None:
    with pytest.raises(CaptureError, match=rf"the forward of Writes changes {what} in Python"):
        zerograph.compile(Writes(), config_for(0))(torch.ones(2, 4), what)


def test_a_buffer_changed_in_place_is_the_way_round() -> None:
    engine = zerograph.compile(Writes(), config_for(0))
    for _ in range(3):
        engine(torch.ones(2, 4), "count")
    assert engine.module.count == 3


def test_what_torch_and_transformers_note_for_themselves_is_accepted() -> None:
    """transformers' classifiers write their config, and torch's LSTM its flat weights."""
    model, batch = make("vit"), batch_for("vit", 0)
    engine = zerograph.compile(copy.deepcopy(model), config_for(0))
    expected = model(**batch).loss
    for _ in range(2):
        assert torch.equal(engine(**batch).loss, expected)
    assert len(engine._programs) == 1
    lstm, x = nn.LSTM(4, 4), torch.ones(3, 2, 4)
    recurrent: Any = zerograph.compile(copy.deepcopy(lstm), config_for(0))
    for _ in range(2):
        torch.testing.assert_close(recurrent(x)[0], lstm(x)[0])  # eager takes a fused kernel
    assert len(recurrent._programs) == 1
