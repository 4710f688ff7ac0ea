"""The optimizer of a plan: what a config's section or a user's own instance comes to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zerograph.client import Client
from zerograph.codegen.rules import RULES, Described, Kind
from zerograph.config import ZeroConfig
from zerograph.errors import PlanError
from zerograph.layout import Layout


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer of a plan: its rule (or a user's class) and each parameter group's options."""

    rule: Kind
    groups: tuple[Mapping[str, Any], ...]

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state slices; a group with momentum decides for all."""
        return max((self.rule.states(group) for group in self.groups), key=len)

    @property
    def measures(self) -> bool:
        """Whether the rule needs norms of whole parameters."""
        return isinstance(self.rule, Described) and self.rule.apply is not None

    @property
    def label(self) -> str:
        """The rule and the options that change its code: sgd.momentum.nesterov."""
        if not isinstance(self.rule, Described):
            return self.rule.name
        variants = dict.fromkeys(self.rule.flags(group) for group in self.groups)
        return "|".join(".".join([self.rule.name, *sorted(flags)]) for flags in variants)


def optimizer_of(
    config: ZeroConfig, layout: Layout, client: Client | None = None
) -> OptimizerSpec | None:
    """The user's own optimizer, else the one that the config names; None without one.

    Raises PlanError for options that the rule does not have, with updates in the backward for what it
    cannot do there, and beside model-parallel ranks for a rule that needs norms of whole parameters.
    """
    spec = _spec_of(config, layout, client)
    if config.compile.update_in_backward:
        _require_early(spec, config.batch(layout.mesh.world).accumulation)
    if spec is not None and spec.measures and layout.mesh.model > 1:
        raise PlanError(
            f"{spec.rule.name} needs norms of whole parameters, and those over model-parallel ranks (here "
            f"{layout.mesh.model}) are not built; use AdamW, or give no model-parallel group"
        )
    return spec


def _require_early(spec: OptimizerSpec | None, accumulation: int) -> None:
    """Raise PlanError unless each bucket can be updated in the backward, once it is reduced."""
    key = "compile.update_in_backward"
    if accumulation > 1:
        raise PlanError(
            f"{key}: gradient_accumulation_steps is {accumulation}, and a backward applies what it reduces; "
            "set it to 1, or leave the option out"
        )
    if spec is None:
        raise PlanError(
            f"{key}: there is no optimizer to apply; give the config an `optimizer` section or "
            "compile(optimizer=...), or leave the option out"
        )
    if spec.measures or not isinstance(spec.rule, Described):
        raise PlanError(
            f"{key}: {spec.rule.name} is no rule that is applied bucket by bucket; use Adam, AdamW, SGD, "
            "Adagrad or Lion, or leave the option out"
        )


def _spec_of(
    config: ZeroConfig, layout: Layout, client: Client | None = None
) -> OptimizerSpec | None:
    if client is not None:
        return OptimizerSpec(client.kind, layout.groups)
    if config.optimizer is None:
        return None
    kind = config.optimizer.type.lower()
    decoupled = getattr(config.optimizer, "decoupled", False)
    rule = RULES["adamw" if decoupled else kind]
    given = config.optimizer.params.model_dump()
    base = {name: given.get(name, default) for name, default in rule.defaults.items()}
    for index, group in enumerate(layout.groups):
        unknown = sorted(set(group) - set(base) - {"name", "initial_lr"})
        if unknown:
            raise PlanError(
                f"parameter group {index} sets {', '.join(unknown)}, which {rule.name} does not "
                f"have; it has {', '.join(base)}"
            )
        if refused := rule.refused({**base, **group}):
            raise PlanError(f"parameter group {index} has {refused}")
    return OptimizerSpec(rule, tuple({**base, **group} for group in layout.groups))
