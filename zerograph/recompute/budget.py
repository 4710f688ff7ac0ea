"""budget: `compile.activation_budget` as a chooser for the pass `checkpoint`."""

from dataclasses import dataclass

from torch import fx

from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.recompute.choose import Chooser


@dataclass(frozen=True)
class Budget:
    """What the forward may keep: bytes, or, up to 1, a fraction between the least that works and all."""

    value: float

    def __call__(self, graph: TrainGraph) -> tuple[fx.Node, ...]:
        """The nodes whose values are kept. Raises PlanError if it is less than must be kept."""
        chooser = Chooser.of(graph)
        budget = chooser.budget(self.value) if self.value <= 1 else int(self.value)
        try:
            return chooser.choose(budget).keep
        except PlanError as error:
            raise PlanError(f"compile.activation_budget={self.value:g}: {error}") from error
