"""Curves: of all choices, those for which no other keeps as few bytes and computes as little again.

    bytes kept       0     4096   8192   12288
    cost repeated    900   500    300    0         more bytes, less cost, in every step

Costs and bytes of independent pieces add up, so the curve of both together is the best of all sums. A
curve with more than LIMIT points is thinned. What stays is its lower convex hull, the best exchanges of cost
for bytes; the points behind the LIMIT / 2 largest drops of cost, so that of as many sums of FLOPs the
fewest bytes stay known; and of the rest the cheapest in each of LIMIT / 4 equal ranges of bytes. All in
integers, so that every rank has the same bits.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
LIMIT = 1024
"""Points that a curve may have."""


class Curve(Protocol):
    """Points in order of bytes; each knows from which points of single pieces it comes."""

    @property
    def nbytes(self) -> Ints: ...

    @property
    def cost(self) -> Ints: ...

    def pick(self, point: int) -> list[int]:
        """The points of the single pieces, in their order."""
        ...


@dataclass(frozen=True)
class Single:
    """The curve of one piece."""

    nbytes: Ints
    cost: Ints

    def pick(self, point: int) -> list[int]:
        return [point]


@dataclass(frozen=True)
class Sum:
    """The curve of two together."""

    left: Curve
    right: Curve
    nbytes: Ints
    cost: Ints
    origin: Ints
    """Of each point: left's point times the number of right's, and right's."""

    def pick(self, point: int) -> list[int]:
        left, right = divmod(int(self.origin[point]), len(self.right.nbytes))
        return self.left.pick(left) + self.right.pick(right)


EMPTY = Single(np.zeros(1, np.int64), np.zeros(1, np.int64))
"""No piece at all; its point does not count."""


def add(left: Curve, right: Curve) -> Curve:
    nbytes = (left.nbytes[:, None] + right.nbytes[None, :]).ravel()
    cost = (left.cost[:, None] + right.cost[None, :]).ravel()
    best = pareto(nbytes, cost)
    return Sum(left, right, nbytes[best], cost[best], best)


def times(curve: Curve, count: int) -> Curve:
    """`count` pieces of the same curve."""
    if count == 1:
        return curve
    half = times(curve, count // 2)
    both = add(half, half)
    return add(both, curve) if count % 2 else both


def total(curves: list[Curve]) -> Curve:
    """All together, added in pairs."""
    while len(curves) > 1:
        pairs = [curves[i : i + 2] for i in range(0, len(curves), 2)]
        curves = [add(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return curves[0]


def pareto(nbytes: Ints, cost: Ints) -> Ints:
    """Indices of the points that no other one beats, in order of bytes; at most about LIMIT."""
    order = np.lexsort((cost, nbytes))
    least = np.minimum.accumulate(cost[order])
    better = np.concatenate(([True], cost[order][1:] < least[:-1]))
    best = order[better]
    return best if len(best) <= LIMIT else best[_thinned(nbytes[best], cost[best])]


def _thinned(nbytes: Ints, cost: Ints) -> Ints:
    """Indices of the points of a curve that stay."""
    coarse = _cheapest(nbytes, 8 * LIMIT)
    hull = coarse[_hull(nbytes[coarse].tolist(), cost[coarse].tolist())]
    spread = np.union1d(hull, _cheapest(nbytes, LIMIT // 4))
    return np.union1d(spread, _largest_drops(cost, LIMIT // 2))


def _largest_drops(cost: Ints, count: int) -> Ints:
    """The points that are most cheaper than the one before."""
    drops = cost[:-1] - cost[1:]
    return np.sort(np.argsort(-drops, kind="stable")[:count]) + 1


def _cheapest(nbytes: Ints, count: int) -> Ints:
    """The first point, and the last in each of `count` equal ranges of bytes."""
    span = int(nbytes[-1] - nbytes[0]) + 1
    ranges = (nbytes - nbytes[0]) // -(-span // count)
    last = np.flatnonzero(np.append(ranges[1:] != ranges[:-1], True))
    return np.union1d([0], last)


def _hull(nbytes: list[int], cost: list[int]) -> list[int]:
    """The lower convex hull, by Andrew's monotone chain (1979)."""
    hull: list[int] = []
    for i, (x, y) in enumerate(zip(nbytes, cost)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            above = (nbytes[b] - nbytes[a]) * (y - cost[a]) <= (cost[b] - cost[a]) * (x - nbytes[a])
            if not above:
                break
            hull.pop()
        hull.append(i)
    return hull
