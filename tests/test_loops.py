"""Training loops as people write them, beside the same loop in eager torch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zerograph
from tests import tiny
from tests.models import batch_for, loss_of, make
from tests.oracle import config_for, differing
from tests.ranks import run_ranks
from zerograph.compat import FakeTensorMode
from zerograph.errors import PlanError, ZerographError
from zerograph.precision import Precision
from zerograph.runtime.place import place

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}

pytestmark = pytest.mark.usefixtures("torchs_bits")


def config(stage: int = 3, **more: Any) -> dict[str, Any]:
    return {**config_for(stage), "optimizer": ADAMW, **more}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)


def pair(build: Callable[[], nn.Module], stage: int = 3) -> tuple[zerograph.Engine, nn.Module]:
    """An engine, and the same model for the same loop in eager."""
    torch.manual_seed(0)
    model = build()
    return zerograph.compile(copy.deepcopy(model), config(stage)), model


def blocks() -> nn.Module:
    return tiny.Blocks(dropout=0.0)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(count: int) -> list[dict[str, Tensor]]:
    return [{"x": noise(i, 4, 8), "target": noise(100 + i, 4, 8)} for i in range(count)]


def same(engine: zerograph.Engine, model: nn.Module) -> None:
    assert not differing(engine.state_dict(), model.state_dict())


# Evaluation


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps_and_within_an_accumulation(mode: Any) -> None:
    torch.manual_seed(0)
    model = blocks()
    accumulate = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    engine = zerograph.compile(copy.deepcopy(model), config(2, **accumulate))
    optimizer = adamw(model)
    for step, batch in enumerate(batches(6)):
        engine.backward(engine(**batch)["loss"])
        engine.eval()
        with mode():
            found = engine(**batches(1)[0])["loss"]
            assert not found.requires_grad
            assert torch.equal(found, model(**batches(1)[0])["loss"])
        engine.train()
        engine.step()
        (model(**batch)["loss"] / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    same(engine, model)


def test_outputs_of_no_grad_may_be_used_in_training() -> None:
    engine, model = pair(blocks)
    with torch.no_grad():
        target = engine(**batches(1)[0])["logits"]
    batch = {**batches(2)[1], "target": target}
    engine.backward(engine(**batch)["loss"])
    model(**batch)["loss"].backward()
    found = engine.gradients()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(found[name], parameter.grad)


# Losses


def test_losses_that_the_user_combined() -> None:
    engine, model = pair(blocks)
    optimizer = adamw(model)

    def loss_of_outputs(output: dict[str, Tensor], step: int) -> Tensor:
        return output["loss"] * (0.5 + step) + output["logits"].abs().mean() + output["loss"] ** 2

    for step, batch in enumerate(batches(3)):
        loss = engine.backward(loss_of_outputs(engine(**batch), step))
        engine.step()
        expected = loss_of_outputs(model(**batch), step)
        assert torch.equal(loss, expected)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
    same(engine, model)


def test_several_backwards_through_one_forward() -> None:
    engine, model = pair(blocks)
    batch = batches(1)[0]
    for run in (engine, model):
        output = run(**batch)
        output["loss"].backward(retain_graph=True)
        output["logits"].square().sum().backward()
    found = engine.gradients()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_gradients_of_inputs() -> None:
    engine, model = pair(blocks)
    one, two = (noise(5, 4, 8).requires_grad_() for _ in range(2))
    target = noise(6, 4, 8)
    engine.backward(engine(one, target)["loss"])
    model(two, target)["loss"].backward()
    assert torch.equal(one.grad, two.grad)
    (direct,) = torch.autograd.grad(engine(one, target)["loss"], one)
    assert torch.equal(direct, two.grad)


def test_anomaly_detection_changes_nothing() -> None:
    engine, model = pair(blocks)
    batch = batches(1)[0]
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        engine.backward(engine(**batch)["loss"])
    model(**batch)["loss"].backward()
    assert torch.equal(engine.gradients()["head.weight"], model.head.weight.grad)


# Several engines


def test_a_frozen_teacher() -> None:
    """The student's loss reads what a teacher makes: an engine without an optimizer, and a module."""
    torch.manual_seed(1)
    teacher = blocks()
    without = {k: v for k, v in config().items() if k != "optimizer"}
    compiled = zerograph.compile(copy.deepcopy(teacher), without)
    engine, model = pair(blocks)
    optimizer = adamw(model)
    for batch in batches(3):
        with torch.no_grad():
            wanted, expected = compiled(**batch)["logits"], teacher(**batch)["logits"]
        assert torch.equal(wanted, expected)
        for run in (engine, model):
            output = run(**batch)
            loss = output["loss"] + F.mse_loss(output["logits"], expected)
            loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    same(engine, model)
    with pytest.raises(PlanError, match=r"engine\.step\(\) needs an optimizer"):
        compiled.step()


class Net(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(into, 16), nn.Linear(16, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.leaky_relu(self.first(x), 0.2))


def _gan(rank: int, world: int, stage: int) -> None:
    """Generator and discriminator in turn; both loops see the same noise on every rank."""
    generator, one = pair(lambda: Net(4, 8), stage)
    critic, other = pair(lambda: Net(8, 1), stage)
    optimizers = adamw(one), adamw(other)
    for step in range(3):
        real, z = noise(step, 6, 8), noise(50 + step, 6, 4)
        with torch.no_grad():
            fake, copied = generator(z), one(z)
        critic.backward(F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean())
        critic.step()
        (F.softplus(-other(real)).mean() + F.softplus(other(copied)).mean()).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

        generator.backward(F.softplus(-critic(generator(z))).mean())
        critic.zero_grad()
        generator.step()
        F.softplus(-other(one(z))).mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        optimizers[1].zero_grad()
    same(generator, one)
    same(critic, other)


@pytest.mark.parametrize("stage", [1, 3])
def test_generator_and_discriminator_in_turn(stage: int) -> None:
    run_ranks(2, _gan, stage)


def test_an_exponential_average_of_gathered_weights() -> None:
    engine, model = pair(blocks)
    optimizer, average = adamw(model), copy.deepcopy(model)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for batch in batches(3):
        engine.backward(engine(**batch)["loss"])
        engine.step()
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), zerograph.gathered(engine):
            for name, parameter in engine.module.named_parameters():
                kept[name].lerp_(parameter, 0.1)
            for own, parameter in zip(average.parameters(), model.parameters()):
                own.lerp_(parameter, 0.1)
    assert not differing(kept, dict(average.named_parameters()))
    same(engine, model)


# Freezing


def phases(model: nn.Module, names: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))


def _phases(rank: int, world: int, stage: int) -> None:
    """The head alone, then all, then the blocks alone, then all: with AdamW's states kept."""
    torch.manual_seed(0)
    model = blocks()
    phases(model, ("head",))
    engine = zerograph.compile(copy.deepcopy(model), config(stage))
    optimizer = adamw(model)
    for trained in (("head",), ("head", "blocks"), ("blocks",), ("inlet", "blocks", "head")):
        phases(model, trained)
        phases(engine.module, trained)
        for batch in batches(2):
            engine.backward(engine(**batch)["loss"])
            engine.step()
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        same(engine, model)


@pytest.mark.parametrize("stage", range(4))
def test_parameters_frozen_and_unfrozen_between_phases(stage: int) -> None:
    run_ranks(2, _phases, stage)


def test_bf16_masters_move_with_an_unfrozen_parameter() -> None:
    torch.manual_seed(0)
    model = blocks()
    phases(model, ("head",))
    engine = zerograph.compile(model, config(3, bf16={"enabled": True}))
    engine.backward(engine(**batches(1)[0])["loss"])
    engine.step()
    before = engine.state_dict()
    master = engine.state.storages[engine.state.layout.params["head.weight"].bucket].master.clone()
    phases(engine.module, ("head", "blocks"))
    engine(**batches(1)[0])
    now = engine.state.storages[engine.state.layout.params["head.weight"].bucket].master
    assert torch.equal(now, master)
    assert not differing(engine.state_dict(), before)


# Gathered weights


def test_gathered_within_gathered() -> None:
    """The inner block leaves to the outer one what that shows; each keeps its changes."""
    engine, model = pair(blocks)
    head, first = engine.module.head, engine.module.blocks[0].linear
    with zerograph.gathered(engine), torch.no_grad():
        with zerograph.gathered(head.weight):
            head.weight.add_(1.0)
        assert not head.weight.isnan().any(), "the inner block took the value away"
        first.weight.mul_(2.0)
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model.blocks[0].linear.weight.mul_(2.0)
    same(engine, model)
    with zerograph.gathered(head.bias), torch.no_grad():  # of one bucket with head.weight
        with zerograph.gathered(head.weight):
            head.weight.add_(1.0)
        head.bias.add_(1.0)
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model.head.bias.add_(1.0)
    same(engine, model)


def _modified_within(rank: int, world: int) -> dict[str, Any]:
    engine, _ = pair(blocks)
    weight = engine.module.head.weight
    with zerograph.gathered(engine), zerograph.gathered(weight, modifier_rank=1), torch.no_grad():
        weight.fill_(float(rank))
    return engine.state_dict()


def test_an_inner_block_may_take_one_ranks_values() -> None:
    for state in run_ranks(2, _modified_within):
        assert (state["head.weight"] == 1.0).all()


def test_a_block_that_raises_changes_nothing() -> None:
    engine, model = pair(blocks)
    with pytest.raises(ZeroDivisionError), zerograph.gathered(engine), torch.no_grad():
        engine.module.head.weight.fill_(9.0)
        raise ZeroDivisionError
    assert engine.module.head.weight.isnan().all()
    same(engine, model)
    with pytest.raises(PlanError, match="must keep"), zerograph.gathered(engine):
        engine.module.head.weight.data = torch.ones(3)
    assert engine.module.head.weight.shape == (8, 8)
    same(engine, model)


def test_what_would_be_undone_is_refused_within_gathered() -> None:
    engine, _ = pair(blocks)
    engine.backward(engine(**batches(1)[0])["loss"])
    state = engine.state_dict()
    with zerograph.gathered(engine):
        for what in (engine.step, engine.destroy, lambda: engine.load_state_dict(state)):
            with pytest.raises(PlanError, match=r"within zerograph\.gathered; leave the `with`"):
                what()
    engine.step()
    assert differing(engine.state_dict(), state)


# Order


def test_a_backward_after_the_parameters_changed_is_refused() -> None:
    engine, _ = pair(blocks)
    early, late = (engine(**batch)["loss"] for batch in batches(2))
    engine.backward(early)
    engine.step()
    with pytest.raises(PlanError, match=r"changed .* between this forward and its backward"):
        engine.backward(late)
    late = engine(**batches(1)[0])["loss"]
    with zerograph.gathered(engine):
        engine.module.head.weight.norm()  # looking changes nothing
    engine.backward(late)
    late = engine(**batches(1)[0])["loss"]
    with zerograph.gathered(engine), torch.no_grad():
        engine.module.head.weight.mul_(2.0)
    with pytest.raises(PlanError, match=r"changed .* between this forward and its backward"):
        engine.backward(late)


def test_unfreezing_between_a_forward_and_its_backward() -> None:
    torch.manual_seed(0)
    model = blocks()
    phases(model, ("head",))
    engine = zerograph.compile(model, config())
    loss = engine(**batches(1)[0])["loss"]
    phases(model, ("head", "blocks"))
    with pytest.raises(PlanError, match="was unfrozen between a forward and its backward"):
        engine(**batches(1)[0])
    engine.backward(loss)
    engine.step()
    engine(**batches(1)[0])


def test_unfreezing_what_was_given_to_no_group() -> None:
    torch.manual_seed(0)
    model = blocks()
    phases(model, ("head",))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engine = zerograph.compile(model, config_for(0), optimizer=optimizer)
    phases(model, ("head", "blocks"))
    for _ in range(2):
        with pytest.raises(
            PlanError, match=r"blocks\.0\.norm\.weight was unfrozen and is in no par"
        ):
            engine(**batches(1)[0])
    phases(model, ("head",))
    engine(**batches(1)[0])


def test_states_saved_after_unfreezing_load_by_parameter() -> None:
    """The group's order is the layout's, whenever a parameter joined it."""
    torch.manual_seed(0)
    model = blocks()
    phases(model, ("head", "blocks.1"))
    engine = zerograph.compile(model, config(0))
    for trained in (("head", "blocks.1"), ("head", "blocks")):
        phases(model, trained)
        engine.backward(engine(**batches(1)[0])["loss"])
        engine.step()
    values, states = engine.state_dict(), engine.optimizer.state_dict()
    torch.manual_seed(1)
    other = blocks()
    phases(other, ("head", "blocks"))
    resumed = zerograph.compile(other, config(0))
    resumed.load_state_dict(values)
    resumed.optimizer.load_state_dict(states)
    for each in (engine, resumed):
        each.backward(each(**batches(2)[1])["loss"])
        each.step()
    assert not differing(engine.state_dict(), resumed.state_dict())


# Ownership


def test_a_part_of_a_compiled_model_belongs_to_its_engine() -> None:
    model = blocks()
    engine = zerograph.compile(model, config())
    for other in (model, model.head, nn.Sequential(model)):
        with pytest.raises(PlanError, match=r"belongs to an engine already \(of Blocks\)"):
            zerograph.compile(other, config())
    engine.destroy()
    zerograph.compile(nn.Sequential(model), config())


def test_a_copy_of_a_compiled_model_belongs_to_nobody(tmp_path: Path) -> None:
    engine, model = pair(blocks)
    with zerograph.gathered(engine):
        copied = copy.deepcopy(engine.module)
        torch.save(engine.module, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (copied, loaded):
        same(zerograph.compile(each, config()), model)
    assert (tmp_path / "model.pt").stat().st_size < 100_000, "the engine's state was saved as well"


def test_what_would_have_no_values_is_an_error_with_the_way(tmp_path: Path) -> None:
    engine, model = pair(blocks)
    owned, batch = engine.module, batches(1)[0]
    engine(**batch)
    uses: dict[str, Callable[[], Any]] = {
        r"call the engine, or the model within zerograph\.gathered": lambda: owned(**batch),
        r"take engine\.state_dict\(\)": owned.state_dict,
        r"copy it within zerograph\.gathered": lambda: copy.deepcopy(owned),
        r"save engine\.state_dict\(\)": lambda: torch.save(owned, tmp_path / "model.pt"),
    }
    for way, use in uses.items():
        with pytest.raises(PlanError, match=rf"would have no values.*{way}"):
            use()
        with zerograph.gathered(engine):
            use()
    with pytest.raises(PlanError, match="this state dict would have no values"):
        owned.head.state_dict()
    with zerograph.gathered(owned.head.parameters()):
        assert torch.equal(owned.head.state_dict()["weight"], model.head.weight)
    engine.destroy()
    for use in uses.values():
        use()


def test_after_destroy_nothing_but_destroying_is_left() -> None:
    engine, _ = pair(blocks)
    engine.destroy()
    for use in (engine.gradients, engine.state_dict, engine.destroy, engine.step):
        with pytest.raises(PlanError, match="destroyed"):
            use()
    with pytest.raises(PlanError, match="destroyed"), zerograph.gathered(engine):
        pass


# Misuse


def test_backward_twice() -> None:
    engine, _ = pair(blocks)
    loss = engine(**batches(1)[0])["loss"]
    engine.backward(loss)
    with pytest.raises(PlanError, match="backward a second time through the same forward"):
        engine.backward(loss)


def test_step_before_backward() -> None:
    engine, _ = pair(blocks)
    with pytest.raises(PlanError, match="before any forward with gradients"):
        engine.step()
    engine(**batches(1)[0])
    with pytest.raises(PlanError, match="before any backward since the last update"):
        engine.step()


def test_a_loss_that_needs_no_gradient() -> None:
    engine, _ = pair(blocks)
    with torch.no_grad():
        loss = engine(**batches(1)[0])["loss"]
    with pytest.raises(PlanError, match=r"scalar loss that requires grad, got shape \[\]"):
        engine.backward(loss)
    with pytest.raises(PlanError, match=r"scalar loss that requires grad, got shape \[4, 8\]"):
        engine.backward(engine(**batches(1)[0])["logits"])
    with pytest.raises(PlanError, match="got float"):
        engine.backward(1.0)  # type: ignore[arg-type]
    frozen = zerograph.compile(blocks().requires_grad_(False), config())
    with pytest.raises(PlanError, match="no parameter of the model is trainable"):
        frozen.backward(frozen(**batches(1)[0])["loss"])


def test_a_batch_without_values() -> None:
    engine, _ = pair(blocks)
    batch = {k: v.to("meta") for k, v in batches(1)[0].items()}
    with pytest.raises(PlanError, match=r"input x of shape \[4, 8\] is on meta, which has no val"):
        engine(**batch)


def test_a_batch_on_another_device() -> None:
    with FakeTensorMode():  # a tensor of a device that this machine need not have
        elsewhere = torch.empty(4, 8, device="cuda:1")
    policy = Precision(None, frozenset())
    for home in ("cpu", "cuda:0"):
        with pytest.raises(
            PlanError, match=rf"x of shape \[4, 8\] is on cuda:1.* on {home}; move the"
        ):
            place([("1.x", elsewhere)], torch.device(home), policy)


def test_a_second_derivative() -> None:
    engine, _ = pair(blocks)
    loss = engine(**batches(1)[0])["loss"]
    with pytest.raises(ZerographError, match=r"create_graph=True\) is not supported"):
        loss.backward(create_graph=True)


def test_a_step_ends_one_micro_batch_and_needs_a_backward() -> None:
    accumulate = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    engine = zerograph.compile(blocks(), config(2, **accumulate))
    batch = batches(1)[0]
    for _ in range(2):
        engine.backward(engine(**batch)["loss"])
        engine.step()
    assert engine.global_steps == 1
    engine(**batch)
    missing = r"engine\.step\(\) without a backward since the last one.*2 of them are an update"
    with pytest.raises(PlanError, match=missing):
        engine.step()
    engine.backward(engine(**batch)["loss"])
    engine.step()
    assert engine.micro_steps == 3, "what was refused is not counted"
    with pytest.raises(PlanError, match="before any backward"):
        engine.zero_grad()
        engine.step()


def test_more_backwards_than_steps_are_told_of_once(logged: list[str]) -> None:
    """As with a loop that calls step at the boundary alone: the config's accumulation counts calls of it."""
    accumulate = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    engine = zerograph.compile(blocks(), config(2, **accumulate))
    for batch in batches(8):
        engine.backward(engine(**batch)["loss"])
        if engine.is_gradient_accumulation_boundary():
            engine.step()
            continue
        engine.backward(engine(**batch)["loss"])
        engine.step()
    (said,) = [message for message in logged if "backwards since" in message]
    assert said.startswith("3 backwards since the last update, each weighed 1/2")


def test_freezing_in_the_middle_of_an_accumulation() -> None:
    torch.manual_seed(0)
    accumulate = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    engine = zerograph.compile(blocks(), config(3, **accumulate))
    engine.backward(engine(**batches(1)[0])["loss"])
    engine.step()
    phases(engine.module, ("head",))
    with pytest.raises(
        PlanError, match=r"blocks\.0\.norm\.weight was frozen in the middle of an acc"
    ):
        engine(**batches(1)[0])
    engine.zero_grad()
    engine(**batches(1)[0])


def test_a_parameter_that_was_replaced() -> None:
    engine, _ = pair(blocks)
    engine(**batches(1)[0])
    engine.module.head.weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(PlanError, match=r"parameter head\.weight .* another tensor than when"):
        engine(**batches(1)[0])


def test_a_parameter_that_was_added() -> None:
    engine, _ = pair(blocks)
    engine.module.extra = nn.Parameter(torch.ones(8))
    with pytest.raises(PlanError, match="parameter extra was added"):
        engine(**batches(1)[0])


def test_many_kinds_of_step_of_a_real_model() -> None:
    """Training, evaluation and scoring in turn on one Llama."""
    engine = zerograph.compile(make("llama"), config_for(3))
    model = make("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    optimizer.param_groups[0].update(
        engine.optimizer.param_groups[0], params=list(model.parameters())
    )
    for step in range(3):
        batch = batch_for("llama", step)
        engine.backward(loss_of(engine(**batch)))
        engine.step()
        loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            scores = engine(input_ids=batch["input_ids"]).logits
            assert torch.equal(scores, model(input_ids=batch["input_ids"]).logits)
    same(engine, model)
