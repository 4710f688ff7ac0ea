"""The contestants of `overlap.py`: zerograph's configs and engines, and the peers beside them."""

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import bounds
import torch.distributed as dist
from away import Away
from contest import BATCH, BETAS, EPS, LR, WEIGHT_DECAY, Step, llama
from peers import Plain, alone_step, ddp_step, fully_shard_step
from torch import Tensor, nn

import zerograph


def config_of(stage: int, dtype: str, zero: Mapping[str, Any]) -> Any:
    """DeepSpeed JSON; without clipping, which no peer does. `zero` is added to its section."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY},
        },
        "zero_optimization": {"stage": stage, **zero},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # as the peers
    return config


class Zerograph:
    """A step of zerograph's engine."""

    def __init__(self, config: Any, model: nn.Module | None = None) -> None:
        self.stage: int = config["zero_optimization"]["stage"]
        self.engine = zerograph.compile(model or llama(), config)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def drain(self) -> None:
        """Wait for what the last step has started for the next."""
        self.engine.state.ahead.settle()


def configs(options: argparse.Namespace) -> dict[str, Any]:
    """Those of zerograph, by the contestant's name; each as it is, and with updates in the backward."""
    dtype, zero = options.dtype, options.zero
    found = {f"stage {s}": config_of(s, dtype, zero if s == 3 else {}) for s in (1, 2, 3)}
    found[bounds.FREED] = config_of(3, dtype, zero | {"stage3_max_reuse_distance": 0})
    early = {"update_in_backward": True}
    found |= {f"{name}{bounds.EARLY}": {**c, "compile": early} for name, c in found.items()}
    return {name: config for name, config in found.items() if wanted(options, name)}


def wanted(options: argparse.Namespace, name: str) -> bool:
    """Whether a contestant takes part; "alone" and "ddp" always do."""
    return name in ("alone", "ddp") or not options.only or name in options.only


def contestants(options: argparse.Namespace) -> dict[str, Step]:
    """All that are compared, ready to step."""
    dtype = options.dtype
    away = deepspeed(options)
    peers = {"alone": alone_step, "ddp": ddp_step, "fully_shard": fully_shard_step}
    steps: dict[str, Step] = {
        **{name: make(dtype) for name, make in peers.items() if wanted(options, name)},
        **away,
        **{name: Zerograph(config) for name, config in configs(options).items()},
    }
    for step in away.values():
        step.ready()
    return steps


def deepspeed(options: argparse.Namespace) -> dict[str, Away]:
    """DeepSpeed ZeRO-3 with its default config and freed, being started; none where it is not installed."""
    sections = {"deepspeed": {}, "deepspeed freed": {"stage3_max_reuse_distance": 0}}
    sections = {name: zero for name, zero in sections.items() if wanted(options, name)}
    if sections and not on_all_ranks(options.deepspeed):
        if dist.get_rank() == 0:
            print("DeepSpeed is left out: say --deepspeed PYTHON (deepspeed_env.sh makes one)")
        return {}
    found = {}
    for name, zero in sections.items():
        config = json.dumps(config_of(3, options.dtype, zero))
        found[name] = Away(options.deepspeed, "deepspeed_rank.py", config)
    return found


def on_all_ranks(python: str | None) -> bool:
    """Whether `python` has DeepSpeed on every rank's machine."""
    ask = "from importlib.util import find_spec; exit(find_spec('deepspeed') is None)"
    found = bool(python and shutil.which(python))
    found = found and subprocess.run([str(python), "-c", ask]).returncode == 0
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return all(everywhere)


def sent_by(steps: Mapping[str, Step]) -> dict[str, float]:
    """Bytes that a rank sends in a step, at the least, where they are known."""
    world = dist.get_world_size()
    ddp = steps["ddp"]
    assert isinstance(ddp, Plain)
    full = sum(p.numel() * p.dtype.itemsize for p in ddp.model.parameters())
    found = {"alone": 0.0, "ddp": 2 * full * (world - 1) / world}
    for name, step in steps.items():
        if isinstance(step, Zerograph):
            traffic = step.engine.plan.traffic
            found[name] = bounds.least_bytes(traffic, step.stage, full, world)
    return found
