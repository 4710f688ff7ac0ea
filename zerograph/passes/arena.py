"""arena: what is kept at the boundaries of regions lies in memory that is the same from step to step.

    before                                     after
      zero.checkpoint %0 "layers.0"              forward(.., %a0: f32[2,1024])
      %1 = aten.mm(%0, %w)                       %0.kept = zero.place %0, %a0[0]
      %2 = aten.add(%0, %1)                      zero.checkpoint %0.kept "layers.0"
      zero.checkpoint %2 "layers.1"              %1 = aten.mm(%0.kept, %w)
      %3 = aten.mm(%2, %v)                       %2 = aten.add(%0.kept, %1)
      save %0, %2                                %2.kept = zero.place %2, %a0[1] in place
    backward                                     zero.checkpoint %2.kept "layers.1"
      %4 = aten.mm(%2, %v)   # recomputed        %3 = aten.mm(%2.kept, %v)
                                                 save %0.kept, %2.kept
                                               backward
                                                 %4 = aten.mm(%2.kept, %v)   # recomputed

There is one arena for each class of values: of one dtype, and of one size in bytes, rounded up to 128. Where
sizes vary a class is an expression over them, and the arena grows with it. It is an input of the forward: who
runs it lends memory, and has it back behind the backward (runtime/arenas.py). The operator that makes a value
writes it to its place, if it can (codegen/arenas.py); if not it is copied as soon as it is made, and whoever
reads it later reads the copy. No bit changes. What is in another form already is written to its row by what
puts it into that form: copies on the host (`offload`), whose arena is there, and shares (`partition`), also
those of values that no boundary is on.

      %0.host = zero.offload %0                  %0.host = zero.offload %0, %a0[0]
      %1.share = zero.partition_activation %1    %1.share = zero.partition_activation %1, %a1[0]

Outside stay what `offload` leaves on the device as well: what is under no boundary; inputs, buffers and
constants; what shares its storage with a result of the forward or with another value that is kept; values
that do not fill their memory (expanded ones). A gradient that is a value of the forward leaves the backward
as a copy. ZeRO, arXiv:1910.02054, section 6.2 (contiguous memory, M_D).
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from zerograph import compat, ops
from zerograph.codegen.arenas import can_write, length_of
from zerograph.cost import nbytes
from zerograph.ir import TrainGraph
from zerograph.kept import is_own
from zerograph.nodes import is_call, module_of, view_root
from zerograph.units import size

Class = tuple[torch.dtype, object, bool]
"""What the values of an arena share: dtype, elements (a number or an expression), and whether on the host."""


@dataclass(frozen=True)
class Arena:
    name: ClassVar[str] = "arena"
    requires: ClassVar[frozenset[str]] = frozenset({"checkpointed", "specialized"})
    provides: ClassVar[frozenset[str]] = frozenset({"arena"})

    def apply(self, graph: TrainGraph) -> str:
        if not graph.training:
            return "there is no backward"
        values = _values(graph)
        classes: dict[Class, list[fx.Node]] = {}
        for value in values:
            classes.setdefault(_class_of(value), []).append(value)
        written = 0
        for number, members in enumerate(classes.values()):
            arena = _arena(graph, f"a{number}", members)
            written += sum(_place(graph, value, arena, row) for row, value in enumerate(members))
        _copy_gradients(graph)
        total = size(sum(map(nbytes, graph.placeholders("arena"))))
        made = f", {written} made there" if written else ""
        return f"{len(values)} values in {len(classes)} arenas of {total}{made}"


def _values(graph: TrainGraph) -> list[fx.Node]:
    """What goes to arenas, in order: values at boundaries that are kept, and copies and shares of such."""
    saved = [node for node in graph.outputs("saved") if node is not None]
    returned = [node for node in graph.outputs("forward") if node is not None]
    roots = Counter(map(view_root, (*saved, *returned)))
    forward = graph.nodes("forward")
    bounds = dict.fromkeys(n.args[0] for n in forward if is_call(n, ops.checkpoint))
    found = [v for v in saved if v in bounds and is_own(v) and roots[view_root(v)] == 1]
    shares = [n for n in saved if is_call(n, ops.partition_activation)]
    return sorted([*found, *shares, *(n for n in forward if is_call(n, ops.offload))])


def _class_of(value: fx.Node) -> Class:
    made = value.meta["val"]
    return made.dtype, compat.exact(length_of(made)), is_call(value, ops.offload)


def _arena(graph: TrainGraph, name: str, members: list[fx.Node]) -> fx.Node:
    """The placeholder of an arena [values, elements of each]."""
    made = members[0].meta["val"]
    with graph.fake_mode:
        value = torch.empty(len(members), length_of(made), dtype=made.dtype, device=made.device)
    return graph.add_placeholder("arena", name, value)


def _place(graph: TrainGraph, value: fx.Node, arena: fx.Node, row: int) -> bool:
    """Give a value its row of an arena; answers whether it is made there."""
    if is_call(value, ops.offload, ops.partition_activation):
        value.args = (*value.args, arena, row)
        return False
    with graph.inserting(value.next, "forward", module_of(value)) as insert:
        place = insert(ops.place, value, arena, row)
    place.meta["val"] = value.meta["val"]  # with its strides, whatever they are
    if "checkpoint" in value.meta:
        place.meta["checkpoint"] = value.meta["checkpoint"]
    value.replace_all_uses_with(place, lambda user: user is not place)
    if can_write(place):
        place.args = (*place.args, True)
        return True
    return False


def _copy_gradients(graph: TrainGraph) -> None:
    """No gradient is a view of an arena, which is written again once the backward is over."""
    found: list[fx.Node | None] = []
    for node in graph.outputs("backward"):
        if node is not None and is_call(view_root(node), ops.place):
            with graph.inserting(graph.end("backward"), "backward", module_of(node)) as insert:
                node = insert(torch.ops.aten.clone.default, node)
        found.append(node)
    graph.set_outputs(backward=found)
