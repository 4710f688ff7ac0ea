"""Repeats: nodes of the forward that run again in the backward, just before their value is read there.

    forward                          forward
      %1 = aten.mm(%0, %w)             %1 = aten.mm(%0, %w)
      %2 = aten.gelu(%1)               %2 = aten.gelu(%1)
    backward                         backward
                                       %3 = aten.mm(%0, %w)            # recomputed
      %3 = aten.gelu_backward(.., %1)  %4 = aten.gelu_backward(.., %3)

A repetition has the bits of its original: the same operator on the same values. So nothing that draws
random numbers, communicates or writes runs again: its result is kept. Of a dropout the mask is kept, one byte
an element, and its output is computed from it; so does torch itself on the CPU. With a fused kernel,
on other devices, the output is kept too.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from zerograph import ops
from zerograph.boundaries import of_param
from zerograph.ir import TrainGraph
from zerograph.nodes import checkpoint_of, is_call, is_pure, module_of, region_of

aten = torch.ops.aten


def can_repeat(node: fx.Node) -> bool:
    """Whether a node of the forward may run again, with the same result and no other effect."""
    if is_dropped_out(node):
        return True
    if getattr(node.target, "__name__", "") == "getitem":
        return can_repeat(cast(fx.Node, node.args[0]))
    is_number = node.op != "get_attr" and not isinstance(
        node.meta.get("val"), (torch.Tensor, tuple, list)
    )
    return is_pure(node) and not is_number


@dataclass
class Repeats:
    """Has the backward compute again what it reads of the nodes in `again`, all of which `can_repeat`."""

    graph: TrainGraph
    again: set[fx.Node]
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def make(self) -> int:
        """Answers how many nodes are repeated."""
        for reader in self.graph.nodes("backward"):
            for source in reader.all_input_nodes:
                if source in self.again:
                    reader.replace_input_with(source, self._value(source, reader))
        end = self.graph.end("backward")
        gradients = [
            self._value(n, end) if n in self.again else n for n in self.graph.outputs("backward")
        ]
        self.graph.set_outputs(backward=gradients)
        return len(self.made)

    def _is_repeated(self, node: fx.Node) -> bool:
        forward = node.op != "placeholder" and region_of(node) == "forward"
        return node in self.again or (forward and of_param(node))

    def _value(self, source: fx.Node, before: fx.Node) -> fx.Node:
        """The repetition of `source`; what it needs is repeated before it, in the forward's order."""
        needed, stack = set(), [source]
        while stack:
            node = stack.pop()
            if node not in needed and node not in self.made:
                needed.add(node)
                stack += [n for n in map(_value_of, _reads(node)) if self._is_repeated(n)]
        for node in sorted(needed):
            self.made[node] = self._copy(node, before)
        return self.made[source]

    def _copy(self, node: fx.Node, before: fx.Node) -> fx.Node:
        if is_dropped_out(node):
            made = self._drop_out(node, before)
        else:
            with self.graph.graph.inserting_before(before):
                made = self.graph.graph.node_copy(node, self._now)
        _mark(made, node)
        return made

    def _drop_out(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """input * mask * 1 / (1 - p), in the order in which torch's operator does it."""
        value, mask = _reads(node)
        p = cast(float, cast(fx.Node, node.args[0]).args[1])
        with self.graph.inserting(before, "backward", module_of(node)) as insert:
            kept = insert(aten.mul.Tensor, self._now(value), self._now(mask))
            _mark(kept, node)
            return insert(aten.mul.Tensor, kept, dropout_scale(p, node.meta["val"].dtype))

    def _now(self, node: fx.Node) -> fx.Node:
        """What the backward reads in the place of a value of the forward."""
        node = _value_of(node)
        return self.made.get(node, node)


def _value_of(node: fx.Node) -> fx.Node:
    """The value that a boundary is on."""
    while is_call(node, ops.checkpoint):
        node = cast(fx.Node, node.args[0])
    return node


def _reads(node: fx.Node) -> list[fx.Node]:
    """What a repetition of `node` reads."""
    if not is_dropped_out(node):
        return node.all_input_nodes
    dropout = cast(fx.Node, node.args[0])
    return [cast(fx.Node, dropout.args[0]), mask_of(dropout)]


def dropout_scale(p: float, dtype: torch.dtype) -> float:
    """What a dropout multiplies what it keeps by: torch rounds it to the type of the values first."""
    return torch.tensor(0.0 if p == 1 else 1 / (1 - p), dtype=dtype).item()


def mask_of(dropout: fx.Node) -> fx.Node:
    return next(user for user in dropout.users if user.args[1] == 1)


def is_dropped_out(node: fx.Node) -> bool:
    """Whether a node is the output of a dropout whose mask is there, on the CPU."""
    if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != 0:
        return False
    source = cast(fx.Node, node.args[0])
    if not is_call(source, aten.native_dropout.default) or source.args[2:] != (True,):
        return False
    value: Any = node.meta["val"]
    return value.device.type == "cpu" and any(user.args[1] == 1 for user in source.users)


def _mark(made: fx.Node, node: fx.Node) -> None:
    made.meta.update(checkpoint=checkpoint_of(node), recomputed=node.name, region="backward")
