"""The contestants of `overlap.py`: zerograph's configs and engines, and the peers beside them."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

import bounds
import torch.distributed as dist
from away import Away
from contest import BATCH, BETAS, EPS, LR, WEIGHT_DECAY, Step, llama
from peers import Plain, alone_step, ddp_step, fully_shard_step
from torch import Tensor

import zerograph


def config_of(stage: int, dtype: str, zero: Mapping[str, Any], updating: bool = False) -> Any:
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
        config["bf16"] = {"enabled": True}
    if updating:
        config["compile"] = {"update_in_backward": True}
    return config


class Zerograph:
    """A step of zerograph's engine."""

    def __init__(self, config: Any) -> None:
        self.engine = zerograph.compile(llama(), config)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


def configs(options: argparse.Namespace) -> dict[str, Any]:
    """Those of zerograph, by the contestant's name."""
    dtype, zero = options.dtype, options.zero
    found = {f"stage {s}": config_of(s, dtype, zero if s == 3 else {}) for s in (1, 2, 3)}
    found[bounds.FREED] = config_of(3, dtype, zero | {"stage3_max_reuse_distance": 0})
    if options.update_in_backward:
        for stage in (1, 2, 3):
            more = zero if stage == 3 else {}
            found[f"stage {stage} updating"] = config_of(stage, dtype, more, updating=True)
    return found


def contestants(options: argparse.Namespace) -> dict[str, Step]:
    """All that are compared, ready to step."""
    dtype = options.dtype
    away = deepspeed(options)
    steps: dict[str, Step] = {
        "alone": alone_step(dtype),
        "ddp": ddp_step(dtype),
        "fully_shard": fully_shard_step(dtype),
        **away,
        **{name: Zerograph(config) for name, config in configs(options).items()},
    }
    for step in away.values():
        step.ready()
    return steps


def deepspeed(options: argparse.Namespace) -> dict[str, Away]:
    """DeepSpeed ZeRO-3 with its default config and freed, being started."""
    if not options.deepspeed:
        if dist.get_rank() == 0:
            print("DeepSpeed is left out: say --deepspeed PYTHON (deepspeed_env.sh makes one)")
        return {}
    sections = {"deepspeed": {}, "deepspeed freed": {"stage3_max_reuse_distance": 0}}
    found = {}
    for name, zero in sections.items():
        config = json.dumps(config_of(3, options.dtype, zero))
        found[name] = Away(options.deepspeed, "deepspeed_rank.py", config)
    return found


def sent_by(steps: Mapping[str, Step]) -> dict[str, float]:
    """Bytes that a rank sends in a step, at the least, where they are known."""
    world = dist.get_world_size()
    found = {"alone": 0.0}
    for name, step in steps.items():
        if isinstance(step, Zerograph):
            found[name] = bounds.least_bytes(step.engine.plan.traffic, world)
        elif name == "ddp" and isinstance(step, Plain):
            gradients = sum(p.numel() * p.dtype.itemsize for p in step.model.parameters())
            found[name] = 2 * gradients * (world - 1) / world
    return found
