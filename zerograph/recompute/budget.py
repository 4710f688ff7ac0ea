"""budget: `compile.activation_budget` as a chooser for the pass `checkpoint`."""

from dataclasses import dataclass

from torch import fx

from zerograph.boundaries import marked
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.recompute.choose import Chooser
from zerograph.recompute.regions import Options, pins_of


@dataclass(frozen=True)
class Budget:
    """What the forward may keep: bytes, or, up to 1, a fraction between the least that works and all.

    In a graph with regions their boundaries are kept, and what lies outside; the least is that. In one
    without, the least is what gives the lowest peak.
    """

    value: float

    def __call__(self, graph: TrainGraph) -> tuple[fx.Node, ...]:
        """The nodes whose values are kept. Raises PlanError if it is less than must be kept."""
        regions = marked(graph)
        try:
            if regions:
                chooser = Chooser.of(graph, pins_of(graph, regions))
                return chooser.choose(self._bytes(chooser)).keep
            options = Options.of(graph, whole=True)
            return options.choose(self._bytes(options))[1].keep
        except PlanError as error:
            raise PlanError(f"compile.activation_budget={self.value:g}: {error}") from error

    def _bytes(self, of: Chooser | Options) -> int:
        return of.budget(self.value) if self.value <= 1 else int(self.value)
