"""Learning-rate schedules of the config's `scheduler` section, as torch schedulers.

The rate is a function of the iteration: -1 before the first update, and one more after each. The
engine steps the scheduler at every update. The curves are DeepSpeed's: a logarithmic or linear warm-up, then
constant (WarmupLR), a line to zero (WarmupDecayLR) or half a cosine (WarmupCosineLR).
"""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zerograph.config import ZeroConfig
from zerograph.config.scheduler import WarmupCosineLR, WarmupDecayLR, WarmupLR
from zerograph.errors import PlanError

Curve = Callable[[int, float], float]
"""(iteration, the group's own rate) to the group's rate."""


class ConfigLR(LRScheduler):
    """Sets every group's rate to `curve(iteration, its own rate)`."""

    def __init__(self, optimizer: Optimizer, curve: Curve) -> None:
        self._curve = curve
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [self._curve(self.last_epoch - 1, float(base)) for base in self.base_lrs]

    def undo(self) -> None:
        """Take the last step back: the update before it turned out to have been skipped."""
        self.last_epoch -= 1
        for group, rate in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def scheduler_of(config: ZeroConfig, optimizer: Optimizer | None) -> ConfigLR | None:
    """The scheduler that the config names, on `optimizer`; None without one."""
    if config.scheduler is None:
        return None
    if optimizer is None:
        raise PlanError("scheduler: needs an optimizer; add an `optimizer` section to the config")
    return ConfigLR(optimizer, curve_of(config.scheduler))


def curve_of(section: WarmupLR | WarmupDecayLR | WarmupCosineLR) -> Curve:
    """The curve of one `scheduler` section."""
    params = section.params
    steps = max(2, params.warmup_num_steps)

    def warm(iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if params.warmup_type == "log":
            return math.log(iteration + 1) / math.log(steps)
        return iteration / steps

    if isinstance(section, WarmupCosineLR):
        cosine = section.params
        window = max(1, cosine.total_num_steps - steps)

        def ratio(iteration: int) -> float:
            if iteration < 0:
                return 0.0
            if iteration < steps:
                return cosine.warmup_min_ratio + (1 - cosine.warmup_min_ratio) * warm(iteration)
            progress = min(1.0, (iteration - steps + 1) / window)
            fall = (1 + math.cos(math.pi * progress)) / 2
            return cosine.cos_min_ratio + (1 - cosine.cos_min_ratio) * fall

        return lambda iteration, own: own * ratio(iteration)

    low, high, total = section.params.warmup_min_lr, section.params.warmup_max_lr, None
    if isinstance(section, WarmupDecayLR):
        total = section.params.total_num_steps

    def rate(iteration: int, own: float) -> float:
        top = own if high is None else high
        if iteration < steps:
            return low + (top - low) * warm(iteration)
        if total is None:
            return top
        return low + (top - low) * max(0.0, (total - iteration) / max(1.0, total - steps))

    return rate
