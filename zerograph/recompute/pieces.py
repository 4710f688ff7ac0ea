"""Pieces: parts of a problem that can be decided one by one.

    %x (read)  ->  mm  ->  rope  ->  %q (read)     one piece
    %x (read)  ->  mm  ->  rope  ->  %k (read)     another one
    %q, %k, %v ->  attention  ->  %a (read)        a third

What the backward reads is there in any case, kept or computed again, and the piece that makes it bears the
cost. So whoever else needs it has it for nothing, and only values that the backward does not read hold
operators together. In a transformer a piece has a matrix product or two, and all layers have alike pieces.
"""

from collections import defaultdict
from dataclasses import dataclass

from zerograph.recompute.problem import Problem

Shape = tuple[tuple[int | None, tuple[int, ...], tuple[tuple[int, bool], ...]], ...]


@dataclass(frozen=True)
class Piece:
    """Some operators of a problem with what they make, numbered from 0.

    `shape` has for each operator its cost, the values of the piece that it reads and the backward does not,
    and (bytes, read by the backward) of what it makes. Pieces of one shape have one solution.
    """

    shape: Shape
    values: tuple[int, ...]
    """Of each value: its number in the problem."""


def pieces_of(problem: Problem) -> list[Piece]:
    """The pieces, in order of their first operators."""
    root = list(range(len(problem.ops)))

    def find(op: int) -> int:
        while root[op] != op:
            root[op] = root[root[op]]
            op = root[op]
        return op

    for index, op in enumerate(problem.ops):
        for value in op.reads:
            if not problem.values[value].read:
                one, other = sorted((find(index), find(problem.values[value].op)))
                root[other] = one
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(problem.ops)):
        members[find(index)].append(index)
    return [_piece(problem, members[first]) for first in sorted(members)]


def _piece(problem: Problem, members: list[int]) -> Piece:
    values = [v for op in members for v in problem.ops[op].makes]
    place = {v: i for i, v in enumerate(values)}
    shape = []
    for index in members:
        op = problem.ops[index]
        reads = tuple(place[v] for v in op.reads if not problem.values[v].read)
        made = tuple((problem.values[v].nbytes, problem.values[v].read) for v in op.makes)
        shape.append((op.cost, reads, made))
    return Piece(tuple(shape), tuple(values))
