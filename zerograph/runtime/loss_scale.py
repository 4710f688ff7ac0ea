"""Loss scaling: the number that gradients are multiplied by in fp16, and how it follows overflows.

A step whose gradients are not finite is skipped, and after `hysteresis` of them the scale is halved; the
good step that follows `loss_scale_window` good ones doubles it. arXiv:1710.03740 section 3.2; the rules
for hysteresis and window are those of DeepSpeed's `fp16` section.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zerograph.config import ZeroConfig
from zerograph.errors import LossScaleError

FACTOR = 2.0


@dataclass
class LossScaler:
    """The loss scale of one engine. All ranks see the same overflows, so it is the same on all."""

    scale: float
    dynamic: bool
    window: int
    """Good steps in a row after which the next doubles the scale."""
    patience: int
    """Overflows of which the last halves the scale (`hysteresis`)."""
    refill: bool
    """Whether every good step restores the patience (`consecutive_hysteresis`), not only a doubling."""
    least: float
    """The scale below which training gives up (`min_loss_scale`)."""
    left: int = 0
    """Overflows that are still to come before the scale is halved."""
    good: int = 0
    """Good steps since the last overflow."""

    def update(self, finite: bool) -> str:
        """Take note of one step; answers what became of the scale in a few words.

        Raises LossScaleError on an overflow at the least scale: halving cannot help any more.
        """
        if not self.dynamic:
            return f"the loss scale stays at {self.scale:g}, as fp16.loss_scale says"
        return self._grow() if finite else self._shrink()

    def _grow(self) -> str:
        before, self.good = self.good, self.good + 1
        if self.refill:
            self.left = self.patience
        if before == 0 or before % self.window:
            return f"the loss scale stays at {self.scale:g}"
        self.left = self.patience
        self.scale *= FACTOR
        return f"the loss scale is raised to {self.scale:g}"

    def _shrink(self) -> str:
        self.good = 0
        if self.left > 1:
            self.left -= 1
            return f"the loss scale stays at {self.scale:g} for {self.left} more (fp16.hysteresis)"
        if self.scale <= self.least:
            raise LossScaleError(
                f"gradients are not finite at the least loss scale, {self.scale:g} "
                "(fp16.min_loss_scale): the loss itself has probably overflowed or become NaN. Lower the "
                "learning rate, clip gradients (gradient_clipping), or train in bf16 (bf16.enabled)"
            )
        before, self.scale = self.scale, max(self.scale / FACTOR, self.least)
        return f"the loss scale is lowered from {before:g} to {self.scale:g}"

    def tensor(self, device: torch.device) -> Tensor:
        """The scale as fp32 [] on `device`."""
        return torch.tensor(self.scale, dtype=torch.float32, device=device)


def scaler_of(config: ZeroConfig) -> LossScaler | None:
    """The scaler that the config's `fp16` section asks for; None without fp16."""
    fp16 = config.fp16
    if not fp16.enabled:
        return None
    dynamic = fp16.loss_scale == 0
    return LossScaler(
        scale=2.0**fp16.initial_scale_power if dynamic else fp16.loss_scale,
        dynamic=dynamic,
        window=fp16.loss_scale_window,
        patience=fp16.hysteresis,
        refill=fp16.consecutive_hysteresis,
        least=float(fp16.min_loss_scale),
        left=fp16.hysteresis,
    )
