"""peak: how many bytes of activations are alive at most, if the forward keeps so and so.

    forward      each value to its last reader; what is kept and read again, to the end
    backward     [repetitions before the first reader]  reader   [..]  reader  ..
                 what is kept and what is repeated, to its last reader; the backward's own values

A choice of what is kept says nothing of this: of a stack whose boundaries are not kept all layers are
computed again at once. The order is that in which `repeats` puts repetitions, and lifetimes are those of
`cost.lifetimes`, told from shapes alone before the other passes run. Parameters, their gradients and the
batch are left out: they are the same for every choice.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import fx

from zerograph.ir import TrainGraph
from zerograph.recompute.problem import Reader, key_of, nbytes_of

Key = tuple[fx.Node, Any]


@dataclass(frozen=True)
class Peaks:
    """The peaks of all choices for one graph."""

    nbytes: dict[Key, int]
    """Of the forward's values."""
    calls: list[tuple[tuple[Key, ...], tuple[Key, ...]]]
    """What each operator of the forward reads and makes, in order."""
    alive: list[tuple[int, int]]
    """The operators between which each value is alive in the forward, kept or not, as in `order`."""
    order: list[Key]
    results: frozenset[Key]
    backward: list[tuple[tuple[Key, ...], int, int]]
    """Of each node of the backward: what it reads of the forward, and the backward's own bytes before it
    and while it runs."""

    @classmethod
    def of(cls, graph: TrainGraph) -> "Peaks":
        """For a graph of forward and backward, after `normalize`."""
        reader = Reader(graph)
        makes = reader.results_by_call()
        calls = [(tuple(reader.reads(call)), tuple(keys)) for call, keys in makes.items()]
        order = [key for keys in makes.values() for key in keys]
        last = {key: index for index, (_, made) in enumerate(calls) for key in made}
        births = list(last.values())
        for index, (reads, _) in enumerate(calls):
            last.update((key, index) for key in reads)
        results = reader.results.intersection(order)
        nbytes = {key: _nbytes(key) for key in order}
        alive = [(birth, last[key]) for birth, key in zip(births, order)]
        backward = _backward(graph, set(order))
        return cls(nbytes, calls, alive, order, frozenset(results), backward)

    def peak(self, keep: Collection[fx.Node]) -> int:
        """Most bytes alive at once if the forward keeps the storages of `keep`, and results."""
        kept = {key_of(node) for node in keep} | self.results
        events, born = self._events(kept)
        last = {key: now for now, (reads, _) in enumerate(events) for key in reads}
        spans = [(0, last[key], self.nbytes[key]) for key in last.keys() & (kept - self.results)]
        spans += [(now, last.get(key, now), self.nbytes[key]) for now, key in born]
        own = [nbytes for _, nbytes in events]
        behind = max((a + b for a, b in zip(own, _alive(spans, len(own)))), default=0)
        held = sum(self.nbytes[key] for key in self.results)
        return max(self._forward(kept & (last.keys() | self.results)), behind + held)

    def _events(
        self, kept: set[Key]
    ) -> tuple[list[tuple[tuple[Key, ...], int]], list[tuple[int, Key]]]:
        """The backward with its repetitions, and when each repeated value is made."""
        maker = {key: op for op, (_, made) in enumerate(self.calls) for key in made}
        done: set[int] = set()
        events: list[tuple[tuple[Key, ...], int]] = []
        born: list[tuple[int, Key]] = []
        for reads, before, own in self.backward:
            stack, again = [key for key in reads if key not in kept], set[int]()
            while stack:
                op = maker[stack.pop()]
                if op not in done:
                    done.add(op)
                    again.add(op)
                    stack += [key for key in self.calls[op][0] if key not in kept]
            for op in sorted(again):
                born += [(len(events), key) for key in self.calls[op][1] if key not in kept]
                events.append((self.calls[op][0], before))
            events.append((reads, own))
        return events, born

    def _forward(self, kept: set[Key]) -> int:
        """Most bytes at once until the forward's end, to which `kept` lives."""
        end = len(self.calls)
        spans = [
            (birth, end - 1 if key in kept else last, self.nbytes[key])
            for key, (birth, last) in zip(self.order, self.alive)
        ]
        return max(_alive(spans, end), default=0)


def _alive(spans: Iterable[tuple[int, int, int]], count: int) -> list[int]:
    """Bytes alive at each of `count` moments, of storages with their first and last one."""
    change = [0] * (count + 1)
    for first, last, nbytes in spans:
        change[first] += nbytes
        change[last + 1] -= nbytes
    return list(accumulate(change[:count]))


def _backward(graph: TrainGraph, forward: set[Key]) -> list[tuple[tuple[Key, ...], int, int]]:
    """Per node of the backward: the keys of the forward that it reads, and the backward's own bytes.

    Gradients of parameters are not among these: they go into buffers.
    """
    nodes = graph.nodes("backward")
    left = {key_of(node) for node in graph.outputs("backward") if node is not None}
    reads = [[key_of(source) for source in node.all_input_nodes] for node in nodes]
    last = {key: index for index, keys in enumerate(reads) for key in keys}
    sizes: dict[Key, int] = defaultdict(int)
    spans = []
    for index, node in enumerate(nodes):
        key = key_of(node)
        if key not in sizes and key not in forward and key not in left:
            sizes[key] = _nbytes(key)
            spans.append((index, max(index, last.get(key, index)), sizes[key]))
    own = _alive(spans, len(nodes))
    new = [0] * len(nodes)
    for index, _, nbytes in spans:
        new[index] += nbytes
    read = [tuple(key for key in keys if key in forward) for keys in reads]
    return [(keys, alive - made, alive) for keys, alive, made in zip(read, own, new)]


def _nbytes(key: Key) -> int:
    """Of a value; an operator with several results has those of its results that are taken."""
    node, item = key
    taken = item is None and isinstance(node.meta.get("val"), (list, tuple))
    return 0 if taken else nbytes_of(key)
