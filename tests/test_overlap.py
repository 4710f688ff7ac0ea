"""What runs early, and across regions and steps, changes no bit, and is there for whoever reads it first."""

from typing import Any

import pytest
import torch
from torch import Tensor

import zerograph
from tests.models import batch_for, loss_of, make
from tests.oracle import config_for, differing
from tests.ranks import run_ranks
from zerograph import Engine

FAR = 10**9
EARLY: dict[str, dict[str, Any]] = {
    "just in time": {"stage3_prefetch_bucket_size": 0},
    "early": {"stage3_prefetch_bucket_size": FAR},
    "kept": {"stage3_prefetch_bucket_size": FAR, "stage3_max_reuse_distance": FAR},
    "some kept": {"stage3_max_live_parameters": 30000, "stage3_max_reuse_distance": FAR},
}
"""Schedules of stage 3, the first of which starts nothing early."""
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clipping": 0.1},
    "bf16": {"bf16": {"enabled": True}},
    "accumulated": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
}


def engine_for(stage: int, zero: dict[str, Any] | None = None, **more: Any) -> Engine:
    return zerograph.compile(make("llama"), config_for(stage, zero_optimization=zero or {}, **more))


def step(engine: Engine, rank: int, index: int) -> Tensor:
    """One update."""
    for micro in range(engine.batch.accumulation):
        loss = loss_of(engine(**batch_for("llama", rank + 10 * index + 100 * micro)))
        engine.backward(loss)
        engine.step()
    return loss.detach()


def _trained(rank: int, world: int, more: str) -> dict[str, Any]:
    found = {}
    for name, zero in EARLY.items():
        engine = engine_for(3, zero, **MORE[more])
        losses = torch.stack([step(engine, rank, index) for index in range(4)])
        found[name] = {"loss": losses, **engine.state_dict()}
        engine.destroy()
    return found


@pytest.mark.parametrize("more", MORE)
def test_every_schedule_trains_to_the_same_bits(more: str) -> None:
    for found in run_ranks(2, _trained, more):
        expected = found["just in time"]
        for name, each in found.items():
            assert not differing(each, expected), name


def _read(rank: int, world: int, stage: int) -> list[str]:
    """After each step something else reads or changes the parameters first; an untouched engine does too."""
    engine, plain = engine_for(stage), engine_for(stage, EARLY["just in time"])
    wrong = []
    for index in range(6):
        losses = [step(each, rank, index) for each in (engine, plain)]
        if not torch.equal(*losses):
            wrong.append(f"loss of step {index}")
        if index == 0:
            for each in (engine, plain):
                with torch.no_grad():
                    losses.append(loss_of(each.eval()(**batch_for("llama", 7))))
                each.train()
            if not torch.equal(*losses[2:]):
                wrong.append("evaluation")
        elif index == 1:
            for each in (engine, plain):
                with zerograph.gathered(each), torch.no_grad():
                    next(each.module.parameters()).mul_(0.5)
        elif index == 2:
            half = {k: v * 0.9 for k, v in plain.state_dict().items()}
            for each in (engine, plain):
                each.load_state_dict(half)
        elif index == 3:
            for each in (engine, plain):
                loss_of(each(**batch_for("llama", 8)))  # a forward whose backward never comes
        elif index == 4:
            for each in (engine, plain):
                loss = loss_of(each(**batch_for("llama", 9)))
                each.backward(loss, retain_graph=True)
                each.backward(loss)
                each.zero_grad()
    wrong += differing(engine.state_dict(), plain.state_dict())
    models = [dict(each.destroy().named_parameters()) for each in (engine, plain)]
    return wrong + differing(*models)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whoever_reads_first_finds_the_new_values(stage: int) -> None:
    for wrong in run_ranks(2, _read, stage):
        assert wrong == []


def _alone(rank: int, world: int) -> float:
    """At stage 2 a rank may evaluate alone: what it needs of the others is on its way already."""
    engine = engine_for(2)
    with torch.no_grad():  # all ranks know this kind of call
        before = loss_of(engine.eval()(**batch_for("llama", 7)))
    step(engine.train(), rank, 0)
    if rank:
        return 1.0
    with torch.no_grad():
        return float(before - loss_of(engine.eval()(**batch_for("llama", 7))))


def test_one_rank_evaluates_alone() -> None:
    assert run_ranks(2, _alone)[0] != 0


def _graphs(rank: int, world: int) -> dict[str, Any]:
    engine = engine_for(3, EARLY["early"])
    step(engine, rank, 0)
    programs = {region: engine.plan.program(region) for region in ("forward", "backward", "step")}
    return {region: str(program.module.code) for region, program in programs.items()}


def test_all_ranks_run_the_same_programs() -> None:
    one, other = run_ranks(2, _graphs)
    assert one == other
    assert "ahead.take" in one["forward"] and "ahead.begin" in one["step"]
