"""What a forward reads and changes in Python: compared at every call, or refused."""

import copy
import enum
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
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


class Kind(enum.Enum):
    ONE = 1


class Gain:
    """An object that is called, with a value of its class."""

    amount = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.amount


class Double(Gain):
    def __call__(self, x: Tensor) -> Tensor:
        return x * 2


class Asks(nn.Module):
    """Reads what is there or not, keys that are no plain strings, and values of classes."""

    amount = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.options: dict[Any, float] = {Kind.ONE: 1.0, (0, 1): 1.0, "it's": 1.0}
        self.flags = {"a"}
        self.gain = Gain()
        self.array = np.ones(4, np.float32)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.options[Kind.ONE] * self.options[0, 1] * self.options["it's"] * self.amount
        factor *= 3.0 if "x" in self.options else 1.0
        factor *= self.options.get("y", 1.0) * getattr(self, "other", 1.0)
        factor *= (3.0 if "x" in self.flags else 1.0) * (2.0 if hasattr(self, "some") else 1.0)
        return (self.gain(self.linear(x)) * factor * torch.from_numpy(self.array)).sum()


ANSWERS: dict[str, Callable[[Asks], Any]] = {
    "enum key": lambda m: m.options.update({Kind.ONE: 2.0}),
    "tuple key": lambda m: m.options.update({(0, 1): 2.0}),
    "quoted key": lambda m: m.options.update({"it's": 2.0}),
    "key of a dict": lambda m: m.options.update({"x": 1.0}),
    "dict.get": lambda m: m.options.update({"y": 2.0}),
    "key of a set": lambda m: m.flags.add("x"),
    "hasattr": lambda m: setattr(m, "some", 1),
    "getattr": lambda m: setattr(m, "other", 2.0),
    "shadowed": lambda m: setattr(m, "amount", 2.0),
    "class": lambda m: setattr(type(m.gain), "amount", 3.0),
    "callable": lambda m: setattr(m, "gain", Double()),
    "array": lambda m: setattr(m, "array", np.full(4, 2, np.float32)),
    "forward of a module": lambda m: setattr(m.linear, "forward", lambda x: x + 1),
    "hook of the model": lambda m: m.register_forward_hook(lambda m, args, out: out * 2),
    "forward": lambda m: setattr(m, "forward", lambda x: m.linear(x).square().sum()),
}


@pytest.mark.filterwarnings("ignore:program")
def test_what_is_asked_of_values_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each change, one on top of the other, the engine answers as the model does."""
    monkeypatch.setattr(Gain, "amount", 1.0)
    torch.manual_seed(0)
    model = Asks()
    eager, x = copy.deepcopy(model), torch.ones(2, 4)
    engine = zerograph.compile(model, config_for(3))
    before = engine(x)
    for what, change in ANSWERS.items():
        change(model)
        if what != "class":
            change(eager)
        found = engine(x)
        assert torch.equal(found, eager(x)), what
        assert not torch.equal(found, before), what
        before = found


class Gives(nn.Module):
    """Changes what it was given, in the caller's eyes or in its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen = [torch.zeros(4)]

    def forward(self, batch: dict[str, Any], what: str, **more: Any) -> Any:
        hidden = self.linear(batch["x"])
        if what == "item":
            batch["hidden"] = hidden
        elif what == "popped":
            batch.pop("x")
        elif what == "returned":
            batch["hidden"] = hidden
            return batch
        elif what == "tensor":
            self.seen[0].add_(1)
        elif what == "own":
            hidden = hidden * more.pop("scale")
        return hidden.sum()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("item", "changes its argument batch"),
        ("popped", "changes its argument batch"),
        ("returned", "in a container that it was given and changed"),
        ("tensor", "that is no buffer of its module.*register_buffer"),
    ],
)
def test_a_changed_argument_or_tensor_is_refused(what: str, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        zerograph.compile(Gives(), config_for(0))({"x": torch.ones(2, 4)}, what)


def test_further_keyword_arguments_may_be_taken_out() -> None:
    model, batch = Gives(), {"x": torch.ones(2, 4)}
    expected = model(batch, "own", scale=2.0)
    assert torch.equal(zerograph.compile(model, config_for(0))(batch, "own", scale=2.0), expected)


def test_an_assertion_on_values_is_kept() -> None:
    class Asserts(Outer):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert_async(x.min() > 0, "not positive")  # what dynamo makes of `assert`
            return super().forward(x)

    engine = zerograph.compile(Asserts(), config_for(3))
    engine.backward(engine(torch.ones(2, 4)))
    with pytest.raises(RuntimeError, match="not positive"):
        engine(-torch.ones(2, 4))


class Counts(nn.Module):
    """Buffers that are assigned what changed them in place: by `+=`, and by `out=` in spectral_norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("steps", torch.zeros(()))
        self.steps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return (self.linear(x) * self.steps).square().sum()


def test_a_buffer_that_is_assigned_itself() -> None:
    model = Counts()
    eager, engine, x = (
        copy.deepcopy(model),
        zerograph.compile(model, config_for(3)),
        torch.ones(2, 4),
    )
    for _ in range(3):
        expected, found = eager(x), engine(x)
        assert torch.equal(found, expected)
    found.backward()
    expected.backward()
    for name, parameter in eager.named_parameters():
        assert torch.equal(engine.gradients()[name], parameter.grad)  # type: ignore[arg-type]
    state = engine.state_dict()
    assert all(torch.equal(state[name], buffer) for name, buffer in eager.named_buffers())
    assert state["steps"] == 3


class Named(nn.Module):
    """Python values that are called nearly as what the engine looks after itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.share_parameters, self.num_buffers, self.options = True, 2, {"training": 1}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x) * self.num_buffers * self.options["training"]
        return (hidden + 1 if self.share_parameters else hidden).sum()


def test_values_called_like_parameters_and_modes_are_compared() -> None:
    model = Named()
    engine, x = zerograph.compile(model, config_for(3)), torch.ones(2, 4)
    before = engine(x)
    model.num_buffers = 4
    assert not torch.equal(engine(x), before)
    model.num_buffers, model.share_parameters = 2, False
    assert torch.allclose(engine(x), before - x.shape[0] * 4)
    model.share_parameters, model.options["training"] = True, 2
    assert not torch.equal(engine(x), before)


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
