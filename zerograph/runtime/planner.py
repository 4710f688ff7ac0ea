"""What an engine plans with: its model's layout and its programs, which all ranks agree on.

layout     buckets and optimizer, from what was given to zerograph.compile
compile    the programs of one kind of call: trace, plan, lower the forward
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from zerograph.bucketing import limits_of, within
from zerograph.client import Client, Given, client_of
from zerograph.config import ZeroConfig
from zerograph.errors import PlanError
from zerograph.layout import Layout, layout_of
from zerograph.mesh import MODEL
from zerograph.optimizer import OptimizerSpec, optimizer_of
from zerograph.plan import Plan
from zerograph.planning import plan_of
from zerograph.precision import Precision, precision_of, short
from zerograph.runtime.agree import Agreement
from zerograph.runtime.model_parallel import joins_model
from zerograph.runtime.programs import Dims
from zerograph.runtime.run import Compiled
from zerograph.runtime.world import World
from zerograph.trace import trace


@dataclass
class Planner:
    """The model, the config and the optimizer of one engine, as they were given."""

    module: nn.Module
    config: ZeroConfig
    world: World
    precision: Precision
    client: Client | None
    """The user's own optimizer."""
    param_groups: Sequence[Mapping[str, Any]] | None
    """Those of the user's own optimizer, else those that were given."""
    agreement: Agreement

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: ZeroConfig,
        world: World,
        param_groups: Sequence[Mapping[str, Any]] | None,
        optimizer: Given | None,
    ) -> "Planner":
        """Raises PlanError for the optimizer; warns if the config names another one."""
        precision = precision_of(model, config)
        client = None if optimizer is None else client_of(optimizer, model, config, param_groups)
        if client is not None and config.optimizer is not None:
            warnings.warn(
                f"optimizer={type(client.instance).__name__} is used, and the config's `optimizer` section "
                f"({config.optimizer.type}) is not; leave one of them out",
                stacklevel=4,  # at the user's zerograph.compile
            )
        groups = client.groups if client else param_groups
        return cls(model, config, world, precision, client, groups, Agreement(world))

    def layout(self, trained: Collection[str] = ()) -> tuple[Layout, OptimizerSpec | None]:
        """The buckets and the optimizer, the same on all ranks.

        `trained` are parameters that keep a place for gradients although they may be frozen now. Raises
        PlanError for the model or its groups, AgreementError if ranks differ.
        """
        mesh = self.world.mesh
        blocks = layout_of(
            self.module, mesh.world, self.precision, self.param_groups, trained, mesh.model
        )
        layout = within(blocks, limits_of(self.config)).over(mesh)
        spec = optimizer_of(self.config, layout, self.client)
        what = f"the layout of {type(self.module).__name__}"
        self.agreement.agree(what, self._lines(layout, spec))
        self.agreement.agree_on_model(what, self._shared(layout, spec))
        return layout, spec

    def compile(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layout: Layout,
        adopt: Callable[[Plan], None],
        dynamic: Dims,
    ) -> Compiled:
        """Trace and plan one call. `adopt` is told of every plan made, for other gradients later too."""
        joins = partial(joins_model, self.world)
        traced = trace(
            self.module,
            args,
            kwargs,
            layout=layout,
            precision=self.precision,
            device=self.world.device,
            dynamic=dynamic,
        )

        def make_plan(arriving: tuple[str, ...] | None = None) -> Plan:
            how = self.world.algorithm
            made = plan_of(traced, self.config, arriving, self.client, algorithm=how, joins=joins)
            kind = "a training step" if made.graph.training else "a forward"
            what = f"{kind} of {made.graph.model}"
            self.agreement.agree(what, made.signature())
            self.agreement.agree_on_model(what, made.signature(MODEL))
            adopt(made)
            return made

        planned, group = make_plan(), self.world.name_of
        return Compiled(traced, planned, planned.program("forward", group), make_plan, group)

    def require_groups(self, thawed: Mapping[str, Tensor]) -> None:
        """An unfrozen parameter must have been given an optimizer group at compile, if any were."""
        if self.param_groups is None:
            return
        given = {p if isinstance(p, str) else id(p) for g in self.param_groups for p in g["params"]}
        for name, parameter in thawed.items():
            if not given & {name, id(parameter)}:
                raise PlanError(
                    f"parameter {name} was unfrozen and is in no parameter group; give every parameter "
                    "that is ever trained to the groups (or the optimizer) when you compile: frozen "
                    "ones may be in them"
                )

    def _lines(self, layout: Layout, spec: OptimizerSpec | None) -> list[str]:
        """What ranks compare of a layout."""
        client = self.client
        lines = [self._head(spec), *layout.mesh.lines()]
        for bucket in layout.buckets.values():
            lines += [f"{bucket.name} is persistent"] if bucket.persistent else []
            for param in layout.bucket_params(bucket.name):
                shape = list(param.shape)
                line = f"{bucket.name} {param.name} {short(param.dtype)} {shape}"
                taken = client.steps(self.module.get_parameter(param.name)) if client else 0
                lines.append(f"{line} after {taken} steps" if taken else line)
        return lines

    def _shared(self, layout: Layout, spec: OptimizerSpec | None) -> list[str]:
        """What model-parallel ranks compare of a layout: all but the shapes of their parts."""
        lines = [self._head(spec), *layout.mesh.lines()]
        for param in layout.params.values():
            shape = "own part" if param.parallel else list(param.shape)
            trained = "trainable" if param.trainable else "frozen"
            lines.append(f"{param.name} {short(param.dtype)} {shape} {trained}")
        return lines

    def _head(self, spec: OptimizerSpec | None) -> str:
        config = self.config
        return (
            f"stage {config.zero_optimization.stage}, "
            f"accumulation {config.batch(self.world.size).accumulation}, "
            f"clipping {config.gradient_clipping}, optimizer {spec.rule.name if spec else 'none'}"
        )
