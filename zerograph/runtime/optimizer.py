"""The optimizer that a program's `update` nodes call: groups, step counts, and runs of a slice.

It is a torch.optim.Optimizer, so that torch's learning-rate schedulers attach to it, but its
parameters have no storage; `engine.step()` updates the flat slices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zerograph.codegen.optimizers import Rule, Run, scalar_row, update
from zerograph.errors import PlanError
from zerograph.layout import Layout
from zerograph.runtime.state import State


class ShardedOptimizer(torch.optim.Optimizer):
    """The rule of the config on flat slices. Change options in `param_groups`, as with torch."""

    def __init__(self, rule: Rule, groups: Sequence[Mapping[str, Any]], state: State) -> None:
        self._rule = rule
        self._state = state
        self._take(state.layout, {})
        members: list[dict[str, Any]] = [{**group, "params": []} for group in groups]
        for param in self._trainable:
            members[param.group]["params"].append(state.parameters[param.name])
        super().__init__(members, dict(rule.defaults))

    def _take(self, layout: Layout, steps: Mapping[str, int]) -> None:
        self._layout = layout
        self._trainable = [p for p in layout.params.values() if p.trainable]
        self._index = {p.name: i for i, p in enumerate(self._trainable)}
        self._steps = [steps.get(p.name, 0) for p in self._trainable]

    def relaid(self) -> None:
        """Take the state's new layout; newly trained parameters join their groups at step 0."""
        steps = {param.name: self._steps[index] for index, param in enumerate(self._trainable)}
        self._take(self._state.layout, steps)
        for param in self._trainable:
            if param.name not in steps:
                parameter = self._state.parameters[param.name]
                self.param_groups[param.group]["params"].append(parameter)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refused: gradients are in the engine's buckets, not in `.grad`."""
        raise PlanError("call engine.step(); the optimizer's own step() has no gradients to apply")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: `engine.step()` drops gradients."""

    # What a step program calls

    def scalars(self) -> Tensor:
        """The table of scalars, fp32 [groups, columns], from options held in float64."""
        return torch.tensor([scalar_row(self._rule, group) for group in self.param_groups])

    def runs(self, bucket: str, used: Sequence[int]) -> list[Run]:
        """This rank's slice of a bucket as runs of one group and step count, unused ones left out."""
        size = self._state.storages[bucket].shard.numel()
        begin = size * self._state.world.rank if self._state.stage else 0
        runs: list[Run] = []
        for param, start, stop in self._layout.extents(bucket):
            index = self._index[param.name]
            low, high = max(start, begin) - begin, min(stop, begin + size) - begin
            if not used[index] or low >= high:
                continue
            run = Run(low, high, param.group, self._steps[index])
            if runs and (runs[-1].stop, runs[-1].group, runs[-1].step) == (
                low,
                run.group,
                run.step,
            ):
                run = Run(runs.pop().start, high, run.group, run.step)
            runs.append(run)
        return runs

    def update(
        self,
        bucket: str,
        master: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        low: Tensor | None,
        used: Tensor,
        factor: Tensor | None,
        finite: Tensor | None,
    ) -> None:
        """The target of `zero.update`: apply the rule to one bucket's slice, in place."""
        self._opt_called = True  # what torch's schedulers look at before they warn
        if finite is not None and not bool(finite):
            return
        flags = used.tolist()
        for param in self._layout.bucket_params(bucket):
            self._steps[self._index[param.name]] += bool(flags[self._index[param.name]])
        runs = self.runs(bucket, flags)
        update(self._rule, self.param_groups, runs, master, grad, states, low, factor)
