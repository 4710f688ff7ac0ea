"""cut: the least of bytes + weight * cost that a piece can come to, by a minimum cut.

    source --weight * cost--> op        cut: the operator is computed again
    op     --bytes--> value             cut: the value is kept
    value  --infinite--> op that reads it
    value  --infinite--> sink           the backward reads it

What is on the sink's side is at hand in the backward. An operator that must not be repeated hangs on the
source by an infinite edge. It is the network by which torch's partitioner chooses what to keep
(torch/_functorch/partitioners.py), with a price on repetition in place of a ban. As the weight grows
from nothing, the cuts go through the lower convex hull of the piece's curve, point by point.
"""

from dataclasses import dataclass
from fractions import Fraction

import networkx as nx
import numpy as np

from zerograph.recompute.curve import Ints
from zerograph.recompute.pieces import Shape

_SOURCE, _SINK = -1, -2
Point = tuple[int, int, tuple[int, ...]]
"""Bytes, cost, and the values that are kept."""


@dataclass(frozen=True)
class Hull:
    """The corners of a piece's curve, and what each of them keeps."""

    nbytes: Ints
    cost: Ints
    keeps: tuple[tuple[int, ...], ...]

    def kept(self, point: int) -> tuple[int, ...]:
        return self.keeps[point]


def hull(shape: Shape) -> Hull:
    """All corners between the fewest bytes and the least cost."""
    total = sum(cost or 0 for cost, _, _ in shape) + 1
    nbytes = sum(n for _, _, made in shape for n, _ in made) + 1
    ends = [minimum(shape, Fraction(1, total)), minimum(shape, Fraction(nbytes))]
    corners = _between(shape, *ends)
    return Hull(
        np.array([n for n, _, _ in corners], np.int64),
        np.array([c for _, c, _ in corners], np.int64),
        tuple(kept for _, _, kept in corners),
    )


def _between(shape: Shape, few: Point, many: Point) -> list[Point]:
    """The corners from `few` bytes to `many`, by chords (Eisner, Severance 1976)."""
    found, stack = [few], [(few, many)]
    while stack:
        left, right = stack.pop()
        if left[1] == right[1]:
            continue
        weight = Fraction(right[0] - left[0], left[1] - right[1])
        middle = minimum(shape, weight)
        if middle[0] + weight * middle[1] < left[0] + weight * left[1]:
            stack += [(middle, right), (left, middle)]
        else:
            found.append(right)
    return found


def minimum(shape: Shape, weight: Fraction) -> Point:
    """The choice for which bytes + weight * cost is least."""
    network = _network(shape, weight)
    _, (there, _) = nx.minimum_cut(network, _SOURCE, _SINK)
    nbytes, cost, kept = 0, 0, []
    value = len(shape)
    for op, (price, _, made) in enumerate(shape):
        repeated = op not in there
        cost += price or 0 if repeated else 0
        for size, _ in made:
            if not repeated and value not in there:
                nbytes += size
                kept.append(value - len(shape))
            value += 1
    return nbytes, cost, tuple(kept)


def _network(shape: Shape, weight: Fraction) -> nx.DiGraph:
    """Nodes are numbers: operators first, then values, so that the order is the same in every process."""
    network = nx.DiGraph()
    network.add_nodes_from((_SOURCE, _SINK))
    value = len(shape)
    for op, (price, reads, made) in enumerate(shape):
        priced = {} if price is None else {"capacity": price * weight.numerator}
        network.add_edge(_SOURCE, op, **priced)
        for read in reads:
            network.add_edge(len(shape) + read, op)
        for size, is_read in made:
            network.add_edge(op, value, capacity=size * weight.denominator)
            if is_read:
                network.add_edge(value, _SINK)
            value += 1
    return network
