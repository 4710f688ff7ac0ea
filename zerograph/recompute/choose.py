"""choose: what to keep of a forward under a budget of bytes, so that the FLOPs repeated are least.

    graph --Reading--> problem --pieces_of--> pieces --exact or cut--> a curve each --sum--> one curve
    budget --> the point of the curve with the most bytes that fit --> what each piece keeps

The curve does not depend on the budget: so a larger budget never means more work, and ten budgets cost no
more than one. Nothing but shapes and static costs decides, so every rank chooses the same.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import fx

from zerograph.cost.cluster import Device
from zerograph.cost.work import Work
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.precision import short
from zerograph.recompute import cut, exact
from zerograph.recompute.curve import EMPTY, Curve, Ints, Single, times, total
from zerograph.recompute.pieces import Piece, Shape, pieces_of
from zerograph.recompute.problem import Problem, Reading
from zerograph.units import size

WIDE = 8
"""Open values from which on a piece gets the corners of its curve alone, by minimum cuts."""


class Solution(Protocol):
    """The curve of a piece of one shape."""

    @property
    def nbytes(self) -> Ints: ...

    @property
    def cost(self) -> Ints: ...

    def kept(self, point: int) -> tuple[int, ...]:
        """The values of the piece that a point keeps."""
        ...


@dataclass(frozen=True)
class Choice:
    """What the forward keeps for the backward."""

    keep: tuple[fx.Node, ...]
    """In graph order; each makes a storage. Views of them, and placeholders, are at hand as well."""
    repeat: tuple[fx.Node, ...]
    """The operators that the backward computes again, in graph order; views are not listed."""
    nbytes: int
    """Of what is kept."""
    work: tuple[Work, ...]
    """Of each operator in `repeat`."""

    @property
    def flops(self) -> int:
        """FLOPs that are computed again."""
        return sum(each.flops for each in self.work)

    @property
    def traffic(self) -> int:
        """Bytes that are read and written again for it."""
        return sum(each.nbytes for each in self.work)

    def seconds(self, device: Device) -> float:
        """What the repetition takes on a device."""
        return sum(device.seconds(w.flops, w.nbytes, short(w.dtype)) for w in self.work)


@dataclass(frozen=True)
class Solver:
    """A problem's pieces by their curves, and the curve of all of them."""

    problem: Problem
    groups: tuple[tuple[tuple[Piece, Solution], ...], ...]
    """Pieces with equal curves, in order of the graph."""
    curve: Curve

    @classmethod
    def of(cls, problem: Problem, wide: int = WIDE) -> "Solver":
        solved: dict[Shape, Solution] = {}
        groups: dict[tuple[bytes, bytes], list[tuple[Piece, Solution]]] = defaultdict(list)
        for piece in pieces_of(problem):
            if piece.shape not in solved:
                is_wide = exact.width(piece.shape) >= wide
                solved[piece.shape] = (cut.hull if is_wide else exact.solve)(piece.shape)
            found = solved[piece.shape]
            groups[found.nbytes.tobytes(), found.cost.tobytes()].append((piece, found))
        curves = [times(_single(group), len(group)) for group in groups.values()]
        return cls(problem, tuple(map(tuple, groups.values())), total([*curves, EMPTY]))

    @property
    def least(self) -> int:
        """The fewest bytes that can be kept."""
        return self.problem.base + int(self.curve.nbytes[0])

    @property
    def most(self) -> int:
        """The bytes with which nothing is repeated that costs anything."""
        return self.problem.base + int(self.curve.nbytes[-1])

    def solve(self, budget: int) -> frozenset[int]:
        """The values to keep. Of alike pieces the later ones keep more: the backward frees them first."""
        fitting = self.curve.nbytes.searchsorted(budget - self.problem.base, "right")
        assert fitting, "the budget is too small"
        points = iter(self.curve.pick(int(fitting) - 1))
        kept: set[int] = set()
        for group in self.groups:
            chosen = sorted(next(points) for _ in group)
            for (piece, solution), point in zip(group, chosen):
                kept.update(piece.values[v] for v in solution.kept(point))
        return frozenset(kept)


def _single(group: Collection[tuple[Piece, Solution]]) -> Single:
    solution = next(iter(group))[1]
    return Single(solution.nbytes, solution.cost)


@dataclass(frozen=True)
class Chooser:
    """All choices for one graph."""

    reading: Reading
    solver: Solver

    @classmethod
    def of(
        cls, graph: TrainGraph, pinned: Collection[fx.Node] = (), results_held: bool = True
    ) -> "Chooser":
        """For a graph of forward and backward, after `normalize`. `pinned` forward nodes are kept.

        Unless `results_held`, keeping a result of the forward costs its bytes: as where the caller drops it,
        and as torch's partitioner counts.
        """
        reading = Reading.of(graph, pinned, results_held)
        return cls(reading, Solver.of(reading.problem))

    def budget(self, fraction: float) -> int:
        """Bytes at a fraction of the way from the fewest that can be kept (0) to all (1)."""
        least, most = self.solver.least, self.solver.most
        return least + int(fraction * (most - least))

    def choose(self, budget: int) -> Choice:
        """The choice for `budget` bytes. Raises PlanError if it is less than must be kept."""
        if budget < self.solver.least:
            raise PlanError(
                f"a budget of {budget} bytes ({size(budget)}) for what the forward keeps is too small: "
                f"{self._must()} need {self.solver.least} bytes ({size(self.solver.least)}), which is the "
                "smallest budget that works"
            )
        return self.choice(self.solver.solve(budget))

    def choice(self, kept: Collection[int]) -> Choice:
        """What keeping some values of the problem means. AssertionError if it does not suffice."""
        reading, problem = self.reading, self.reading.problem
        again = problem.repeated(kept)
        nodes = {*reading.always, *(reading.nodes[v] for v in kept)}
        return Choice(
            keep=tuple(node for node in self._order if node in nodes),
            repeat=tuple(reading.calls[op] for op in again),
            nbytes=problem.nbytes(kept),
            work=tuple(reading.work[op] for op in again),
        )

    def kept(self, nodes: Collection[fx.Node]) -> Choice:
        """The choice that keeps (at least) the storages of `nodes`, which may be views."""
        return self.choice(self.reading.values_of(nodes))

    @cached_property
    def _order(self) -> list[fx.Node]:
        nodes = [*self.reading.nodes, *self.reading.always]
        place = {n: i for i, n in enumerate(nodes[0].graph.nodes)} if nodes else {}
        return sorted(nodes, key=lambda node: place[node])

    def _must(self) -> str:
        """What needs the fewest bytes, in words."""
        nodes = self.reading.always
        names = ", ".join(node.name for node in nodes[:3])
        return f"what must be kept ({names}{', ..' * (len(nodes) > 3)})"


def choose(graph: TrainGraph, budget: int, pinned: Collection[fx.Node] = ()) -> Choice:
    """What to keep of the forward of `graph` in `budget` bytes; see Chooser."""
    return Chooser.of(graph, pinned).choose(budget)
