"""Capture of whole models through the engine, compared with eager, in one process."""

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import zerograph
from tests.models import batch_for, loss_of, make
from zerograph.errors import CaptureError, PlanError

CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "gradient_clipping": 0.0,
}


def engine_of(model: nn.Module, **changes: Any) -> zerograph.Engine:
    return zerograph.compile(model, {**CONFIG, **changes})


def check_step(
    model: nn.Module, *args: Any, loss: Any = loss_of, **kwargs: Any
) -> zerograph.Engine:
    """One forward and backward gives eager's loss and gradients, bit for bit."""
    eager = copy.deepcopy(model)
    engine = engine_of(model)
    torch.manual_seed(7)
    expected = loss(eager(*args, **kwargs))
    expected.backward()
    torch.manual_seed(7)
    found = loss(engine(*args, **kwargs))
    engine.backward(found)
    assert torch.equal(found, expected)
    check_gradients(engine, eager)
    return engine


def check_gradients(engine: zerograph.Engine, eager: nn.Module) -> None:
    gradients = engine.gradients()
    for name, parameter in eager.named_parameters():
        if not parameter.requires_grad:
            assert name not in gradients
        elif parameter.grad is None:
            assert gradients[name] is None, name
        else:
            assert torch.equal(gradients[name], parameter.grad), name


class Net(nn.Module):
    """Two linear layers; what it returns is up to `shape`."""

    def __init__(self, shape: Any = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        self.shape = shape

    def forward(self, x: torch.Tensor, scale: float = 1.0, flag: bool = False) -> Any:
        hidden = torch.tanh(self.first(x)) * scale
        return self.shape(self.second(hidden if not flag else -hidden))


@dataclass
class Output:
    loss: torch.Tensor
    rest: dict[str, Any]


def x(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


def total(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum()


def test_positional_and_keyword_inputs() -> None:
    check_step(Net(), x(), loss=total)
    check_step(Net(), x(), 2.0, loss=total)
    check_step(Net(), x=x(), scale=0.5, loss=total)


@pytest.mark.parametrize(
    ("shape", "loss"),
    [
        (lambda y: (y.sum(), [y, {"z": y * 2}]), lambda o: o[0]),
        (lambda y: {"loss": y.sum(), "n": 3, "s": "text", "none": None}, lambda o: o["loss"]),
        (lambda y: Output(y.square().mean(), {"y": y}), lambda o: o.loss),
    ],
)
def test_nested_outputs_keep_their_types(shape: Any, loss: Any) -> None:
    check_step(Net(shape), x(), loss=loss)
    eager, engine = Net(shape), engine_of(Net(shape))
    expected, found = eager(x()), engine(x())
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert (found["n"], found["s"], found["none"]) == (3, "text", None)
    if isinstance(expected, Output):
        assert torch.equal(found.rest["y"], expected.rest["y"])


def test_a_loss_that_the_user_computes_from_outputs() -> None:
    engine = check_step(Net(), x(), loss=lambda y: nn.functional.mse_loss(y, torch.ones(3, 4)))
    assert [r.name for r in engine.plan.graph.results] == ["output"]


def test_every_output_stays_differentiable() -> None:
    """First the loss, then the logits, then both arrive: a backward of its own for each."""
    model = make("llama")
    eager, engine = copy.deepcopy(model), engine_of(model)
    batch = batch_for("llama", 0)
    for pick in (
        lambda o: o.loss,
        lambda o: o.logits.square().mean(),
        lambda o: o.loss + o.logits.square().mean(),
    ):
        eager.zero_grad()
        engine.zero_grad()
        pick(eager(**batch)).backward()
        pick(engine(**batch)).backward()
        check_gradients(engine, eager)
    assert len(engine._programs) == 1


def test_a_loss_only_step_has_no_logits_gradient() -> None:
    engine = check_step(make("llama"), **batch_for("llama", 0))
    backward = [line for line in str(engine.plan).splitlines() if line.startswith("backward(")]
    assert backward == ["backward(%d_loss: f32[])"]


def test_batchnorm_updates_its_buffers_once() -> None:
    model = make("convnet")
    eager = copy.deepcopy(model)
    engine = check_step(model, **batch_for("convnet", 0))
    eager(**batch_for("convnet", 0))
    for (name, found), expected in zip(engine.module.named_buffers(), eager.buffers()):
        assert torch.equal(found, expected), name


def test_dropout_draws_what_eager_draws() -> None:
    class Dropped(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.second(nn.functional.dropout(self.first(x), 0.5, self.training))

    check_step(Dropped(), x(), loss=total)


def test_tied_frozen_and_unused_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(8, 4)
            self.head = nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.frozen(self.embed(ids))).square().mean()

    model = Odd()
    unused = model.unused.weight.detach().clone()
    engine = check_step(model, torch.arange(6), loss=lambda y: y)
    assert engine.plan.graph.unused == ("unused.weight", "unused.bias")
    engine.step()
    state = engine.state_dict()
    assert torch.equal(state["unused.weight"], unused), "weight decay or momentum moved it"
    assert torch.equal(state["head.weight"], state["embed.weight"])


def test_several_forwards_before_one_backward() -> None:
    model = Net()
    eager, engine = copy.deepcopy(model), engine_of(model)
    total(eager(x(0)) + eager(x(1)) * 3).backward()
    total(engine(x(0)) + engine(x(1)) * 3).backward()
    check_gradients(engine, eager)
    assert len(engine._programs) == 1


def test_backward_twice_with_the_graph_retained() -> None:
    model = Net()
    eager, engine = copy.deepcopy(model), engine_of(model)
    for run in (eager, engine):
        loss = total(run(x()))
        loss.backward(retain_graph=True)
        loss.backward()
    check_gradients(engine, eager)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_no_grad_and_eval_run_a_forward_only_graph() -> None:
    model = make("llama")
    eager, engine = copy.deepcopy(model).eval(), engine_of(model).eval()
    batch = batch_for("llama", 0)
    with torch.no_grad():
        found, expected = engine(**batch), eager(**batch)
    assert torch.equal(found.loss, expected.loss)
    assert not found.loss.requires_grad
    assert "backward(" not in str(engine.plan)
    with torch.inference_mode():
        assert torch.equal(engine(**batch).logits, expected.logits)
    engine.train()
    assert engine(**batch).loss.requires_grad


def test_gradients_of_inputs() -> None:
    model = Net()
    eager = copy.deepcopy(model)
    engine = engine_of(model)
    ours, theirs = x().requires_grad_(), x().requires_grad_()
    total(engine(ours)).backward()
    total(eager(theirs)).backward()
    assert torch.equal(ours.grad, theirs.grad)
    check_gradients(engine, eager)


def test_the_values_of_inputs_that_are_no_tensors_are_part_of_the_key() -> None:
    eager, engine = Net(), engine_of(Net())
    for scale in (1.0, 2.0, 1.0):
        for flag in (False, True):
            assert torch.equal(engine(x(), scale, flag), eager(x(), scale, flag))
    assert len(engine._programs) == 4


def test_inputs_first_the_same_tensor_then_distinct() -> None:
    model = make("llama")
    eager, engine = copy.deepcopy(model), engine_of(model)
    ids, labels = batch_for("llama", 0).values()
    for ours in (ids, labels, ids):
        found, expected = engine(input_ids=ids, labels=ours), eager(input_ids=ids, labels=ours)
        assert torch.equal(found.loss, expected.loss)
    view = ids.view(ids.shape)
    assert torch.equal(engine(input_ids=ids, labels=view).loss, eager(ids, labels=ids).loss)


def test_flags_shapes_and_modes_are_part_of_the_key() -> None:
    model = Net()
    eager, engine = copy.deepcopy(model), engine_of(model)

    def both() -> int:
        assert torch.equal(engine(x()), eager(x()))
        return len(engine._programs)

    assert both() == 1
    engine.module.first.eval()
    assert both() == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert both() == 3
    engine.module.first.train()
    with torch.no_grad():
        assert both() == 4
    assert both() == 4
    for p in (engine.module.first.weight, eager.first.weight):
        p.requires_grad_(False)
    assert both() == 5
    assert torch.equal(engine(x()[:2]), eager(x()[:2]))
    strided = x().t().contiguous().t()
    assert torch.equal(engine(strided), eager(strided))
    assert len(engine._programs) == 7


def test_an_output_that_is_a_parameters_view_is_copied() -> None:
    class Shows(Net):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return self.second(self.first(x)), self.first.weight.t()

    model = Shows()
    eager = copy.deepcopy(model)
    engine = engine_of(model)
    y, view = engine(x())
    assert torch.equal(view, eager.first.weight.t())
    (total(y) + total(view)).backward()
    other, seen = eager(x())
    (total(other) + total(seen)).backward()
    check_gradients(engine, eager)
    engine.step()
    assert torch.equal(view, seen), "the step must not change what the forward returned"


def test_an_output_that_is_an_input_is_that_input() -> None:
    class Passes(Net):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return self.second(self.first(x)), x

    given = x()
    y, same = engine_of(Passes())(given)
    assert same is given
    assert y.requires_grad


def test_an_input_that_the_forward_changes() -> None:
    class Counts(Net):
        def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            count.add_(1)
            return self.second(self.first(x * count))

    count = torch.ones(())
    engine = engine_of(Counts())
    engine(x(), count)
    engine(x(), count)
    assert count.item() == 3


def test_a_buffer_that_is_assigned_anew_is_an_error() -> None:
    class Assigns(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            self.scale = self.scale * 0.5
            return self.second(self.first(x)) * self.scale

    with pytest.raises(CaptureError, match="assigns a new tensor to a buffer"):
        engine_of(Assigns())(x())


def test_a_data_dependent_branch_shows_the_users_line() -> None:
    class Branches(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            hidden = self.first(x)
            if hidden.sum() > 0:  # the user's own line
                hidden = -hidden
            return self.second(hidden)

    with pytest.raises(CaptureError) as caught:
        engine_of(Branches())(x())
    assert "if hidden.sum() > 0:  # the user's own line" in str(caught.value)
    assert "test_capture.py" in str(caught.value)
    assert "change:" in str(caught.value)


def _selected(x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0] > 0]  # the user's own line


def _scattered(x: torch.Tensor) -> torch.Tensor:
    rows = torch.where(x[:, 0] > 0)  # the user's own line
    return torch.zeros_like(x).index_add_(0, rows[0], x[rows[0]])


def _counted(x: torch.Tensor) -> torch.Tensor:
    return x / (x > 0).sum().item()  # the user's own line


def _drawn(x: torch.Tensor) -> torch.Tensor:
    return x * random.random()  # the user's own line


def _penalised(x: torch.Tensor) -> torch.Tensor:
    (slope,) = torch.autograd.grad(x.sum(), x, create_graph=True)  # the user's own line
    return slope


def _packed(x: torch.Tensor) -> torch.Tensor:
    lengths = torch.tensor([2, 1])
    return nn.utils.rnn.pack_padded_sequence(x[None], lengths[:1], True).data  # the user's own line


@pytest.mark.parametrize(
    ("step", "what", "change"),
    [
        (_penalised, "", "compute the loss alone; gradients are not differentiated again"),
        (_packed, "", "give the recurrent layer the padded batch"),
        (_selected, "a size depends on the values of a tensor", "multiply by a mask"),
        (_scattered, "a size depends on the values of a tensor", "multiply by a mask"),
        (_counted, "a Python number is made of a tensor's value", "keep it a tensor"),
        (_drawn, "", "draw with torch"),
    ],
)
def test_what_depends_on_values_shows_the_users_line(
    step: Callable[[torch.Tensor], torch.Tensor], what: str, change: str
) -> None:
    class Depends(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.second(step(self.first(x)))

    with pytest.raises(CaptureError) as caught:
        engine_of(Depends())(x())
    said = str(caught.value)
    assert "# the user's own line" in said and "test_capture.py" in said
    assert what in said and f"change: {change}" in said


def test_a_batch_norm_without_momentum_says_what_to_give() -> None:
    class Norm(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8, momentum=None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.second(self.norm(self.first(x)))

    with pytest.raises(CaptureError, match=r"change: .*a `momentum` that is a number"):
        engine_of(Norm())(x())


def test_parameters_that_cannot_be_trained_are_named() -> None:
    class Complex(Net):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    with pytest.raises(PlanError, match=r"phase is complex64.*torch\.view_as_real\(phase\)"):
        engine_of(Complex())

    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, 16, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.second(self.first(x) + self.table(x.argmax(1)))

    with pytest.raises(CaptureError, match=r"gradient of table\.weight is sparse.*sparse=False"):
        engine_of(Sparse())(x())


def test_a_warning_in_the_forward_is_no_obstacle() -> None:
    class Warns(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            warnings.warn("deprecated", stacklevel=1)
            return self.second(self.first(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_step(Warns(), x(), loss=total)


def test_a_graph_break_shows_the_users_line() -> None:
    class Breaks(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            hidden = self.first(x)
            torch._dynamo.graph_break()
            return self.second(hidden)

    with pytest.raises(CaptureError, match=r"torch\._dynamo\.graph_break\(\)"):
        engine_of(Breaks())(x())


def test_an_exception_in_the_forward_leaves_the_engine_usable(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Refuses(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            if x.shape[0] == 2:
                raise ValueError("two rows are not enough")
            return self.second(self.first(x))

    model = Refuses()
    eager, engine = copy.deepcopy(model), engine_of(model)
    with pytest.raises(ValueError, match="two rows are not enough"):
        engine(x()[:2])
    with pytest.raises(RuntimeError, match="reduction dim"):
        engine(torch.ones(3, 9))
    assert capfd.readouterr().err == "", "what is raised is not logged as well"
    total(engine(x())).backward()
    total(eager(x())).backward()
    check_gradients(engine, eager)
    assert [tuple(p.shape) for p in engine.module.parameters()] == [
        tuple(p.shape) for p in eager.parameters()
    ]


def test_a_parameter_frozen_or_thawed_after_compile_is_captured_again() -> None:
    model = Net()
    model.first.requires_grad_(False)
    engine = engine_of(model)
    total(engine(x())).backward()
    engine.zero_grad()
    model.second.bias.requires_grad_(False)
    total(engine(x())).backward()
    assert engine.gradients()["second.bias"] is None
    engine.zero_grad()
    model.first.requires_grad_(True)
    total(engine(x())).backward()
    assert engine.gradients()["first.bias"] is not None


def test_a_trainable_parameter_that_gets_no_gradient_is_an_error() -> None:
    class Silent(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            with torch.no_grad():
                hidden = self.first(x)
            return self.second(hidden)

    with pytest.raises(CaptureError, match=r"first\.weight .*requires_grad_\(False\)"):
        engine_of(Silent())(x())


def test_a_mapping_that_cannot_be_captured_says_how_to_pass_it() -> None:
    from transformers import BatchEncoding

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, batch: Any) -> torch.Tensor:
            return self.linear(batch["x"]).sum()

    engine, batch = engine_of(Takes()), BatchEncoding({"x": torch.ones(2, 4)})
    with pytest.raises(CaptureError, match=r"engine\(\*\*batch\), or engine\(dict\(batch\)\)"):
        engine(batch)
    engine(dict(batch))


def test_two_engines_do_not_disturb_each_other() -> None:
    models = [Net(), make("convnet")]
    eager = [copy.deepcopy(m) for m in models]
    engines = [engine_of(m) for m in models]
    batch = batch_for("convnet", 0)
    total(engines[0](x())).backward()
    engines[1](**batch)["loss"].backward()
    total(eager[0](x())).backward()
    eager[1](**batch)["loss"].backward()
    for engine, reference in zip(engines, eager):
        check_gradients(engine, reference)
    engines[0].step()
    check_gradients(engines[1], eager[1])


def test_a_retained_output_does_not_keep_the_activations() -> None:
    """After the backward, an output alone is alive; no cycle holds what was saved."""
    import gc
    import weakref

    engine = engine_of(Net())
    gc.collect()
    gc.disable()
    try:
        y = engine(x())
        node = weakref.ref(y.grad_fn)
        total(y).backward()
        del y
        assert node() is None
    finally:
        gc.enable()


def test_the_engines_plan_is_byte_for_byte_the_plan_without_ranks() -> None:
    batch = batch_for("llama", 0)
    planned = zerograph.plan(make("llama"), CONFIG, example_inputs=batch)
    engine = engine_of(make("llama"))
    engine(**batch)
    assert str(engine.plan) == str(planned)
    assert engine.plan.history.texts() == planned.history.texts()


def test_the_models_own_storage_is_freed_bucket_by_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a bucket has its place, the storages of its parameters and all before it are gone."""
    import weakref

    from zerograph.layout import Bucket
    from zerograph.runtime.state import State

    model = make("llama")
    storages = {n: weakref.ref(p.untyped_storage()) for n, p in model.named_parameters()}
    store, gone = State.store, []

    def watched(self: State, bucket: Bucket, *rest: Any) -> Any:
        gone.extend(bucket.params)
        assert all(storages[name]() is None for name in gone)
        assert sum(ref() is not None for ref in storages.values()) == len(storages) - len(gone)
        return store(self, bucket, *rest)

    monkeypatch.setattr(State, "store", watched)
    engine_of(model)
    assert len(gone) == len(storages)


def test_destroy_leaves_nothing_on_the_model() -> None:
    model = Net()
    before = set(vars(model))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    engine = engine_of(model)
    total(engine(x())).backward()
    restored = engine.destroy()
    assert restored is model
    assert set(vars(model)) == before
    assert all(not vars(parameter) for parameter in model.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    total(model(x())).backward()
    assert total(engine_of(model)(x())).requires_grad


def test_create_graph_is_refused() -> None:
    engine = engine_of(Net())
    loss = total(engine(x()))
    with pytest.raises(ValueError, match="create_graph"):
        loss.backward(create_graph=True)


def test_backward_of_something_else_is_refused() -> None:
    engine = engine_of(Net())
    with pytest.raises(PlanError, match=r"scalar loss.*shape \[3, 4\]"):
        engine.backward(engine(x()))
    with torch.no_grad():
        loss = total(engine(x()))
    with pytest.raises(PlanError, match=r"outside torch\.no_grad"):
        engine.backward(loss)


def test_channels_last_weights_keep_their_strides() -> None:
    model = make("convnet").to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    engine = check_step(model, **batch_for("convnet", 0))
    restored = engine.destroy()
    assert [p.stride() for p in restored.parameters()] == strides
