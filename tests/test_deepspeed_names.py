"""The names that a DeepSpeed script calls, and the config's learning-rate schedules."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import zerograph
from zerograph.errors import ConfigError, PlanError

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 2},
}


class Points(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index))


def test_initialize_answers_the_four_parts(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    parser = zerograph.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(tmp_path / "ds.json")])
    model = nn.Linear(3, 2)
    zerograph.init_distributed()
    engine, optimizer, loader, scheduler = zerograph.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=Points()
    )
    assert optimizer is engine.optimizer and isinstance(optimizer, torch.optim.Optimizer)
    assert scheduler is None
    assert engine.get_lr() == [0.1] and engine.device.type == "cpu"
    assert [n for n, _ in engine.named_parameters()] == ["weight", "bias"]
    assert [p.shape for p in engine.parameters()] == [(2, 3), (2,)]
    before = engine.state_dict()
    batches = list(loader)
    assert [len(b) for b in batches] == [4, 4, 2]
    for batch in batches[:2]:
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
    assert engine.global_steps == 2
    assert not torch.equal(engine.state_dict()["weight"], before["weight"])


def test_the_last_rows_may_be_left_out() -> None:
    config = {**CONFIG, "dataloader_drop_last": True}
    _, _, loader, _ = zerograph.initialize(
        model=nn.Linear(3, 2), config=config, training_data=Points()
    )
    assert [len(batch) for batch in loader] == [4, 4]


def test_what_a_script_asks_its_engine() -> None:
    config = {**CONFIG, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    model = nn.Linear(3, 2)
    engine = zerograph.compile(model, {**config, "bf16": {"enabled": True}})
    assert (engine.global_rank, engine.local_rank, engine.world_size) == (0, 0, 1)
    assert engine.train_batch_size() == 8 and engine.train_micro_batch_size_per_gpu() == 4
    assert engine.gradient_accumulation_steps() == 2 and engine.gradient_clipping() == 0.5
    assert engine.zero_optimization_stage() == 2
    assert engine.bfloat16_enabled() and not engine.fp16_enabled()
    assert list(engine.modules()) == [model] and dict(engine.named_modules()) == {"": model}
    engine.set_lr(0.25)
    assert engine.get_lr() == [0.25]
    with pytest.raises(
        AttributeError, match=r"save_checkpoint is not built: save engine\.state_dict"
    ):
        engine.save_checkpoint("folder")
    with pytest.raises(AttributeError, match="'Engine' object has no attribute 'sarve'"):
        engine.sarve()
    assert not hasattr(engine, "no_sync")
    assert zerograph.__version__


@pytest.mark.parametrize("changed", [{"lr": "0.1"}, {"betas": (0.9, 1.5)}, {"lr": float("nan")}])
def test_an_option_that_is_no_number_changes_nothing(changed: dict[str, Any]) -> None:
    engine = zerograph.compile(nn.Linear(3, 2), CONFIG)
    before = engine.state_dict()
    engine.backward(engine(torch.ones(1, 3)).sum())
    (group,) = engine.optimizer.param_groups
    kept = {key: group[key] for key in changed}
    group.update(changed)
    with pytest.raises(
        PlanError, match=r"param_groups\[0\] has options that cannot be computed with"
    ):
        engine.step()
    assert torch.equal(engine.state_dict()["weight"], before["weight"])
    group.update(kept)
    engine.step()
    assert not torch.equal(engine.state_dict()["weight"], before["weight"])


def test_what_initialize_refuses() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="--deepspeed_config"):
        zerograph.initialize(model=model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD(model.parameters()), 0.5)
    with pytest.raises(PlanError, match="not on the `optimizer` given"):
        zerograph.initialize(model=nn.Linear(3, 2), config=CONFIG, lr_scheduler=schedule)
    with pytest.raises(PlanError, match="model="):
        zerograph.initialize(config=CONFIG)
    with pytest.raises(PlanError, match="in no parameter group"):
        zerograph.initialize(model=model, config=CONFIG, model_parameters=[model.weight])
    engine, *_ = zerograph.initialize(model=model, config=CONFIG)
    with pytest.raises(PlanError, match="belongs to an engine already"):
        zerograph.initialize(model=model, config=CONFIG)
    with pytest.raises(PlanError, match=r"call engine\.step\(\)"):
        engine.optimizer.step()
    with pytest.raises(PlanError, match="before any"):
        engine.step()


def test_a_step_needs_an_optimizer() -> None:
    engine = zerograph.compile(nn.Linear(3, 2), {})
    engine(torch.ones(1, 3)).sum().backward()
    assert engine.gradients()["bias"].tolist() == [1.0, 1.0]
    with pytest.raises(PlanError, match='"optimizer"'):
        engine.step()


def rates(section: dict[str, Any], steps: int) -> list[float]:
    """The rate that each of `steps` updates uses."""
    engine = zerograph.compile(nn.Linear(3, 2), {**CONFIG, "scheduler": section})
    used = []
    for _ in range(steps):
        engine(torch.ones(1, 3)).sum().backward()
        used.append(engine.optimizer.param_groups[0]["lr"])
        engine.step()
    return used


def test_schedules() -> None:
    """The first update runs at iteration -1, before the scheduler's first step, as in DeepSpeed."""
    warm = {"warmup_num_steps": 4, "warmup_max_lr": 0.8, "warmup_type": "linear"}
    found = rates({"type": "WarmupLR", "params": warm}, 8)
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    found = rates({"type": "WarmupLR", "params": {**warm, "warmup_type": "log"}}, 6)
    logs = [0.8 * math.log(i + 1) / math.log(4) for i in range(4)]
    assert found == pytest.approx([0, *logs, 0.8])
    found = rates({"type": "WarmupDecayLR", "params": {**warm, "total_num_steps": 8}}, 11)
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.6, 0.4, 0.2, 0, 0])
    cosine = {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear"}
    found = rates({"type": "WarmupCosineLR", "params": {**cosine, "cos_min_ratio": 0.1}}, 8)
    falls = [0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2) for k in (1, 2, 3, 4, 4)]
    assert found == pytest.approx([0, 0, 0.05, *falls])


@pytest.mark.parametrize("script", ["inspect_plan.py", "deepspeed_script.py"])
def test_examples_run(script: str) -> None:
    arguments = [sys.executable, str(ROOT / "examples" / script)]
    if script.startswith("deepspeed"):
        arguments += ["--deepspeed_config", str(ROOT / "examples" / "zero3.json"), "--steps", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
