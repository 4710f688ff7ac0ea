"""in_place: gradients are written where they belong by the operator that makes them.

    before                                     after
      %8 = aten.mm(..)                           %b0.grad = zero.grad_buffer b0
      %b0.grad = zero.grad_buffer b0             %8 = aten.mm(..)
      zero.put %b0.grad, %8 "w"                  zero.put %b0.grad, %8 "w" in place

A put in place does nothing: the program that is lowered has the operator write into a view of the buffer,
which is made before it. Which operators can, and when, is said in codegen/in_place.py. Where none can,
the put remains a copy. The numbers are the same.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from zerograph import ops
from zerograph.codegen.in_place import buffer_of, can_write, source_of
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call


@dataclass(frozen=True)
class InPlace:
    name: ClassVar[str] = "in_place"
    requires: ClassVar[frozenset[str]] = frozenset({"reduced"})
    provides: ClassVar[frozenset[str]] = frozenset({"in_place"})

    def apply(self, graph: TrainGraph) -> str:
        puts = [node for node in graph.nodes("backward") if is_call(node, ops.put)]
        written = [put for put in puts if can_write(put)]
        for put in written:
            put.args = (*put.args[:6], True)
            _make_before(buffer_of(put), source_of(put))
        return f"{len(written)} of {len(puts)} gradients written in place"


def _make_before(buffer: fx.Node, source: fx.Node) -> None:
    """A buffer is made of nothing but its storage, so it can be made at any place of the backward."""
    if source < buffer:
        source.prepend(buffer)
