"""What a DeepSpeed script asks its engine beside training: numbers, modes, and what is not built.

    engine.train_batch_size(), engine.global_rank, engine.set_lr(1e-4)     answered
    engine.save_checkpoint(folder)                                         AttributeError that names the way

The names and meanings are DeepSpeed's; the engine (engine.py) is one of these.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from zerograph.config import ZeroConfig
from zerograph.config.batch import Batch
from zerograph.errors import PlanError
from zerograph.runtime.optimizer import ShardedOptimizer

_SAVE = "save engine.state_dict() (made on all ranks) and, on each, engine.optimizer.state_dict()"
_LOAD = (
    "load with engine.load_state_dict() and engine.optimizer.load_state_dict(), with as many ranks"
)
_WAYS = {
    "save_checkpoint": _SAVE,
    "load_checkpoint": _LOAD,
    "save_16bit_model": "save engine.state_dict(rank0_only=True) of a model in 16 bits",
    "save_fp16_model": "save engine.state_dict(rank0_only=True) of a model in 16 bits",
    "no_sync": "give gradient_accumulation_steps, and gradients are reduced once an update",
    "set_gradient_accumulation_boundary": "give gradient_accumulation_steps",
    "eigenvalue_enabled": "there is no such schedule",
    "forward": "call the engine: engine(**batch)",
    "to": "give compile(device=...)",
}


class Surface:
    """Answers that follow from the config and the process group."""

    module: nn.Module
    config: ZeroConfig
    batch: Batch
    optimizer: ShardedOptimizer | None

    def __getattr__(self, name: str) -> Any:
        if name in _WAYS:
            raise AttributeError(f"engine.{name} is not built: {_WAYS[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """All processes."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def local_rank(self) -> int:
        """This process among those of its machine, as the launcher says."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def train_batch_size(self) -> int | None:
        """Rows of one update over all ranks; None if the config has no batch number."""
        return self.batch.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int | None:
        """Rows of one forward on one rank; None if the config has no batch number."""
        return self.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.batch.accumulation

    def gradient_clipping(self) -> float:
        """The largest norm of a gradient; 0 does not clip."""
        return self.config.gradient_clipping

    def zero_optimization_stage(self) -> int:
        return self.config.zero_optimization.stage

    def fp16_enabled(self) -> bool:
        return self.config.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        return self.config.bf16.enabled

    def set_lr(self, lr: float) -> None:
        """The learning rate of every parameter group from the next step on."""
        if self.optimizer is None:
            raise PlanError(
                "engine.set_lr() needs an optimizer, in the config or compile(optimizer=...)"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def modules(self) -> Iterator[nn.Module]:
        return self.module.modules()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.module.named_modules()
