"""The optimizer that a program's `update` nodes call: groups, step counts, and runs of a slice.

It is a torch.optim.Optimizer, so that torch's learning-rate schedulers attach to it, but its
parameters have no storage; `engine.step()` updates the flat slices. With a user's own instance the
two share their group dicts, so that either one's `param_groups` may be changed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zerograph import compat
from zerograph.client import Client
from zerograph.codegen.dispatch import apply, measure, update
from zerograph.codegen.rules import Described, Kind, Run
from zerograph.errors import PlanError
from zerograph.layout import Layout, Param
from zerograph.probe import REFUSED
from zerograph.runtime.norms import by_parameter, by_run
from zerograph.runtime.state import State


class ShardedOptimizer(torch.optim.Optimizer):
    """A rule on flat slices. Change options in `param_groups`, as with torch.

    `state` has for each parameter "step" and, by torch's names, 1-D views of this rank's pieces of its
    states: empty where the rank owns nothing of it, whole at stage 0. `state_dict()` holds the same.
    """

    def __init__(
        self,
        rule: Kind,
        groups: Sequence[Mapping[str, Any]],
        state: State,
        client: Client | None = None,
    ) -> None:
        self._rule = rule
        self._state = state
        self._client = client
        self._closed = False
        self._before: list[int] = []
        self.settle: Callable[[], None] = _settled
        """Called before step counts are read; the engine may not yet know whether the last step counts."""
        self._take(state.layout, {})
        self._states = {n for s in state.storages.values() for n in s.states}
        members: list[dict[str, Any]] = [{**group, "params": []} for group in groups]
        for param in self._trainable:
            members[param.group]["params"].append(state.parameters[param.name])
        super().__init__(members, dict(rule.defaults))
        if client is not None:
            self._adopt(client)
        self._closed = True

    def _adopt(self, client: Client) -> None:
        """Share the groups of the user's instance, take its state over, and stop its own step()."""
        instance = client.instance
        self.defaults, self.param_groups = instance.defaults, instance.param_groups
        if instance.state:
            take_states(self._state, instance.state)
            self._steps = [client.steps(self._parameter(p)) for p in self._trainable]
        instance.state = defaultdict(dict)
        for name in REFUSED:
            setattr(instance, name, _refusal(type(instance).__name__, name))

    def _parameter(self, param: Param) -> torch.nn.Parameter:
        return self._state.parameters[param.name]

    def release(self) -> None:
        """Give the user's instance its own methods back, and its states in full; on all ranks."""
        if self._client is None:
            return
        instance = self._client.instance
        for name in REFUSED:
            vars(instance).pop(name, None)
        full = self._full_states()
        for param, beside in zip(self._trainable, self._all_beside()):
            if beside:
                instance.state[self._parameter(param)] = {**beside, **full[param.name]}

    def _full_states(self) -> dict[str, dict[str, Tensor]]:
        """By parameter and state, tensors of the parameter's shape and dtype."""
        full: dict[str, dict[str, Tensor]] = {p.name: {} for p in self._trainable}
        for bucket in self._layout.trainable_buckets():
            for name, own in self._state.storages[bucket.name].states.items():
                flat = own if self._state.stage == 0 else self._state.world.all_gather(own)
                for param in self._layout.bucket_params(bucket.name):
                    view = self._state.view(flat, param).to(param.model_dtype)
                    full[param.name][name] = view.clone(memory_format=torch.preserve_format)
        return full

    def _all_beside(self) -> list[dict[str, Any]]:
        """What torch keeps beside the flat states, for each trainable parameter; empty before a step."""
        self.settle()
        return [{"step": torch.tensor(float(step))} if step else {} for step in self._steps]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the groups decide the flat layout, which is fixed."""
        if self._closed:
            raise PlanError(
                "a parameter group cannot be added after zerograph.compile, which has laid the "
                "parameters out; give all groups when you compile (a frozen group may have lr 0)"
            )
        super().add_param_group(param_group)

    def _take(self, layout: Layout, steps: Mapping[str, int]) -> None:
        self._layout = layout
        self._trainable = [p for p in layout.params.values() if p.trainable]
        self._index = {p.name: i for i, p in enumerate(self._trainable)}
        self._steps = [steps.get(p.name, 0) for p in self._trainable]

    def require_relayable(self) -> None:
        """Whether the states can move to another layout; a rule's always can."""

    def relaid(self) -> None:
        """Take the state's new layout; newly trained parameters join their groups at step 0."""
        self.settle()
        steps = {param.name: self._steps[index] for index, param in enumerate(self._trainable)}
        self._take(self._state.layout, steps)
        listed = {id(p) for group in self.param_groups for p in group["params"]}
        for param in self._trainable:
            if id(parameter := self._parameter(param)) not in listed:
                self.param_groups[param.group]["params"].append(parameter)
        if self._client is None:  # the groups are ours: a state dict's order is the layout's
            order = {id(self._parameter(p)): index for index, p in enumerate(self._trainable)}
            for group in self.param_groups:
                group["params"].sort(key=lambda parameter: order[id(parameter)])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refused: gradients are in the engine's buckets, not in `.grad`."""
        raise PlanError("call engine.step(); the optimizer's own step() has no gradients to apply")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: `engine.step()` drops gradients."""

    # State

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """Per parameter: "step" and this rank's piece [elements] of each state, as views."""
        return defaultdict(dict, {self._parameter(p): self._entry(p) for p in self._trainable})

    @state.setter
    def state(self, value: object) -> None:
        """torch's constructor sets an empty table; the states lie in the engine's buckets."""

    def _entry(self, param: Param) -> dict[str, Any]:
        self.settle()
        step = torch.tensor(float(self._steps[self._index[param.name]]))
        return {"step": step, **self._views(param)}

    def _views(self, param: Param) -> dict[str, Tensor]:
        low, high = self._state.piece(param)
        states = self._state.storages[param.bucket].states
        return {name: flat[low:high] for name, flat in states.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take what `state_dict()` gave on this rank of an engine with the same layout."""
        self.settle()
        saved = state_dict["param_groups"]
        order = [p for group in self.param_groups for p in group["params"]]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise PlanError(
                "the optimizer's state dict has other parameter groups; nothing was loaded"
            )
        entries = {id(order[index]): entry for index, entry in state_dict["state"].items()}
        pairs = [(p, entries.get(id(self._parameter(p)), {})) for p in self._trainable]
        for param, entry in pairs:
            self._check(param, entry)
        for param, entry in pairs:
            self._load(param, entry)
        for group, given in zip(self.param_groups, saved):
            group.update({k: v for k, v in given.items() if k not in ("params", "param_names")})

    def _check(self, param: Param, entry: Mapping[str, Any]) -> None:
        for name, view in self._views(param).items() if entry else ():
            if name not in entry or entry[name].numel() != view.numel():
                found = entry[name].numel() if name in entry else "no"
                raise PlanError(
                    f"the optimizer's state dict has {found} elements of {name} of {param.name} and this "
                    f"rank owns {view.numel()}: it is of another rank, stage or number of ranks; nothing "
                    "was loaded"
                )

    def _load(self, param: Param, entry: Mapping[str, Any]) -> None:
        self._steps[self._index[param.name]] = int(entry.get("step", 0))
        for name, view in self._views(param).items():
            view.copy_(entry[name]) if entry else view.zero_()

    # What a step program calls

    def begin(self) -> None:
        """A step begins. Raises PlanError, before anything changes, for options that are no numbers."""
        for index, group in enumerate(self.param_groups):
            _require_numbers(self._rule, index, group)
        self._before = list(self._steps)

    def undo(self) -> None:
        """The last step was skipped: it does not count."""
        self._steps = self._before

    def runs(self, bucket: str, used: Sequence[int]) -> list[Run]:
        """This rank's slice of a bucket as runs of one group and step count, unused ones left out."""
        runs: list[Run] = []
        for run in self._apart(bucket, used).values():
            last = runs[-1] if runs else None
            if last and (last.stop, last.group, last.step) == (run.start, run.group, run.step):
                run = Run(runs.pop().start, run.stop, run.group, run.step)
            runs.append(run)
        return runs

    def _apart(self, bucket: str, used: Sequence[int]) -> dict[int, Run]:
        """The run of each used parameter with elements here, by its place among the bucket's."""
        size = self._state.storages[bucket].shard.numel()
        begin = size * self._state.world.place if self._state.stage else 0
        runs: dict[int, Run] = {}
        for place, (param, start, stop) in enumerate(self._layout.extents(bucket)):
            index = self._index[param.name]
            low, high = max(start, begin) - begin, min(stop, begin + size) - begin
            if used[index] and low < high:
                runs[place] = Run(low, high, param.group, self._steps[index])
        return runs

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
        """The target of `zero.update`: apply the rule to one bucket's slice, in place.

        `control` fp32 [2] says what gradients are multiplied by and whether anything is applied; step
        counts advance in any case, until `undo`. `norms`, float64 [parameters of the bucket, 2], are the
        sums over whole parameters of what `measure`, called before, gave.
        """
        rule, flags = self._described, used.tolist()
        named = self._named(bucket, states)
        if norms is None:
            self._advance(bucket, flags)
            runs = self.runs(bucket, flags)
            update(rule, self._options(), runs, master, grad, named, low, control)
            return
        apart = self._apart(bucket, flags)
        own = by_run(norms, tuple(apart))
        apply(rule, self._options(), list(apart.values()), master, named, low, control, own)

    def measure(
        self,
        bucket: str,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        used: Tensor,
        control: Tensor | None,
    ) -> Tensor:
        """The target of `zero.measure`: update the states of one bucket's slice, in place.

        Answers float64 [parameters of the bucket, 2], sums of squares over this rank's part of each: of
        the parameter and of its change; 0 where it has none of it, or where it is unused.
        """
        flags = used.tolist()
        self._advance(bucket, flags)
        apart = self._apart(bucket, flags)
        given = list(apart.values()), master, grad, self._named(bucket, states), control
        sums = measure(self._described, self._options(), *given)
        return by_parameter(sums, tuple(apart), len(self._layout.bucket_params(bucket)))

    @property
    def _described(self) -> Described:
        assert isinstance(self._rule, Described)
        return self._rule

    def _named(self, bucket: str, states: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._state.storages[bucket].states, states, strict=True))

    def _advance(self, bucket: str, flags: Sequence[int]) -> None:
        """Count a step of the bucket's used parameters."""
        self._stepped()
        for param in self._layout.bucket_params(bucket):
            self._steps[self._index[param.name]] += bool(flags[self._index[param.name]])

    def _stepped(self) -> None:
        compat.mark_stepped(self)
        if self._client is not None:
            compat.mark_stepped(self._client.instance)

    def _options(self) -> list[dict[str, Any]]:
        """Each group's options as they are now, as numbers."""
        named = self._rule.defaults  # groups of torch's classes lack what torch does not have
        made = [
            {name: _plain(group.get(name, default)) for name, default in named.items()}
            for group in self.param_groups
        ]
        for index, options in enumerate(made):
            late = [name for name in self._rule.states(options) if name not in self._states]
            if late:
                raise PlanError(
                    f"parameter group {index} now needs {', '.join(late)}, a state that no group had at "
                    "zerograph.compile; set the option (momentum, amsgrad) when you compile"
                )
            if isinstance(self._rule, Described) and (refused := self._rule.refused(options)):
                raise PlanError(f"parameter group {index} now has {refused}")
        return made


def _settled() -> None:
    """Nothing is open."""


def _plain(value: Any) -> Any:
    """An option as numbers; torch allows tensors for some."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value


def _refusal(kind: str, name: str) -> Callable[..., None]:
    """What stands for a method of the user's instance while an engine has it."""
    instead = {
        "step": "call engine.step(), which applies it; its own step() has no gradients",
        "add_param_group": "give all parameter groups before zerograph.compile, which lays them out",
        "state_dict": "call engine.optimizer.state_dict(), since the engine holds the states",
        "load_state_dict": "call engine.optimizer.load_state_dict(), since the engine holds the states",
    }[name]

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PlanError(f"{kind}.{name}: an engine has this optimizer; {instead}")

    compat.mark_tracked(refused)
    return refused


@torch.no_grad()
def take_states(state: State, source: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Put rank 0's states of whole parameters into the flat slices of all ranks; call it on all."""
    for bucket in state.layout.trainable_buckets():
        for name, own in state.storages[bucket.name].states.items():
            flat = torch.zeros(bucket.numel, dtype=own.dtype, device=own.device)
            for param in state.layout.bucket_params(bucket.name):
                value = source.get(state.parameters[param.name], {}).get(name)
                if value is not None and state.world.rank == 0:
                    state.view(flat, param).copy_(value)
            state.world.broadcast(flat)
            own.copy_(state.own(flat))


def _require_numbers(rule: Kind, index: int, group: Mapping[str, Any]) -> None:
    if not isinstance(rule, Described):
        return
    try:
        usable = all(math.isfinite(value) for value in rule.row(group, 1))
    except (TypeError, ValueError, ArithmeticError):
        usable = False
    if not usable:
        options = ", ".join(f"{k}={v!r}" for k, v in group.items() if k in rule.defaults)
        raise PlanError(
            f"engine.optimizer.param_groups[{index}] has options that cannot be computed with: {options}; "
            "give finite numbers in the ranges that torch.optim accepts"
        )
