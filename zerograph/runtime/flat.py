"""A user's own optimizer class on flat slices.

Each bucket has an instance of the class whose parameters are this rank's pieces of the bucket's
parameters, 1-D, sharing the master slice's memory. One piece a parameter, so that one without a
gradient is left alone. States with one value an element are moved into the engine's flat states
after the first step; what else the class keeps (step counts) stays with its instance.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zerograph.client import Client
from zerograph.codegen.rules import Described
from zerograph.errors import PlanError
from zerograph.layout import Param
from zerograph.probe import like
from zerograph.runtime.optimizer import ShardedOptimizer
from zerograph.runtime.state import State


class FlatOptimizer(ShardedOptimizer):
    """The class of `client` on flat slices; `probe` has shown that it is elementwise."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, client: Client) -> None:
        before = dict(client.instance.state)
        super().__init__(client.kind, groups, state, client)
        self._pieces = {p.name: self._new_piece(p) for p in self._trainable}
        self._instances = {
            bucket.name: self._instance(client, bucket.name)
            for bucket in self._layout.trainable_buckets()
        }
        self._seen = {name: self._current() for name in self._instances}
        for param in self._trainable:
            if held := before.get(self._parameter(param)):
                self._load(param, {**held, **self._views(param)})

    def _all_beside(self) -> list[dict[str, Any]]:
        """From whichever rank has a piece of the parameter."""
        mine = [self._beside(param) for param in self._trainable]
        ranks = self._state.world.gather_objects(mine)
        return [next((beside for beside in found if beside), {}) for found in zip(*ranks)]

    def _beside(self, param: Param) -> dict[str, Any]:
        views = self._views(param)
        return {k: v for k, v in self._held(param).items() if k not in views}

    def require_relayable(self) -> None:
        """Refuse: what the class keeps beside its flat states has no place in another layout."""
        raise PlanError(
            f"a parameter that was frozen at compile is to be trained, and {self._rule.name} runs itself "
            "on flat slices, which cannot be laid out anew; compile with every parameter trainable that "
            "ever will be, and freeze it after"
        )

    def _new_piece(self, param: Param) -> nn.Parameter:
        low, high = self._state.piece(param)
        master = self._state.storages[param.bucket].master
        assert master is not None
        return nn.Parameter(master[low:high])

    def _instance(self, client: Client, bucket: str) -> torch.optim.Optimizer:
        groups = [{**group, "params": []} for group in self._current()]
        for param in self._layout.bucket_params(bucket):
            if self._pieces[param.name].numel():
                groups[param.group]["params"].append(self._pieces[param.name])
        return like(client.instance, groups)

    def _current(self) -> list[dict[str, Any]]:
        return [
            {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
            for group in self.param_groups
        ]

    def _held(self, param: Param) -> dict[str, Any]:
        held: dict[str, Any] = self._instances[param.bucket].state[self._pieces[param.name]]
        return held

    def _entry(self, param: Param) -> dict[str, Any]:
        held = self._held(param)
        return {**held, **self._views(param)} if held else {}

    def _load(self, param: Param, entry: Mapping[str, Any]) -> None:
        views = self._views(param)
        for name, view in views.items():
            view.copy_(entry[name]) if entry else view.zero_()
        held = {k: copy.deepcopy(v) for k, v in entry.items() if k not in views}
        if self._pieces[param.name].numel():
            self._instances[param.bucket].state[self._pieces[param.name]] = (
                {**held, **views} if entry else {}
            )

    def _take_options(self, bucket: str) -> None:
        """Hand on the options that changed since the bucket's last step, and no others.

        The class may count in its own groups.
        """
        now = self._current()
        for own, group, seen in zip(self._instances[bucket].param_groups, now, self._seen[bucket]):
            own.update({k: v for k, v in group.items() if k not in seen or differs(v, seen[k])})
        self._seen[bucket] = now

    def update(
        self,
        bucket: str,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        low: Tensor | None,
        used: Tensor,
        control: Tensor | None,
        norms: Tensor | None = None,
    ) -> None:
        """The target of `zero.update`: one step of the class on the bucket's pieces.

        On CUDA this waits for `control`, since the class runs on the host.
        """
        self._stepped()
        factor, applies = control.tolist() if control is not None else (None, True)
        if not applies:
            return
        flags = used.tolist()
        params = self._layout.bucket_params(bucket)
        given = [p for p in params if flags[self._index[p.name]] and self._pieces[p.name].numel()]
        for param in given:
            start, stop = self._state.piece(param)
            own = grad[start:stop].to(master.dtype)
            self._pieces[param.name].grad = own if factor is None else own * factor
        self._take_options(bucket)
        self._instances[bucket].step()
        for param in given:
            self._pieces[param.name].grad = None
            self._keep_states(param)
        if low is not None:
            low.copy_(master)

    def undo(self) -> None:
        """Nothing: a step that does not apply does not reach the class."""

    def _keep_states(self, param: Param) -> None:
        """Let the states of a piece lie in the engine's flat states."""
        held = self._held(param)
        for name, view in self._views(param).items():
            if name in held and held[name] is not view:
                view.copy_(held[name])
                held[name] = view


def differs(one: Any, other: Any) -> bool:
    """Whether an option changed; tensors by their values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    return bool(one != other)


def optimizer_on(
    kind: Any, groups: Sequence[Mapping[str, Any]], state: State, client: Client | None
) -> ShardedOptimizer:
    """The engine's optimizer: a rule, or a user's class where it has none."""
    if client is not None and not isinstance(client.kind, Described):
        return FlatOptimizer(groups, state, client)
    return ShardedOptimizer(kind, groups, state, client)
