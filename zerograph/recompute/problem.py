"""What could be kept of a forward and what could be computed again, as plain numbers.

    %1 = aten.mm(%x, %w)           op 0 reads nothing that has to be kept, makes value 0
    %2 = aten.view(%1, ..)         value 0 as well: a view costs nothing
    %3 = aten.gelu(%2)             op 1 reads value 0, makes value 1
    %4 = aten.native_layer_norm    op 2, one value a result
    backward
      .. aten.gelu_backward(%d, %2)    value 0 is read

Placeholders (parameters, buffers, inputs) are at hand in the backward, and so is what is computed from
sizes alone. What only leads to a result of the forward is left out; the results themselves are there in any
case, for nothing, since the caller may hold them. What must be kept whatever the budget
is, too, with its bytes in `base`: what is pinned, and what the backward reads of an operator that
is never repeated. Those are random operators, those with effects, those that read an input that the forward
changes, and those that torch does not describe. Of a dropout on the CPU only the mask is such a value: its
output is computed from the mask, as an operator of its own. A buffer that the forward changes is read
with its old value, of which the pass keeps a copy.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from zerograph.compat import hint
from zerograph.cost.work import Work, work_of
from zerograph.ir import TrainGraph
from zerograph.nodes import is_view
from zerograph.repeats import can_repeat, is_dropped_out, mask_of

WEIGHT = 1024
"""Bytes of memory traffic that weigh as one FLOP: they decide where FLOPs are equal, and hardly else."""


@dataclass(frozen=True)
class Value:
    """One storage that an operator of the forward makes."""

    op: int
    nbytes: int
    read: bool
    """Whether the backward reads it, or a view of it."""


@dataclass(frozen=True)
class Op:
    """One operator. What it reads and makes are indices of values."""

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    cost: int | None
    """What computing it again costs; None if it must not be."""


@dataclass(frozen=True)
class Problem:
    """Operators in an order in which they can be computed, and their values."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    base: int = 0
    """Bytes that are kept anyhow."""

    def repeated(self, kept: Collection[int]) -> list[int]:
        """The operators that are computed again if the values `kept` are kept, in order.

        Raises AssertionError if one of them must not be.
        """
        again = set[int]()
        stack = [v for v, value in enumerate(self.values) if value.read and v not in kept]
        while stack:
            op = self.values[stack.pop()].op
            if op not in again:
                assert self.ops[op].cost is not None, f"operator {op} would be computed again"
                again.add(op)
                stack += [v for v in self.ops[op].reads if v not in kept]
        return sorted(again)

    def nbytes(self, kept: Collection[int]) -> int:
        return self.base + sum(self.values[v].nbytes for v in kept)

    def cost(self, repeated: Collection[int]) -> int:
        return sum(self.ops[op].cost or 0 for op in repeated)


@dataclass(frozen=True)
class Reading:
    """The problem of a graph, and which nodes its operators and values are."""

    problem: Problem
    calls: tuple[fx.Node, ...]
    """The node of each operator."""
    nodes: tuple[fx.Node, ...]
    """The node of each value: the operator's, or a `getitem` of it."""
    work: tuple[Work, ...]
    """Of each operator."""
    always: tuple[fx.Node, ...]
    """What is kept whatever the budget."""

    @classmethod
    def of(
        cls, graph: TrainGraph, pinned: Collection[fx.Node] = (), results_held: bool = True
    ) -> "Reading":
        """Read a graph of forward and backward; `pinned` are forward nodes that have to be kept.

        Unless `results_held`, results of the forward are values like others, with their bytes.
        """
        return Reader(graph, pinned, results_held).read()

    def values_of(self, nodes: Collection[fx.Node]) -> set[int]:
        """The values that keeping `nodes` keeps; those that are kept anyhow are left out."""
        index = {key_of(node): v for v, node in enumerate(self.nodes)}
        return {index[key] for node in nodes if (key := key_of(node)) in index}


def key_of(node: fx.Node) -> tuple[fx.Node, Any]:
    """The operator whose result a node is, or is a view of, and which of its results."""
    while is_view(node):
        node = cast(fx.Node, node.args[0])
    if getattr(node.target, "__name__", "") == "getitem":
        return cast(fx.Node, node.args[0]), node.args[1]
    return node, None


class Reader:
    """What the operators of a graph's forward make and read."""

    def __init__(
        self, graph: TrainGraph, pinned: Collection[fx.Node] = (), held: bool = True
    ) -> None:
        self.graph = graph
        self.pinned = {key_of(node) for node in pinned}
        self.forward = {n for n in graph.nodes("forward") if n.op != "get_attr"}
        self.read_keys = {key_of(node) for node in self._read_by_backward()}
        self.changed = set(self._changed())
        results = graph.outputs("forward") if held else ()
        self.results = {key_of(node) for node in results if node is not None}

    def read(self) -> Reading:
        """Operators that the backward may need again, from the last to the first, then the tables."""
        needed, always, calls = set(self.read_keys), set[tuple[fx.Node, Any]](), []
        makes = self.results_by_call()
        for call in reversed(makes):
            made = [key for key in makes.get(call, ()) if key in needed]
            if not made:
                continue
            once = self._is_once(call)
            fixed = self.read_keys if once else set()
            always.update(self.results.union(self.pinned, fixed).intersection(made))
            if any(key not in always for key in made):
                calls.append(call)
                needed.update(() if once else self.reads(call))
        return self._tables(calls[::-1], makes, needed, always)

    def _tables(
        self,
        calls: list[fx.Node],
        makes: dict[fx.Node, list[tuple[fx.Node, Any]]],
        needed: set[tuple[fx.Node, Any]],
        always: set[tuple[fx.Node, Any]],
    ) -> Reading:
        kept = [key for call in makes for key in makes[call] if key in always]
        keys = [k for call in calls for k in makes[call] if k in needed and k not in always]
        index = {key: v for v, key in enumerate(keys)}
        maker = {key: o for o, call in enumerate(calls) for key in makes[call]}
        work = [self._work(call) for call in calls]
        weight = _weight(sum(each.flops for each in work))
        ops = []
        for call, done in zip(calls, work):
            reads = tuple(sorted({index[k] for k in self.reads(call) if k in index}))
            made = tuple(index[k] for k in makes[call] if k in index)
            cost = None if self._is_once(call) else weight * done.flops + done.nbytes
            ops.append(Op(reads, made, cost))
        values = [Value(maker[k], nbytes_of(k), k in self.read_keys) for k in keys]
        base = sum(nbytes_of(key) for key in kept if key not in self.results)
        problem = Problem(tuple(ops), tuple(values), base)
        nodes = self._nodes()
        named = [tuple(nodes[key] for key in group) for group in (keys, kept)]
        return Reading(problem, tuple(calls), named[0], tuple(work), named[1])

    def _read_by_backward(self) -> Iterator[fx.Node]:
        for node in self.graph.nodes("backward"):
            yield from (n for n in node.all_input_nodes if n in self.forward)
        yield from (n for n in self.graph.outputs("backward") if n in self.forward)

    def _changed(self) -> Iterator[fx.Node]:
        """Inputs that the forward changes."""
        for result in self.graph.results:
            if result.kind == "input_update":
                yield self.graph.placeholder("input", result.name)

    def _nodes(self) -> dict[tuple[fx.Node, Any], fx.Node]:
        """The first node that is a value itself, by its key."""
        found: dict[tuple[fx.Node, Any], fx.Node] = {}
        for node in self.graph.nodes("forward"):
            if not is_view(node):
                found.setdefault(key_of(node), node)
        return found

    def results_by_call(self) -> dict[fx.Node, list[tuple[fx.Node, Any]]]:
        """The tensors that each operator of the forward makes, in order."""
        found: dict[fx.Node, list[tuple[fx.Node, Any]]] = {}
        for key, node in self._nodes().items():
            if key[0] in self.forward and _has_tensor(key):
                found.setdefault(node if is_dropped_out(node) else key[0], []).append(key)
        order = {node: index for index, node in enumerate(self.graph.nodes("forward"))}
        return {call: found[call] for call in sorted(found, key=lambda call: order[call])}

    def reads(self, call: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
        sources = call.all_input_nodes
        if is_dropped_out(call):
            dropout = sources[0]
            sources = [cast(fx.Node, dropout.args[0]), mask_of(dropout)]
        for key in map(key_of, sources):
            if key[0] in self.forward and _has_tensor(key):
                yield key

    def _work(self, call: fx.Node) -> Work:
        if not is_dropped_out(call):
            return work_of(call)
        nbytes = sum(map(nbytes_of, self.reads(call)))
        return Work(0, nbytes + 3 * nbytes_of(key_of(call)), call.meta["val"].dtype)

    def _is_once(self, call: fx.Node) -> bool:
        """Whether an operator must not be repeated."""
        reads_changed = any(key_of(source)[0] in self.changed for source in call.all_input_nodes)
        return reads_changed or not can_repeat(call)


def _has_tensor(key: tuple[fx.Node, Any]) -> bool:
    value = _value(key)
    return isinstance(value, (Tensor, list, tuple))


def _value(key: tuple[fx.Node, Any]) -> Any:
    node, item = key
    value: Any = node.meta.get("val")
    return value if item is None else value[item]


def nbytes_of(key: tuple[fx.Node, Any]) -> int:
    """Bytes of a value's storage."""
    value = _value(key)
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return sum(hint(t.numel()) * t.dtype.itemsize for t in tensors if isinstance(t, Tensor))


def _weight(flops: int) -> int:
    """WEIGHT, or less where the sum of all costs would not fit into 62 bits."""
    return max(1, min(WEIGHT, 2**61 // max(flops, 1)))
