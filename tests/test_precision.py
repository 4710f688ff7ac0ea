"""fp16 and bf16 steps: loss scale, skipped steps, and how gradients are sent, kept and averaged."""

import copy
import math
from itertools import product
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
from tests.traces import captured_once
from zerograph.config import load_config
from zerograph.errors import LossScaleError, PlanError
from zerograph.runtime.deferred import Deferred
from zerograph.runtime.loss_scale import LossScaler, scaler_of

FP16 = {"fp16": {"enabled": True}}


# The scale


def scaler(**fp16: Any) -> LossScaler:
    made = scaler_of(load_config({"fp16": {"enabled": True, **fp16}}))
    assert made is not None
    return made


def scales(made: LossScaler, steps: str) -> list[float]:
    """The scale after each step; `.` is a good one and `x` an overflow."""
    found = []
    for step in steps:
        made.update(step == ".")
        found.append(made.scale)
    return found


def test_hysteresis_is_the_number_of_overflows_that_lower_the_scale() -> None:
    assert scales(scaler(initial_scale_power=4), "xxx") == [16, 8, 4]
    assert scales(scaler(initial_scale_power=4, hysteresis=1), "xxx") == [8, 4, 2]
    assert scales(scaler(initial_scale_power=4, hysteresis=3), "x.x.xx") == [16, 16, 16, 16, 8, 4]


def test_consecutive_hysteresis_starts_again_after_a_good_step() -> None:
    given = {"initial_scale_power": 4, "hysteresis": 2}
    assert scales(scaler(**given), "x.x") == [16, 16, 8]
    assert scales(scaler(**given, consecutive_hysteresis=True), "x.xx") == [16, 16, 16, 8]


def test_the_window_counts_good_steps_after_an_overflow() -> None:
    given = {"initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 2}
    assert scales(scaler(**given), ".....") == [16, 16, 32, 32, 64]
    assert scales(scaler(**given), "..x...") == [16, 16, 8, 8, 8, 16]


def test_a_raised_scale_restores_the_hysteresis() -> None:
    given = {"initial_scale_power": 4, "hysteresis": 2, "loss_scale_window": 1}
    assert scales(scaler(**given), "x..xx") == [16, 16, 32, 32, 16]


def test_overflow_at_the_least_scale_is_an_error() -> None:
    made = scaler(initial_scale_power=2, hysteresis=1, min_loss_scale=3)
    assert scales(made, "x") == [3]
    with pytest.raises(LossScaleError, match=r"least loss scale, 3 \(fp16\.min_loss_scale\)"):
        made.update(False)


def test_a_static_scale_never_moves() -> None:
    assert scales(scaler(loss_scale=128.0), "xxx....") == [128.0] * 7


# Skipped steps


def bad(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "x": inputs["x"] * math.inf}


def _overflow(rank: int, world: int, stage: int, given: dict[str, Any]) -> dict[str, Any]:
    """Five steps, the third with an infinity in the batch of rank 1."""
    torch.manual_seed(0)
    schedule = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2}}
    config = {**config_for(stage), "scheduler": schedule, **given}
    engine = zerograph.compile(tiny.Blocks(dropout=0.0), config)
    report: dict[str, Any] = {"applied": [], "rates": [], "scales": []}
    for step in range(5):
        inputs = tiny.batch()
        before = engine.state_dict(), engine.get_lr()
        states = [t.clone() for s in engine.state.storages.values() for t in s.states.values()]
        engine.backward(engine(**(bad(inputs) if step == 2 and rank == 1 else inputs))["loss"])
        engine.step()
        report["applied"].append(engine.was_step_applied())
        report["scales"].append(engine.loss_scale)
        now = [t for s in engine.state.storages.values() for t in s.states.values()]
        same = not differing(engine.state_dict(), before[0])
        same_states = all(torch.equal(a, b) for a, b in zip(states, now))
        if engine.was_step_applied():
            assert not same and not same_states
        else:
            assert same and same_states and engine.get_lr() == before[1]
            assert not math.isfinite(engine.get_global_grad_norm() or 0.0)
    report["counts"] = engine.global_steps, engine.skipped_steps
    report["steps"] = set(engine.optimizer._steps)
    report["state"] = engine.state_dict()
    return report


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_an_overflow_on_one_rank_skips_one_step_on_all(stage: int, kind: str) -> None:
    precise = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    given = {"fp16": precise} if kind == "fp16" else {"bf16": {"enabled": True}}
    one, other = run_ranks(2, _overflow, stage, given)
    assert not differing(one.pop("state"), other.pop("state"))
    assert one == other
    assert one["applied"] == [True, True, False, True, True]
    assert one["counts"] == (5, 1) and one["steps"] == {4}
    scaled = [256.0, 256.0, 128.0, 128.0, 128.0] if kind == "fp16" else [1.0] * 5
    assert one["scales"] == scaled


def _late(rank: int, world: int, stage: int) -> list[str]:
    """Six steps, the third with an infinity on rank 1, read at once and one step late: what differs.

    A norm is late where it comes from a GPU; a flag that is never up makes it so anywhere.
    """
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 9}}
    config = {**config_for(stage), "scheduler": schedule, "bf16": {"enabled": True}}
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        engine = zerograph.compile(tiny.Blocks(dropout=0.0), config)
        if late:
            Deferred.known = False  # type: ignore[assignment, method-assign]
        for step in range(6):
            inputs = bad(tiny.batch()) if step == 2 and rank == 1 else tiny.batch()
            engine.backward(engine(**inputs)["loss"])
            engine.step()
            assert (engine._updates._unread is not None) == late
        states = {"skipped": engine.skipped_steps, "rate": engine.get_lr()}
        held = engine.optimizer.state.values()
        steps = [entry["step"].item() for entry in held]
        found.append({**states, "steps": set(steps), "last": engine.was_step_applied()})
        found[-1]["weights"] = engine.state_dict()
    assert found[0]["skipped"] == 1 and found[0]["steps"] == {5.0}
    different = differing(found[0].pop("weights"), found[1].pop("weights"))
    return [*different, *(name for name in found[0] if found[0][name] != found[1][name])]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_norm_that_comes_a_step_late_skips_the_same_step(stage: int) -> None:
    assert run_ranks(2, _late, stage) == [[], []]


def test_without_the_check_a_nan_reaches_the_parameters() -> None:
    config = {**config_for(0), "bf16": {"enabled": True, "check_grad_overflow": False}}
    engine = zerograph.compile(tiny.Blocks(dropout=0.0), config)
    engine.backward(engine(**bad(tiny.batch()))["loss"])
    engine.step()
    assert engine.was_step_applied() and engine.skipped_steps == 0
    assert engine.state_dict()["head.bias"].isnan().all()


def test_a_skipped_step_is_logged(logged: list[str]) -> None:
    engine = zerograph.compile(tiny.Blocks(), {**config_for(0), **FP16})
    for _ in range(2):
        engine.backward(engine(**bad(tiny.batch()))["loss"])
        engine.step()
    assert logged == [
        "step 1 is skipped, gradients are not finite: the loss scale stays at 65536 for 1 more "
        "(fp16.hysteresis)",
        "step 2 is skipped, gradients are not finite: the loss scale is lowered from 65536 to 32768",
    ]


# Scaled gradients are the gradients


def test_gradients_and_norm_are_those_of_the_unscaled_loss() -> None:
    """Powers of two in fp16 change no bit, as long as nothing underflows."""
    found = []
    for power in (10, 13):
        torch.manual_seed(0)
        given = {"fp16": {"enabled": True, "initial_scale_power": power}}
        engine = zerograph.compile(make("llama"), config_for(2, **given))
        engine.backward(loss_of(engine(**batch_for("llama", 0))))
        gradients = {n: g for n, g in engine.gradients().items() if g is not None}
        engine.step()
        found.append((gradients, engine.get_global_grad_norm(), engine.state_dict()))
    (one, norm, _), (two, other, _) = found
    assert other == pytest.approx(norm, rel=1e-3)
    for name, gradient in one.items():
        bound = 2**-9 * gradient.abs().max()
        assert (gradient - two[name]).abs().max() <= bound, name


def test_gradients_of_inputs_are_unscaled() -> None:
    given = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    engine = zerograph.compile(tiny.Blocks(dropout=0.0), {**config_for(0), **given})
    inputs = tiny.batch()
    inputs["x"].requires_grad_()
    loss = engine(**inputs)["loss"]
    engine.backward(loss)
    found = inputs["x"].grad
    model = engine.destroy()
    reference = inputs["x"].detach().clone().requires_grad_()
    model(reference, inputs["target"])["loss"].backward()
    assert found is not None and reference.grad is not None
    assert (found - reference.grad).abs().max() <= 5e-3 * reference.grad.abs().max()


# Autocast


class PartlyCast(nn.Module):
    """Regions of autocast, one within the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = torch.relu(self.first(x))
            with torch.autocast("cpu", enabled=False):
                hidden = hidden.float() * 2
            return self.second(hidden).float().square().mean()


def test_autocast_regions_of_the_forward() -> None:
    engine = zerograph.compile(PartlyCast(), config_for(3))
    x = torch.randn(4, 8)
    loss, expected = engine(x), (model := PartlyCast())(x)
    engine.backward(loss)
    expected.backward()
    assert torch.equal(loss, expected)
    assert not differing(engine.gradients(), {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("by", ["the caller", "the config"])
def test_autocast_around_the_forward(by: str) -> None:
    given = {"torch_autocast": {"enabled": by == "the config", "dtype": "bf16"}}
    engine, model = zerograph.compile(make("bert"), config_for(2, **given)), make("bert")
    batch = batch_for("bert", 0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(model(**batch))
    with torch.autocast("cpu", torch.bfloat16, enabled=by == "the caller"):
        loss = loss_of(engine(**batch))
    engine.backward(loss)
    expected.backward()
    assert torch.equal(loss, expected)
    found = engine.gradients()
    assert not differing(found, {n: p.grad for n, p in model.named_parameters()})
    assert all(g.dtype == torch.float32 for g in found.values() if g is not None)
    assert ("autocast to bf16" in str(engine.plan)) is (by == "the config")


# How ranks are averaged


@captured_once()
def _averages(rank: int, world: int) -> None:
    reference: dict[str, Any] = {}
    for stage in (0, 3):
        for given, factor in (
            ({}, 1.0),
            ({"prescale_gradients": True}, 1.0),
            ({"gradient_predivide_factor": 2.0}, 1.0),
            ({"gradient_predivide_factor": 4.0}, 1.0),
            ({"gradient_allreduce_op": "sum"}, 2.0),
        ):
            engine = zerograph.compile(make("gpt2"), config_for(stage, **given))
            engine.backward(loss_of(engine(**batch_for("gpt2", rank))))
            found = {n: g / factor for n, g in engine.gradients().items() if g is not None}
            engine.step()
            norm = engine.get_global_grad_norm() / factor
            reference = reference or {**found, "norm": norm}
            assert not differing(found, {n: reference[n] for n in found}), (stage, given)
            assert norm == reference["norm"], (stage, given)


def test_every_way_to_average_gives_the_mean() -> None:
    """Divisors that are powers of two change no bit; the sum is the mean times the ranks."""
    run_ranks(2, _averages)


@captured_once()
def _types(rank: int, world: int) -> dict[str, Any]:
    losses: dict[str, Any] = {}
    for name, given in {
        "fp32": {},
        "sent in bf16": {"communication_data_type": "bf16"},
        "kept in bf16": {"data_types": {"grad_accum_dtype": "bf16"}},
        "bf16 sent in fp32": {"bf16": {"enabled": True}, "communication_data_type": "fp32"},
        "fp16 kept in fp16": {**FP16, "data_types": {"grad_accum_dtype": "fp16"}},
    }.items():
        for stage in (1, 2):
            engine = zerograph.compile(
                make("llama"),
                config_for(
                    stage, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2, **given
                ),
            )
            for step in range(8):
                loss = loss_of(engine(**batch_for("llama", rank + 2 * (step % 4))))
                engine.backward(loss)
                if step == 1:
                    kept = {s.kept.dtype for s in engine.state.storages.values()}
                engine.step()
            losses[f"{name}, stage {stage}"] = (loss.item(), kept)
    return losses


def test_types_of_sent_and_kept_gradients_train() -> None:
    for report in run_ranks(2, _types):
        exact = report["fp32, stage 1"][0]
        for name, (loss, kept) in report.items():
            assert abs(loss - exact) <= 0.02 * exact, name
            (dtype,) = kept
            assert dtype == (
                torch.bfloat16
                if "kept in bf16" in name
                else torch.float16
                if "kept in fp16" in name
                else torch.float32
            )


class Smooth(tiny.Mlp):
    """Without a kink, where a rounding of the input would be any difference of the gradient."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.second(self.norm(torch.tanh(self.first(x)))), target)


def _combined(rank: int, world: int) -> list[str]:
    """Combinations of the types and averages whose gradient is not the mean, by name."""
    wrong = []
    torch.manual_seed(0)
    model = Smooth().double()
    halves = [{k: v.double() for k, v in tiny.batch(2 + r).items()} for r in range(world)]
    (sum(model(**half) for half in halves) / world).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    mine = {k: v.float() for k, v in halves[rank].items()}
    computed = (
        {},
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True, "initial_scale_power": 8}},
    )
    sent = ({}, {"communication_data_type": "bf16"}, {"communication_data_type": "fp32"})
    kept = (False, True)
    averaged = (
        ({"gradient_predivide_factor": 2.0}, 1.0),
        ({"prescale_gradients": True}, 1.0),
        ({"gradient_allreduce_op": "sum"}, 2.0),
    )
    every = list(product(range(4), computed, sent, kept, averaged))
    for stage, c, s, k, (a, factor) in every[::7]:  # 31 of 216; each pair of values is met
        low = {"data_types": {"grad_accum_dtype": "fp16" if "fp16" in c else "bf16"}}
        given = c | s | a | (low if k else {})
        engine = zerograph.compile(copy.deepcopy(model).float(), tiny.config(stage, **given))
        engine.backward(engine(**mine))
        for name, gradient in engine.gradients().items():
            off = (gradient / factor - expected[name]).abs().max() / expected[name].abs().max()
            if off > (0.02 if c or s or k else 1e-5):
                wrong.append(f"stage {stage} {given} {name}: {off:.1e}")
        engine.step()
        assert engine.was_step_applied(), given
    return wrong


def test_types_and_averages_in_combination() -> None:
    for wrong in run_ranks(2, _combined):
        assert not wrong, "\n".join(wrong)


# Accumulation


def rows(rank: int) -> list[dict[str, Tensor]]:
    """Micro-batches of 1, 2 and 3 sequences on rank 0, and of 4, 1 and 1 on rank 1."""
    sizes = ((1, 2, 3), (4, 1, 1))[rank]
    return [batch_for("llama", 10 * rank + i, size=size) for i, size in enumerate(sizes)]


ACCUMULATE = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 3}
WEIGHTED = {**ACCUMULATE, "compile": {"weighted_accumulation": True}}


@captured_once()
def _uneven(rank: int, world: int, given: dict[str, Any], stages: tuple[int, ...]) -> None:
    weighted = "compile" in given
    losses = []
    model = make("llama")
    for other in range(world):
        for batch in rows(other):
            weight = batch["labels"].numel() if weighted else 1.0
            losses.append((weight, loss_of(model(**batch))))
    total = sum(weight for weight, _ in losses)
    sum(weight / total * loss for weight, loss in losses).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    for stage in stages:
        engine = zerograph.compile(make("llama"), config_for(stage, **given))
        for batch in rows(rank):
            weight = batch["labels"].numel() if weighted else None
            engine.backward(loss_of(engine(**batch)), weight=weight)
            if engine.is_gradient_accumulation_boundary():
                found = engine.gradients()
            engine.step()
        for name, gradient in expected.items():
            error = (found[name] - gradient).abs().max()
            assert error <= 2e-6 * gradient.abs().max() + 1e-9, (stage, name)
        assert engine.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-6)
        assert engine.global_steps == 1


@pytest.mark.parametrize(
    ("given", "stages"), [(ACCUMULATE, (2,)), (WEIGHTED, (0, 3))], ids=["equal", "by tokens"]
)
def test_micro_batches_of_different_size(given: dict[str, Any], stages: tuple[int, ...]) -> None:
    """Each micro-batch weighs the same, or as many tokens as it has."""
    run_ranks(2, _uneven, given, stages)


def test_weights_are_given_where_and_only_where_the_config_says_so() -> None:
    engine = zerograph.compile(tiny.Blocks(), {**config_for(0), **WEIGHTED})
    loss = engine(**tiny.batch())["loss"]
    with pytest.raises(PlanError, match=r"got no weight=.*weighted_accumulation is true"):
        engine.backward(loss)
    with pytest.raises(PlanError, match=r"at least 0 and finite in .*, got -1"):
        engine.backward(loss, weight=-1.0)
    with pytest.raises(PlanError, match="must be a number, got 'many'"):
        engine.backward(loss, weight="many")  # type: ignore[arg-type]
    plain = zerograph.compile(tiny.Blocks(), config_for(0))
    with pytest.raises(PlanError, match=r"got a weight=.*weighted_accumulation is false"):
        plain.backward(plain(**tiny.batch())["loss"], weight=2.0)


def test_a_backward_without_the_engine_has_no_weight() -> None:
    engine = zerograph.compile(
        tiny.Blocks(), {**config_for(0), "compile": {"weighted_accumulation": True}}
    )
    engine(**tiny.batch())["loss"].backward()
    with pytest.raises(PlanError, match=r"1 backwards and 0 weights .*weight=\.\.\.\) every time"):
        engine.step()
    engine.backward(engine(**tiny.batch())["loss"], weight=3.0)
    with pytest.raises(PlanError, match="2 backwards and 1 weights"):
        engine.step()


def test_a_weight_counts_as_it_was_applied() -> None:
    """In a bf16 loss 1001 is 1000: then it is 1000 in the divisor as well."""
    given = {"compile": {"weighted_accumulation": True}, "bf16": {"enabled": True}}
    engine = zerograph.compile(tiny.Blocks(dropout=0.0), {**config_for(0), **given})
    inputs = tiny.batch()
    found = []
    for weight in (1000.0, 1001.0):
        engine.backward(engine(**inputs)["loss"], weight=weight)
        found.append({n: g for n, g in engine.gradients().items() if g is not None})
        engine.zero_grad()
    assert not differing(found[1], found[0])
    assert not engine._updates.weights


def test_a_weight_that_overflows_the_loss_is_refused() -> None:
    given = {"compile": {"weighted_accumulation": True}, "fp16": {"enabled": True}}
    engine = zerograph.compile(tiny.Blocks(), {**config_for(0), **given})
    loss = engine(**tiny.batch())["loss"]
    with pytest.raises(
        PlanError, match=r"finite in the loss's dtype \(torch\.float16\), got 70000"
    ):
        engine.backward(loss, weight=70000)


def test_weights_that_sum_to_zero_skip_the_step() -> None:
    engine = zerograph.compile(
        tiny.Blocks(), {**config_for(0), "compile": {"weighted_accumulation": True}}
    )
    before = engine.state_dict()
    engine.backward(engine(**tiny.batch())["loss"], weight=0.0)
    engine.step()
    assert not engine.was_step_applied() and not differing(engine.state_dict(), before)
