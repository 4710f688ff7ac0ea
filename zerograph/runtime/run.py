"""Running the programs of one captured call, as one autograd node.

    forward program   inputs, buffers, parameters            ->  results, saved values
    backward program  saved values, gradients, parameters    ->  kept gradients, input gradients

The backward program is made for the gradients that arrive, at the first backward with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from zerograph import compat
from zerograph.errors import PlanError, ZerographError
from zerograph.nodes import Role, role_of
from zerograph.passes.lower import GroupName, Program
from zerograph.plan import Plan
from zerograph.runtime.arenas import Arenas, require_placed
from zerograph.runtime.state import State
from zerograph.trace import Trace


@dataclass
class Compiled:
    """What one kind of call runs: its forward, and a backward for each set of arriving gradients."""

    traced: Trace
    plan: Plan
    forward: Program
    make_plan: Callable[[tuple[str, ...]], Plan]
    """Plans the step for other arriving gradients, agreeing with the other ranks."""
    group: GroupName
    backwards: dict[tuple[str, ...], tuple[Plan, Program]] = field(default_factory=dict)
    waiting: "WeakSet[Any]" = field(default_factory=WeakSet)
    """The autograd nodes whose backward has not run, as long as they can still run."""

    def backward(self, arriving: tuple[str, ...]) -> tuple[Plan, Program]:
        if arriving not in self.backwards:
            planned = arriving == _arriving(self.plan)
            plan = self.plan if planned else self.make_plan(arriving)
            self.backwards[arriving] = (plan, plan.program("backward", self.group))
        return self.backwards[arriving]


def _arriving(plan: Plan) -> tuple[str, ...]:
    """The outputs whose gradients a plan's backward takes, in the order of the results."""
    names = {role_of(node).name for node in plan.graph.placeholders("tangent")}
    return tuple(r.name for r in plan.graph.results if r.name in names and r.differentiable)


Execute = Callable[[Program, list[Any]], tuple[Any, ...]]
"""Runs a program on a list of inputs, which it empties."""


def execute(program: Program, inputs: list[Any]) -> tuple[Any, ...]:
    """Run a program as it was compiled; while a run is recorded another function takes its place."""
    return cast(tuple[Any, ...], program.module(inputs))


class Applying(Protocol):
    """What of an engine's updates a backward meets, which may be the one that applies them."""

    def require_open(self, what: str) -> None:
        """Raise PlanError if `what` may not come between the last backward and the step."""

    def begin(self, plan: Plan) -> None:
        """A backward of `plan` begins."""

    def input(self, role: Role) -> Any:
        """What is behind an input of a program that is the engine's own."""


@dataclass
class Runner:
    """Runs compiled calls on one engine's state."""

    module: nn.Module
    state: State
    updates: "Applying"
    received: Callable[[Plan], None]
    """Told the plan of every backward that ran."""
    execute: Execute = execute
    arenas: Arenas = field(default_factory=Arenas)
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    """An input that requires grad, so that autograd always has a reason to come back."""

    def __call__(self, compiled: Compiled, tensors: Sequence[Tensor]) -> Any:
        """The model's return value for a call whose tensors are `tensors`."""
        inputs = [tensors[index] for index in compiled.traced.inputs]
        sizes = compiled.plan.graph.sizes.values(tensors)
        if compiled.plan.graph.training:
            results = _Step.apply(self, compiled, sizes, self.anchor, *inputs)  # type: ignore[no-untyped-call]
        else:
            results, _ = self.forward(compiled, sizes, inputs)
        values = {"result": results, "input": tensors, "buffer": _Buffers(self.module)}
        picked = [values[kind][where] for kind, where in compiled.traced.sources]  # type: ignore[index]
        return compiled.traced.rebuild(picked)

    def forward(
        self,
        compiled: Compiled,
        sizes: tuple[int, ...],
        inputs: Sequence[Tensor],
        lent: Mapping[str, Tensor] | None = None,
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """(results in the order of the graph's outputs, saved values); buffers are updated.

        `lent` are the arenas for what is saved.
        """
        graph = compiled.plan.graph
        by_name = dict(zip((role_of(n).name for n in graph.placeholders("input")), inputs))
        by_symbol = dict(zip((size.name for size in graph.sizes.symbols), sizes))
        given: dict[str, Mapping[str, Any]]
        given = {"input": by_name, "size": by_symbol, "arena": lent or {}}
        values = [self._input(role, compiled, given) for role in compiled.forward.inputs]
        returned = self.execute(compiled.forward, values)
        count = compiled.forward.outputs
        results, saved = returned[:count], list(returned[count:])
        kept = []
        for entry, value in zip(graph.results, results, strict=True):
            if entry.kind == "output":
                kept.append(value)
            elif entry.kind == "update":
                self.module.get_buffer(entry.name).copy_(value)
            else:
                by_name[entry.name].copy_(value)
        return tuple(kept), saved

    def backward(
        self,
        compiled: Compiled,
        sizes: tuple[int, ...],
        saved: dict[str, Any],
        gradients: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Run the backward for `gradients`; keeps the parameters', answers the inputs'."""
        order = [r.name for r in compiled.plan.graph.results if r.name in gradients]
        plan, program = compiled.backward(tuple(order))
        self.updates.begin(plan)
        expected = {role_of(n).name: n.meta["val"] for n in plan.graph.placeholders("tangent")}
        gradients = {
            name: _as(g, plan.graph.sizes.evaluate(expected[name].stride(), sizes), expected[name])
            for name, g in gradients.items()
        }
        values: list[Any] = []
        for role in program.inputs:
            source = {"saved": saved, "tangent": gradients}.get(role.kind)
            values.append(self.updates.input(role) if source is None else source[role.name])
        saved.clear()
        gradients.clear()
        returned = self.execute(program, values)
        answers: dict[str, Tensor] = {}
        for entry, value in zip(plan.graph.gradients, returned, strict=True):
            if entry.kind == "kept":
                self.state.storages[entry.name].kept = value
            elif entry.kind == "squares":
                self.state.storages[entry.name].squares = value
            else:
                answers[entry.name] = value
        self.received(plan)
        return answers

    def _input(self, role: Role, compiled: Compiled, given: Mapping[str, Mapping[str, Any]]) -> Any:
        if role.kind in given:
            return given[role.kind][role.name]
        if role.kind == "buffer":
            return self.module.get_buffer(role.name)
        if role.kind == "constant":
            return compiled.traced.constants[role.name]
        return self.state.resolve(role)


class _Buffers:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Tensor:
        return self._module.get_buffer(name)


def _as(gradient: Tensor, stride: tuple[int, ...], expected: Tensor) -> Tensor:
    """A gradient in the strides and dtype that the backward was captured for."""
    if gradient.stride() == stride and gradient.dtype == expected.dtype:
        return gradient
    made = torch.empty_strided(gradient.shape, stride, dtype=expected.dtype, device=gradient.device)
    return made.copy_(gradient)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """The tensors that the forward saved; they are freed by the first backward."""
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise  # a saved tensor was changed in place: torch says which
        raise PlanError(
            "backward a second time through the same forward, whose saved values the first one freed; "
            "call the engine again, sum the losses, or keep them with "
            "engine.backward(loss, retain_graph=True)"
        ) from None


class _Step(torch.autograd.Function):
    """The autograd node. `apply(runner, compiled, sizes, anchor, *inputs)` answers the results."""

    @staticmethod
    def forward(
        ctx: Any,
        runner: Runner,
        compiled: Compiled,
        sizes: tuple[int, ...],
        anchor: Tensor,
        *inputs: Tensor,
    ) -> tuple[Any, ...]:
        lent = runner.arenas.lend(compiled.plan.graph, sizes)
        results, saved = runner.forward(compiled, sizes, inputs, lent)
        ctx.lent = lent  # they are free once this is let go of
        ctx.runner, ctx.compiled, ctx.sizes = runner, compiled, sizes
        ctx.version = runner.state.version
        named = dict(zip(compiled.forward.saved, saved, strict=True))
        require_placed(compiled.forward.placed, named, lent, compiled.plan.graph.model)
        # what is still to come is written while it is saved: autograd would refuse it as changed
        there = {n: value for n, value in named.items() if n not in compiled.forward.pending}
        tensors = {name: value for name, value in there.items() if isinstance(value, Tensor)}
        ctx.save_for_backward(*tensors.values())
        ctx.names = tuple(tensors)
        ctx.scalars = {name: value for name, value in named.items() if name not in tensors}
        ctx.set_materialize_grads(False)
        entries = [r for r in compiled.plan.graph.results if r.kind == "output"]
        fixed = [v for r, v in zip(entries, results) if not r.differentiable]
        ctx.mark_non_differentiable(*(v for v in fixed if isinstance(v, Tensor)))
        compiled.waiting.add(ctx)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ZerographError(
                "backward(create_graph=True) is not supported: the captured backward is not itself "
                "differentiable; compute the first gradient with the original model"
            )
        ctx.runner.updates.require_open("a second backward")
        if ctx.version != ctx.runner.state.version:
            raise PlanError(
                "the parameters were changed (engine.step(), loading, gathered) between this forward and "
                "its backward, whose gradients would be those of neither; call the engine again"
            )
        compiled: Compiled = ctx.compiled
        graph = compiled.plan.graph
        saved = {**dict(zip(ctx.names, _saved(ctx), strict=True)), **ctx.scalars}
        lent = ctx.lent  # held for as long as this backward reads them
        if compat.clear_saved(ctx):
            ctx.scalars, ctx.lent = {}, None
        compiled.waiting.discard(ctx)
        entries = [r for r in graph.results if r.kind == "output"]
        arrived = {r.name: g for r, g in zip(entries, gradients, strict=True) if g is not None}
        answers = ctx.runner.backward(compiled, ctx.sizes, saved, arrived)
        del lent
        names = [role_of(node).name for node in graph.placeholders("input")]
        return (None, None, None, None, *(answers.get(name) for name in names))
