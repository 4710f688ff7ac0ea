"""exact: the whole curve of a piece, operator by operator.

    op    chosen                                open (read by later operators of the piece)
    mm    repeat, keep %1, or neither           %1 is at hand, or not
    add   repeat (if %1 is at hand), or keep %2 %2 is at hand, or not

A dynamic program over the operators in order. Its state is which of the values that later operators read
are at hand in the backward; for each state it holds the curve of what was spent so far. It is exact (up to
the thinning of curves), and fast where few values are open at once: in a residual network one or two.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zerograph.recompute.curve import Ints, pareto
from zerograph.recompute.pieces import Shape

State = frozenset[int]


class Source(NamedTuple):
    """One way to a state: the state before, the values that it keeps, and how many points came by it."""

    state: State
    keeps: tuple[int, ...]
    points: int


@dataclass(frozen=True)
class Spent:
    """The curve of one state, and where each point comes from: an index into all that led here."""

    nbytes: Ints
    cost: Ints
    origin: Ints
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Solved:
    """The curve of a piece, and what each of its points keeps."""

    steps: tuple[dict[State, Spent], ...]

    @property
    def nbytes(self) -> Ints:
        return self.steps[-1][frozenset()].nbytes

    @property
    def cost(self) -> Ints:
        return self.steps[-1][frozenset()].cost

    def kept(self, point: int) -> tuple[int, ...]:
        """The values of the piece that a point keeps, in order."""
        state: State = frozenset()
        found: list[int] = []
        for step in reversed(self.steps[1:]):
            spent = step[state]
            place = int(spent.origin[point])
            way = 0
            while place >= spent.sources[way].points:
                place -= spent.sources[way].points
                way += 1
            state, point = spent.sources[way].state, place
            found += spent.sources[way].keeps
        return tuple(sorted(found))


def solve(shape: Shape) -> Solved:
    """The curve of a piece of this shape."""
    zero = np.zeros(1, np.int64)
    steps: list[dict[State, Spent]] = [{frozenset(): Spent(zero, zero, zero, ())}]
    ends = _last_readers(shape)
    value = 0
    for index, (cost, reads, made) in enumerate(shape):
        results = [(value + i, *each) for i, each in enumerate(made)]
        value += len(made)
        ways: dict[State, list[tuple[State, tuple[int, ...], int, int]]] = defaultdict(list)
        for state in steps[-1]:
            if cost is not None and state.issuperset(reads):
                after = state.union(v for v, _, _ in results)
                ways[_open(after, ends, index)].append((state, (), 0, cost))
            for keeps, nbytes in _kept(results):
                ways[_open(state.union(keeps), ends, index)].append((state, keeps, nbytes, 0))
        steps.append({state: _spent(steps[-1], found) for state, found in ways.items()})
    return Solved(tuple(steps))


def width(shape: Shape) -> int:
    """The most values that are open at once."""
    ends = _last_readers(shape)
    value = most = 0
    open_: State = frozenset()
    for index, (_, _, made) in enumerate(shape):
        open_ = open_.union(range(value, value + len(made)))
        value += len(made)
        most = max(most, len({v for v in open_ if ends.get(v, -1) >= index}))
        open_ = _open(open_, ends, index)
    return most


def _last_readers(shape: Shape) -> dict[int, int]:
    """Of each value that the piece reads: the last operator that does."""
    return {v: index for index, (_, reads, _) in enumerate(shape) for v in reads}


def _open(state: State, ends: dict[int, int], index: int) -> State:
    return frozenset(v for v in state if ends.get(v, -1) > index)


def _kept(results: list[tuple[int, int, bool]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """The ways to keep an operator's results: all that the backward reads, and any of the others."""
    read = tuple(v for v, _, is_read in results if is_read)
    nbytes = sum(n for _, n, is_read in results if is_read)
    others = [(v, n) for v, n, is_read in results if not is_read]
    for chosen in range(1 << len(others)):
        more = [each for i, each in enumerate(others) if chosen >> i & 1]
        yield read + tuple(v for v, _ in more), nbytes + sum(n for _, n in more)


def _spent(
    before: dict[State, Spent], ways: list[tuple[State, tuple[int, ...], int, int]]
) -> Spent:
    """The best of all ways to a state."""
    nbytes = np.concatenate([before[state].nbytes + n for state, _, n, _ in ways])
    cost = np.concatenate([before[state].cost + c for state, _, _, c in ways])
    best = pareto(nbytes, cost)
    sources = tuple(Source(s, keeps, len(before[s].nbytes)) for s, keeps, _, _ in ways)
    return Spent(nbytes[best], cost[best], best, sources)
