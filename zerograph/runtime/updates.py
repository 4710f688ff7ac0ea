"""From the first backward to the update: which parameters got gradients, what they weigh, the step.

begin        a backward begins; with `compile.update_in_backward` the one that applies its gradients
received     a backward ran: its parameters have gradients
apply        the step program: reduce, norm, clip, optimizer; or a skip, and the loss scale follows
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from zerograph.config import ZeroConfig
from zerograph.errors import PlanError
from zerograph.nodes import Role
from zerograph.passes.lower import Program
from zerograph.plan import Plan
from zerograph.runtime.deferred import Deferred
from zerograph.runtime.loss_scale import LossScaler, scaler_of
from zerograph.runtime.lr_schedule import ConfigLR
from zerograph.runtime.optimizer import ShardedOptimizer
from zerograph.runtime.run import Execute, execute
from zerograph.runtime.shown import require_hidden
from zerograph.runtime.state import State

_log = logging.getLogger("zerograph")


@dataclass
class Updates:
    """The updates of one engine, and what is pending for the next."""

    config: ZeroConfig
    state: State
    optimizer: ShardedOptimizer | None
    count: int = 0
    """Updates so far, skipped ones included."""
    skipped: int = 0
    scaler: LossScaler | None = None
    backwards: int = 0
    """Backwards since the last update."""
    since_step: int = 0
    """Backwards since the last call of `engine.step()`."""
    used: set[str] = field(default_factory=set)
    """Parameters that received a gradient on this rank since the last update."""
    weights: list[float] = field(default_factory=list)
    """Of the losses since the last update, with weighted accumulation."""
    chosen: tuple[Plan, Program] | None = None
    """The plan whose step region is run, and that region lowered."""
    execute: Execute = execute
    _updating: Plan | None = None
    """Of the backward that applies its gradients."""
    _unread: Deferred | None = None
    """The norm of the last update, until it is asked for or the next step begins."""
    _scheduler: LRScheduler | None = None
    """That the last update stepped."""
    _norm: float | None = None
    _applied: bool = False
    _compared: bool = False
    """Whether it was said that there are more backwards than steps."""

    @classmethod
    def of(cls, config: ZeroConfig, state: State, optimizer: ShardedOptimizer | None) -> "Updates":
        made = cls(config, state, optimizer, scaler=scaler_of(config))
        made._hand_on_scale()
        if optimizer is not None:
            optimizer.settle = made.settle
        return made

    @property
    def scale(self) -> float:
        """The loss scale; 1 without fp16."""
        return self.scaler.scale if self.scaler is not None else 1.0

    @property
    def norm(self) -> float | None:
        """The 2-norm of the mean gradient at the last update, before clipping."""
        self.settle()
        return self._norm

    @property
    def applied(self) -> bool:
        """Whether the last update changed anything."""
        self.settle()
        return self._applied

    @property
    def pending(self) -> bool:
        """Whether gradients are kept for the next update, or applied for the next step."""
        kept = ((s.kept, s.squares) for s in self.state.storages.values())
        return any(each is not None for pair in kept for each in pair)

    @property
    def early(self) -> bool:
        """Whether a backward applies its own gradients."""
        return self.config.compile.update_in_backward

    # Before a step

    def adopt(self, plan: Plan) -> None:
        """Take a new plan's step program if it is the first, or asks other ranks for more."""
        if not plan.graph.training or self.optimizer is None:
            return
        asks = bool(plan.graph.unused)
        if self.chosen is None or (asks and not self.chosen[0].graph.unused):
            self.chosen = (plan, plan.program("step", self.state.world.name_of))

    def require_open(self, what: str) -> None:
        """Raise PlanError if the backward since the last step has applied its gradients already."""
        if self.early and self.backwards:
            raise PlanError(
                f"{what} between a backward and engine.step(): with compile.update_in_backward the backward "
                "has applied its gradients, and the step ends that; call engine.step() behind every "
                "backward (sum the losses of several), or leave the option out"
            )

    def begin(self, plan: Plan) -> None:
        """A backward of `plan` begins, which may be the one that updates."""
        if self.early:
            assert self.optimizer is not None
            require_hidden(self.state, "a backward with compile.update_in_backward")
            self.settle()
            self.optimizer.begin()
            self.state.ahead.settle()
            self._updating = plan
            self._use(plan)

    def received(self, plan: Plan) -> None:
        """A backward of `plan` has run."""
        self.backwards += 1
        self.since_step += 1
        self.state.version += self.early
        self._use(plan)

    def _use(self, plan: Plan) -> None:
        trainable = (p.name for p in plan.graph.layout.params.values() if p.trainable)
        self.used.update(set(trainable) - set(plan.graph.unused))

    def gradient_of(self, loss: Tensor, weight: float | None) -> Tensor | None:
        """The weight as the gradient that `loss` starts from, in its dtype; None without weights.

        Raises PlanError unless a weight is given where, and only where, the config asks for one.
        """
        if self.config.compile.weighted_accumulation == (weight is None):
            given = "no weight=" if weight is None else "a weight="
            state = "true" if weight is None else "false"
            raise PlanError(
                f"engine.backward got {given}, and compile.weighted_accumulation is {state} in the "
                "config; give a weight with every backward if it is true, and none otherwise"
            )
        if weight is None:
            return None
        try:
            gradient = torch.full_like(loss, float(weight))
        except (TypeError, ValueError, RuntimeError):
            raise PlanError(f"weight of engine.backward must be a number, got {weight!r}") from None
        if not (math.isfinite(gradient.item()) and weight >= 0):
            raise PlanError(
                "weight of engine.backward must be at least 0 and finite in the loss's dtype "
                f"({loss.dtype}), got {weight}; divide all weights by one number if they are too large"
            )
        return gradient

    def drop(self) -> None:
        """Forget the gradients kept since the last update."""
        self.state.drop_gradients()
        self.backwards = 0
        self.used.clear()
        self.weights.clear()

    def divisor(self) -> float:
        """What the mean gradients kept so far are too large by: loss scale and mean weight."""
        if self.config.compile.weighted_accumulation:
            return self.scale * float(self.state.world.mean(self._total_weight()))
        return self.scale

    # The step

    def end_micro_batch(self) -> None:
        """`engine.step()` off the boundary. Raises PlanError if there is no backward that it ends."""
        if not self.since_step:
            raise PlanError(
                "engine.step() without a backward since the last one would end a micro-batch that is "
                f"missing, and {self._accumulation} of them are an update (gradient_accumulation_steps); "
                "call it once behind every engine.backward(loss)"
            )
        self.since_step = 0

    @property
    def _accumulation(self) -> int:
        return self.config.batch(self.state.world.size).accumulation

    def require_ready(self) -> None:
        """Raise PlanError if there is nothing to apply, or backwards and weights do not match."""
        if self.chosen is None:
            raise PlanError("engine.step() before any forward with gradients; nothing to apply")
        for storage in self.state.storages.values():
            none = storage.kept is None and storage.squares is None
            if none and storage.bucket.trainable:
                raise PlanError("engine.step() before any backward since the last update")
        if self.config.compile.weighted_accumulation and len(self.weights) != self.backwards:
            raise PlanError(
                f"{self.backwards} backwards and {len(self.weights)} weights since the last update: with "
                "compile.weighted_accumulation call engine.backward(loss, weight=...) every time, not "
                "loss.backward()"
            )

        self._compare_with_accumulation()

    def _compare_with_accumulation(self) -> None:
        """Say once if there are more backwards than each was weighed for."""
        number, config = self._accumulation, self.config.compile
        many = self.backwards > number > 1 and not config.weighted_accumulation
        if many and not self._compared and self.state.world.rank == 0:
            self._compared = True
            _log.warning(
                "%d backwards since the last update, each weighed 1/%d (gradient_accumulation_steps). If "
                "these are not several losses of the same %d batches, call engine.step() behind every "
                "backward: it counts them, and updates at the last",
                self.backwards,
                number,
                number,
            )

    @torch.no_grad()
    def apply(self, scheduler: LRScheduler | None) -> None:
        """Update the parameters and step the schedule, or skip both.

        On CUDA nothing waits for the device: an update is taken for applied, and at the next one, or when
        something asks, it is known whether it was. A step waits for its norm with fp16, whose loss scale
        follows it, and with a scheduler that cannot be taken back if the step may be skipped.
        """
        assert self.chosen is not None and self.optimizer is not None
        self.settle()
        program = self.chosen[1]
        if not self.early:
            self.optimizer.begin()
            self.state.ahead.settle()
        inputs = [self.input(role) for role in program.inputs]
        self.drop()
        self.since_step = 0
        (norm,) = self.execute(program, inputs)
        self.count += 1
        self._unread, self._scheduler, self._applied = Deferred(norm), scheduler, True
        lasting = scheduler is not None and not isinstance(scheduler, ConfigLR)
        if self._unread.known or self.scaler is not None or (self._skips and lasting):
            self._settle()
        self.state.version += self._applied and not self.early
        if scheduler is not None and self._applied:
            scheduler.step()

    def settle(self) -> None:
        """Know of the last update whether it was applied; if it was not, take the schedule back."""
        if self._unread is not None:
            self._settle()
            if not self._applied and isinstance(self._scheduler, ConfigLR):
                self._scheduler.undo()

    def _settle(self) -> None:
        assert self._unread is not None and self.optimizer is not None
        self._norm, self._unread = self._unread.read(), None
        self._applied = math.isfinite(self._norm) or not self._skips
        if not self._applied:
            self.optimizer.undo()
        self._take_note()

    @property
    def _skips(self) -> bool:
        """Whether a step program leaves everything as it is when the norm is not finite."""
        return self.state.precision.skips or self.config.compile.weighted_accumulation

    def input(self, role: Role) -> Any:
        """What is behind an input of a backward's or a step's program."""
        makers = {"used": self._flags, "weight": self._total_weight}
        if role.kind == "hyper":
            return self.optimizer
        return makers[role.kind]() if role.kind in makers else self.state.resolve(role)

    def _take_note(self) -> None:
        """Count a skip, and let the loss scale follow."""
        self.skipped += not self._applied
        before = self.scale
        said = (
            self.scaler.update(self._applied) if self.scaler is not None else "nothing is changed"
        )
        self._hand_on_scale()
        if self.state.world.rank == 0 and not self._applied:
            _log.warning("step %d is skipped, gradients are not finite: %s", self.count, said)
        elif self.state.world.rank == 0 and self.scale != before:
            _log.info("step %d: %s", self.count, said)

    def _hand_on_scale(self) -> None:
        if self.scaler is not None:
            self.state.scale = self.scaler.tensor(self.state.world.device)

    def _total_weight(self) -> Tensor:
        device = self.state.world.device
        return torch.tensor(sum(self.weights), dtype=torch.float64, device=device)

    def _flags(self) -> Tensor:
        """Which trainable parameters received a gradient, uint8 [parameters]."""
        assert self.chosen is not None
        trainable = [p.name for p in self.state.layout.params.values() if p.trainable]
        flags = [name in self.used for name in trainable]
        plan = self._updating or self.chosen[0]
        asked = plan.graph.unused  # other ranks are asked, on the device
        device = self.state.world.device if asked else torch.device("cpu")
        return torch.tensor(flags, dtype=torch.uint8, device=device)
