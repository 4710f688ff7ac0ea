"""A user's own optimizer: an instance, a class or a factory, and what stands in for it.

    zerograph.compile(model, config, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4))
    zerograph.compile(model, config, optimizer=torch.optim.AdamW)
    zerograph.compile(model, config, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4))

torch's Adam, AdamW, SGD and Adagrad become the rules of `codegen`. Any other class runs itself on flat
slices, if the config opts in and `probe` proves it elementwise.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerograph import compat
from zerograph.codegen.rules import ADAGRAD, ADAM, ADAMW, SGD, Described, Kind
from zerograph.config import ZeroConfig
from zerograph.errors import PlanError
from zerograph.probe import WHOLE, elementwise_states

Given: TypeAlias = Optimizer | Callable[[Any], Optimizer]
"""What `optimizer=` takes; a class is a callable too."""
Groups: TypeAlias = Sequence[Mapping[str, Any]]

RULES: dict[type[Optimizer], Described] = {
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAMW,
    torch.optim.SGD: SGD,
    torch.optim.Adagrad: ADAGRAD,
}
"""Exact types that have a rule; a subclass may do anything."""


@dataclass(frozen=True)
class Client:
    """A user's optimizer, checked against the model."""

    instance: Optimizer
    kind: Kind
    """The rule that does what it does, or for a class that runs itself its name and states."""

    @property
    def groups(self) -> Groups:
        return self.instance.param_groups

    def steps(self, parameter: Tensor) -> int:
        """Updates of `parameter` before the engine took over."""
        held = self.instance.state.get(parameter, {})
        return int(held["step"] if "step" in held else bool(held))


def client_of(
    given: Given, model: nn.Module, config: ZeroConfig, param_groups: Iterable[Any] | None = None
) -> Client:
    """Make the instance (a callable gets `param_groups`, or the trainable parameters) and check it.

    Raises PlanError for parameters of another model, and for a class that cannot run on flat slices.
    """
    instance = _instance(given, model, param_groups)
    _require_own_parameters(instance, model)
    if any(group.get("differentiable") for group in instance.param_groups):
        raise PlanError(
            f"optimizer={type(instance).__name__}(differentiable=True): the update is not recorded by "
            "autograd; leave it out"
        )
    if compat.has_step_hooks(instance):
        raise PlanError(
            f"optimizer={type(instance).__name__}: it has step hooks, which would not be called; remove "
            "them, and do their work after engine.step()"
        )
    rule = RULES.get(type(instance))
    if rule is not None:
        return Client(instance, _decoupled(instance, rule))
    name = type(instance).__name__
    whole = name.lower() in map(str.lower, WHOLE)
    if not config.zero_allow_untested_optimizer and not whole:
        raise PlanError(
            f"optimizer={name}: only torch.optim.Adam, AdamW, SGD and Adagrad are built in; to run the "
            'class itself on flat slices, set "zero_allow_untested_optimizer": true in the config'
        )
    states = elementwise_states(instance)
    return Client(instance, Kind(name, {}, lambda options: states, ()))


def _instance(given: Given, model: nn.Module, param_groups: Iterable[Any] | None) -> Optimizer:
    if isinstance(given, Optimizer):
        if param_groups is not None:
            raise PlanError(
                f"both optimizer={type(given).__name__}(...) and param_groups are given; the instance "
                "has groups already, so leave param_groups out"
            )
        return given
    if not callable(given):
        raise PlanError(
            f"optimizer={given!r} is neither a torch.optim.Optimizer nor a class or function that makes "
            "one; an optimizer by name goes into the config's `optimizer` section"
        )
    named = getattr(given, "__name__", type(given).__name__)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise PlanError(f"optimizer={named}: no parameter of {type(model).__name__} is trainable")
    try:
        made = given(trainable if param_groups is None else param_groups)
    except TypeError as error:
        raise PlanError(
            f"optimizer={named}: calling it with the parameters alone failed ({error}); give a "
            f"function: optimizer=lambda params: {named}(params, lr=...)"
        ) from error
    if not isinstance(made, Optimizer):
        raise PlanError(
            f"optimizer={named}: it answered {type(made).__name__}, not a torch.optim.Optimizer"
        )
    return made


def _require_own_parameters(instance: Optimizer, model: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for index, group in enumerate(instance.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise PlanError(
                    f"optimizer={type(instance).__name__}: its parameter group {index} holds a "
                    f"parameter of shape {list(parameter.shape)} that is not one of "
                    f"{type(model).__name__}'s; build it on the parameters of the very model that you "
                    "compile"
                )


def _decoupled(instance: Optimizer, rule: Described) -> Described:
    """torch's Adam is AdamW where its groups say so."""
    said = {bool(group.get("decoupled_weight_decay", False)) for group in instance.param_groups}
    if type(instance) is torch.optim.Adam and len(said) > 1:
        raise PlanError(
            "optimizer=Adam: decoupled_weight_decay differs between its parameter groups; one rule "
            "updates all of them, so give every group the same"
        )
    return ADAMW if type(instance) is torch.optim.Adam and said == {True} else rule
