"""The engine: a compiled model that trains.

    engine = zerograph.compile(model, config)
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()

The engine captures at the first call of a kind, and again when a size varies (runtime/programs.py). It owns
the model's parameters: they keep their names, shapes and dtypes, and have no values until
`zerograph.gathered` or `destroy()`.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LRScheduler

from zerograph.checkpointing import configured, configured_mpu
from zerograph.client import Given
from zerograph.config import ZeroConfig, load_config
from zerograph.errors import PlanError
from zerograph.integrations.surface import Surface
from zerograph.plan import Plan
from zerograph.planning import average_of
from zerograph.runtime import values
from zerograph.runtime.flat import optimizer_on
from zerograph.runtime.guard import Guard
from zerograph.runtime.key import call_of
from zerograph.runtime.lr_schedule import scheduler_of
from zerograph.runtime.means import Means
from zerograph.runtime.model_parallel import require_alike, world_of
from zerograph.runtime.optimizer import ShardedOptimizer
from zerograph.runtime.parameters import Parameters
from zerograph.runtime.place import place
from zerograph.runtime.planner import Planner
from zerograph.runtime.profile import Profile
from zerograph.runtime.programs import Programs
from zerograph.runtime.relayout import unfreeze
from zerograph.runtime.run import Execute, Runner
from zerograph.runtime.run import execute as as_compiled
from zerograph.runtime.shown import require_hidden
from zerograph.runtime.state import State, require_unowned
from zerograph.runtime.updates import Updates
from zerograph.runtime.world import World, current_world
from zerograph.template import dissect

_log = logging.getLogger("zerograph")


def compile(
    model: nn.Module,
    config: Mapping[str, Any] | str | os.PathLike[str] | ZeroConfig,
    *,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    optimizer: Given | None = None,
    device: str | torch.device | None = None,
    mpu: Any = None,
    mesh: DeviceMesh | None = None,
) -> "Engine":
    """Take `model` over and answer an engine that trains it as the DeepSpeed `config` says.

    `config` is a dict, a path to a JSON file, or a ZeroConfig. `param_groups` is torch's list of dicts
    with "params" and options. `optimizer` is a torch.optim instance on the model's parameters, a class or
    a function from parameters to an instance; it wins over the config's section.
    Under torchrun every rank calls this; otherwise the world is one process.
    `device` is the current CUDA device if there is one, else the CPU. Nothing is captured yet.

    For a model that is cut over model-parallel ranks, `mpu` is what Megatron's users give DeepSpeed, or
    `mesh` a DeviceMesh with the axes "dp" and "mp" (runtime/model_parallel.py): buckets are then cut over
    data-parallel ranks alone, and parameters that are parts carry `tensor_model_parallel`, as Megatron's.

    Raises ConfigError for the config, PlanError for the model or groups, AgreementError if ranks differ (also
    in what runs their kernels, and how), KernelError for a wrong ZEROGRAPH_KERNELS or launch table.
    """
    loaded = configured(load_config(config))
    if mpu is None and mesh is None:
        mpu = configured_mpu()
    world = world_of(current_world(device), mpu, mesh)
    return Engine(model, loaded, world, param_groups, optimizer)


class Engine(Surface):
    """A model in training. Made by `zerograph.compile`."""

    def __init__(
        self,
        model: nn.Module,
        config: ZeroConfig,
        world: World,
        param_groups: Sequence[Mapping[str, Any]] | None = None,
        optimizer: Given | None = None,
    ) -> None:
        require_unowned(model)
        self.module = model
        self.config = config
        self.world = world = world.over(config.mesh(world.size, world.mesh.model))
        self.batch = config.batch(world.size)
        self._planner = Planner.of(model, config, world, param_groups, optimizer)
        layout, spec = self._planner.layout()
        self._planner.agreement.agree_on_kernels(type(model).__name__)
        shares = config.activation_checkpointing.partition_activations
        require_alike(world, layout, model, shares)
        stage, precision = config.zero_optimization.stage, self._planner.precision
        states = spec.states if spec else ()
        self.state = State.take_over(model, layout, precision, stage, world, states)
        self.optimizer: ShardedOptimizer | None = (
            optimizer_on(spec.rule, spec.groups, self.state, self._planner.client) if spec else None
        )
        self.lr_scheduler: LRScheduler | None = scheduler_of(config, self.optimizer)
        self.micro_steps = 0
        late = stage < 2 or world.mesh.copies
        early = not late or self.batch.accumulation == 1
        self._means = Means(self.state, average_of(config, world.size), early)
        self._updates = Updates.of(config, self.state, self.optimizer)
        self._programs = Programs(type(model).__name__)
        self._plan: Plan | None = None
        self._run = Runner(model, self.state, self._updates, self._received)
        self._parameters = Parameters.of(model)
        self._guard = Guard(self.state)

    # Training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward; what comes back is what the model itself returns."""
        self.require_alive()
        self._updates.require_open("a call of the engine")
        tensors, rebuild = dissect((args, kwargs))
        placed = place(tensors, self.world.device, self.state.precision)
        named = [(path, tensor) for (path, _), tensor in zip(tensors, placed)]
        with self._guard.lifted():
            self._heed_parameters()
            args, kwargs = rebuild(placed)
            call = call_of(self.module, (args, kwargs), named)
            make = partial(self._planner.compile, args, kwargs, self.state.layout, self._adopt)
            compiled = self._programs.find(call, make)
        return self._run(compiled, placed)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, *, weight: float | None = None
    ) -> Tensor:
        """Backpropagate a scalar loss; `loss.backward()` does the same. Answers the loss.

        Every backward of an accumulation weighs the same: the mean over micro-batches is applied. With
        `compile.weighted_accumulation` it is the mean weighted by `weight` (tokens, say) over the
        micro-batches of all ranks, and every backward needs one. In fp16 the loss is scaled within.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            mend = "take it from the engine's outputs outside torch.no_grad()"
            if not any(self._parameters.trained):
                mend = "no parameter of the model is trainable, so call requires_grad_() on some"
            raise PlanError(
                f"engine.backward needs a scalar loss that requires grad, got {what}; {mend}"
            )
        gradient = self._updates.gradient_of(loss, weight)
        loss.backward(gradient, retain_graph)  # type: ignore[no-untyped-call]
        if gradient is not None:
            self._updates.weights.append(gradient.item())
        return loss

    def step(self) -> None:
        """At the boundary of gradient accumulation: reduce, clip, update. Otherwise only count.

        Call it behind every backward. Raises PlanError if there was none since the last call.
        """
        self.require_alive()
        if self.optimizer is None:
            raise PlanError(
                'engine.step() needs an optimizer; give compile(optimizer=...), or add {"optimizer": '
                '{"type": "AdamW", "params": {"lr": 1e-3}}} to the config'
            )
        require_hidden(self.state, "engine.step()")
        if self.is_gradient_accumulation_boundary():
            self._updates.require_ready()
            self._updates.apply(self.lr_scheduler)
        else:
            self._updates.end_micro_batch()
        self.micro_steps += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step()` updates parameters."""
        return (self.micro_steps + 1) % self.batch.accumulation == 0

    def get_global_grad_norm(self) -> float | None:
        """The 2-norm of the mean gradient at the last update, before clipping; None before it."""
        return self._updates.norm

    @property
    def loss_scale(self) -> float:
        """What the loss of the next backward is multiplied by; 1 without fp16."""
        return self._updates.scale

    @property
    def global_steps(self) -> int:
        """Updates so far, skipped ones included."""
        return self._updates.count

    @property
    def skipped_steps(self) -> int:
        """Updates that were skipped because gradients were not finite."""
        self._updates.settle()
        return self._updates.skipped

    def was_step_applied(self) -> bool:
        """Whether the last update changed the parameters: it is skipped if gradients are not finite."""
        return self._updates.applied

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients kept since the last update; the boundary of accumulation stays.

        Raises PlanError if the backward has applied them (`compile.update_in_backward`).
        """
        self._updates.require_open("engine.zero_grad()")
        self._updates.drop()

    def train(self, mode: bool = True) -> "Engine":
        self.module.train(mode)
        return self

    def eval(self) -> "Engine":
        return self.train(False)

    @property
    def training(self) -> bool:
        return self.module.training

    # Looking

    @property
    def device(self) -> torch.device:
        """Where the engine computes; inputs are moved there."""
        return self.world.device

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group; empty without an optimizer."""
        self._updates.settle()
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [float(group["lr"]) for group in groups]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters: names, shapes and dtypes, without values."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    @property
    def plan(self) -> Plan:
        """The plan of the step that ran last: the very graph that runs."""
        if self._plan is None:
            raise PlanError("nothing is planned before the first call of the engine")
        return self._plan

    def profile(self, steps: int) -> Profile:
        """Measure the communication of the next updates, `steps` in number, of this rank's programs.

            profile = engine.profile(5)
            train()                        # it ends by itself, with a line in the log
            print(profile)
            profile.save("trace.json")

        As a context manager it ends with its block, if that is earlier. Other ranks may profile or not.
        Programs run as compiled; numerics do not change. Raises PlanError if `steps` is not positive, or
        while the engine is recorded or profiled.
        """
        self.require_alive()
        return Profile.begin(self, steps)

    def gradients(self) -> dict[str, Tensor | None]:
        """Every trainable parameter's mean gradient so far, full, by name; call it on all ranks.

        It is what a step would reduce now, rounded as the step does, before clipping. Loss scale and weights
        are divided out, in the dtype that gradients are kept in. None for a parameter that received none
        on this rank since the last update. Raises PlanError with `compile.update_in_backward`.
        """
        self.require_alive()
        if self._updates.early:
            raise PlanError(
                "engine.gradients(): with compile.update_in_backward a backward applies each gradient and "
                "frees it; leave the option out to read gradients"
            )
        means = self._means.full()
        return values.gradients(self.state, means, self._updates.used, self._updates.divisor())

    # Values

    def state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """The model's state dict in full, on the CPU; call it on all ranks.

        Names are the model's own, tied ones and persistent buffers (rank 0's) included. With
        `rank0_only` the other ranks answer an empty dict.
        """
        self.require_alive()
        return values.state_dict(self.state, rank0_only)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Take parameters and buffers from a full state dict; call it on all ranks with the same."""
        self.require_alive()
        require_hidden(self.state, "engine.load_state_dict()")
        values.load_state_dict(self.state, state_dict, strict)

    def destroy(self) -> nn.Module:
        """Give the model its full parameters back, on all ranks, and end the engine. Answers it."""
        self.require_alive()
        require_hidden(self.state, "engine.destroy()")
        values.give_back(self.state)
        if self.optimizer is not None:
            self.optimizer.release()
        self._programs.clear()
        self._guard.remove()
        self._run.arenas.release()
        self.state.storages.clear()
        return self.module

    # Inside

    def execute_with(self, execute: Execute) -> None:
        """Let `execute` run this engine's programs from now on.

        Raises PlanError if neither it nor what runs them now is the plain one of run.py.
        """
        if as_compiled not in (execute, self._run.execute):
            raise PlanError(
                "this engine is being recorded or profiled already; end that (leave its `with` block, or "
                "call the profile's end()) first"
            )
        self._run.execute = self._updates.execute = execute

    def require_alive(self) -> None:
        if not self.state.storages and self.state.layout.buckets:
            raise PlanError("this engine was destroyed; compile the model again")

    def _heed_parameters(self) -> None:
        """Before a call: whether the model's parameters are still ours, and which are frozen now."""
        now = Parameters.of(self.module)
        if now == self._parameters:
            return
        changed = self._parameters.changes(now, self._updates.pending)
        _log.info("%s: the step is traced again", changed)
        frozen = (p.name for p in self.state.layout.params.values() if not p.trainable)
        thawed = [name for name in frozen if self.state.parameters[name].requires_grad]
        if thawed:
            unfreeze(thawed, self.state, self._planner, self._programs, self.optimizer)
            self._plan = self._updates.chosen = None
        self._parameters = now

    def _adopt(self, made: Plan) -> None:
        self._plan = made
        self._updates.adopt(made)

    def _received(self, planned: Plan) -> None:
        self._updates.received(planned)
        self._plan = planned
