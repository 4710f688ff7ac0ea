"""A new layout for a model in training: when parameters that were frozen are to be trained.

Values, masters and optimizer states move, parameter by parameter, from the old buckets into the new ones.
Every rank does this together; at the peak it holds two old buckets and a new one whole.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zerograph.errors import PlanError
from zerograph.layout import Bucket, Layout, Param
from zerograph.runtime.optimizer import ShardedOptimizer
from zerograph.runtime.planner import Planner
from zerograph.runtime.programs import Programs
from zerograph.runtime.shown import require_hidden
from zerograph.runtime.state import State, Storage


def unfreeze(
    names: Sequence[str],
    state: State,
    planner: Planner,
    programs: Programs,
    optimizer: ShardedOptimizer | None,
) -> None:
    """Give parameters that were frozen at compile a place for gradients and states.

    The programs go. Raises PlanError if this is not the moment, or a parameter is in no group.
    """
    require_hidden(state, f"{names[0]} was unfrozen")
    if programs.waiting():
        raise PlanError(
            f"parameter {names[0]} was unfrozen between a forward and its backward; unfreeze it "
            "before the forward, or after the backward"
        )
    planner.require_groups({name: state.parameters[name] for name in names})
    trained = {p.name for p in state.layout.params.values() if p.trainable}
    layout, spec = planner.layout(trained)
    if optimizer is not None:
        optimizer.require_relayable()
    state.ahead.settle()
    relay(state, layout, spec.states if spec else ())
    if optimizer is not None:
        optimizer.relaid()
    programs.clear()


@torch.no_grad()
def relay(state: State, layout: Layout, states: tuple[str, ...]) -> None:
    """Give `state` the new `layout`, in place. What was not trained before starts with zero states."""
    old = _Old(state, Counter(param.bucket for param in state.layout.params.values()))
    storages: dict[str, Storage] = {}
    for bucket in layout.buckets.values():
        params = layout.bucket_params(bucket.name)
        dtype = state.precision.master(bucket.dtype) if bucket.trainable else bucket.dtype
        flat = torch.zeros(bucket.numel, dtype=dtype, device=state.world.device)
        for param in params:
            state.view(flat, param).copy_(old.value(param.name))
        storages[bucket.name] = storage = state.store(bucket, flat, states)
        for name, own in storage.states.items():
            flat = torch.zeros(bucket.numel, dtype=own.dtype, device=own.device)
            for param in params:
                if (value := old.state_value(param.name, name)) is not None:
                    state.view(flat, param).copy_(value)
            own.copy_(state.own(flat))
        for param in params:
            old.done(param.name)
    state.layout, state.storages = layout, storages


@dataclass
class _Old:
    """Full values from the old buckets, gathered once and freed after their last parameter."""

    state: State
    left: Counter[str]
    gathered: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def value(self, name: str) -> Tensor:
        return self._view(name, "", self.state.full_values)

    def state_value(self, name: str, which: str) -> Tensor | None:
        storage = self.state.storages[self._param(name).bucket]
        if which not in storage.states:
            return None
        return self._view(name, which, lambda bucket: self._full_state(storage, which))

    def done(self, name: str) -> None:
        bucket = self._param(name).bucket
        self.left[bucket] -= 1
        if not self.left[bucket]:
            for key in [key for key in self.gathered if key[0] == bucket]:
                del self.gathered[key]
            del self.state.storages[bucket]

    def _view(self, name: str, which: str, gather: Callable[[Bucket], Tensor]) -> Tensor:
        param = self._param(name)
        key = (param.bucket, which)
        if key not in self.gathered:
            self.gathered[key] = gather(self.state.layout.buckets[param.bucket])
        return self.state.view(self.gathered[key], param)

    def _full_state(self, storage: Storage, which: str) -> Tensor:
        own = storage.states[which]
        return own if self.state.stage == 0 else self.state.world.all_gather(own)

    def _param(self, name: str) -> Param:
        return self.state.layout.params[name]
