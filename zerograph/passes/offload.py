"""offload: what is kept at the boundaries of regions lies in the host's memory from forward to backward.

    before                                     after
      zero.checkpoint %0 "layers.0"              zero.checkpoint %0 "layers.0"
      %1 = aten.mm(%0, %w)                       %1 = aten.mm(%0, %w)
      zero.checkpoint %1 "layers.1"              %0.host = zero.offload %0
      %2 = aten.mm(%1, %v)                       zero.checkpoint %1 "layers.1"
      save %0, %1                                %2 = aten.mm(%1, %v)
    backward                                     %1.host = zero.offload %1
      %3 = aten.mm(%1, %v)   # recomputed        zero.wait %0.host
      ..                                         zero.wait %1.host
      %4 = aten.mm(%0, %w)   # recomputed        save %0.host, %1.host
                                               backward
                                                 %1.back = zero.reload %1.host
                                                 zero.wait %1.back
                                                 %0.back = zero.reload %0.host
                                                 %3 = aten.mm(%1.back, %v)   # recomputed
                                                 ..
                                                 zero.wait %0.back
                                                 %4 = aten.mm(%0.back, %w)   # recomputed

A copy starts right behind the last use in the forward and is waited for behind the start of the next (the
last at the end), where the value on the device ends. It comes back one region ahead: the values of the region
that the backward needs next start when it comes to the present one, and those of its first region at its
start. Values that a budget chose within one region are such regions each. With `overlaps` false nothing is
early or late. Numbers are copied, so no bit changes. ZeRO-R, arXiv:1910.02054 section 6.1 (P_a+cpu).

On the device stay: what is under no boundary (masks of dropouts, what the layers behind the last region
keep); inputs, buffers and constants, which are held in any case; what shares its storage with a result of
the forward or with another value that is kept; gradients that are values of the forward; values below
`smallest` bytes, for which a copy takes more time than it is worth; and values that do not fill their memory
(expanded ones). It runs after `specialize`, which fixes what is saved; what goes does not depend on the
gradients that arrive.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, cast

from torch import Tensor, fx

from zerograph import ops
from zerograph.codegen.packing import is_dense
from zerograph.compat import hint
from zerograph.cost import nbytes
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import checkpoint_of, is_call, module_of, region_of, view_root
from zerograph.passes.release import users_of_aliases
from zerograph.units import size

SMALLEST = 4096
"""Bytes. A copy takes some microseconds to start, in which a link of 32 GB/s moves some 100 KB."""


@dataclass(frozen=True)
class Offload:
    smallest: int = SMALLEST
    overlaps: bool = True
    """Whether copies are under way while something else is computed."""

    name: ClassVar[str] = "offload"
    requires: ClassVar[frozenset[str]] = frozenset({"checkpointed", "specialized"})
    provides: ClassVar[frozenset[str]] = frozenset({"offloaded"})

    def apply(self, graph: TrainGraph) -> str:
        if not graph.training:
            return "there is no backward"
        under = _under_boundaries(graph)
        if not under:
            raise PlanError(
                "activation_checkpointing.cpu_checkpointing=true: what goes to the host is what checkpointed "
                f"regions keep, and {graph.model} has no regions; give "
                "activation_checkpointing.number_checkpoints, mark regions in the model with "
                "zerograph.checkpointing.checkpoint, or set cpu_checkpointing to false"
            )
        roots = Counter(view_root(node) for node in _leaving(graph))
        moved = [v for v in under if self._is_worth(v) and roots[view_root(v)] == 1]
        hosts = self._offload(graph, moved)
        saved = graph.outputs("saved")
        graph.set_outputs(saved=[hosts.get(cast(fx.Node, node), node) for node in saved])
        self._reload(graph, hosts, under)
        total = size(sum(map(nbytes, moved)))
        return f"{len(moved)} of {len(under)} values at boundaries, {total}, go to the host"

    def _is_worth(self, value: fx.Node) -> bool:
        """Whether the step made a value, which fills its memory and is large enough."""
        made = value.meta["val"]
        dense = is_dense([hint(n) for n in made.shape], [hint(n) for n in made.stride()])
        own = view_root(value).op == "call_function"
        return own and dense and nbytes(value) >= self.smallest

    def _offload(self, graph: TrainGraph, moved: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """By value its copy on the host, which the forward has waited for."""
        last = {value: _last_use(value) for value in moved}
        order = sorted(moved, key=last.__getitem__)
        started: list[fx.Node] = []
        for value in order:
            behind = started[-1] if started and last[value] < started[-1] else last[value]
            with graph.inserting(behind.next, "forward", module_of(value)) as insert:
                started.append(insert(ops.offload, value))
        end = graph.end("forward")
        late = [*(start.next for start in started[1:]), end]
        hosts = {}
        for value, start, before in zip(order, started, late):
            at = before if self.overlaps else start.next
            with graph.inserting(at, "forward", module_of(value)) as insert:
                hosts[value] = insert(ops.wait, start)
        return hosts

    def _reload(
        self, graph: TrainGraph, hosts: dict[fx.Node, fx.Node], under: dict[fx.Node, str]
    ) -> None:
        readers = {value: _readers(value) for value in hosts}
        read = sorted((v for v in hosts if readers[v]), key=lambda v: readers[v][0])
        groups = [list(each) for _, each in groupby(read, key=under.__getitem__)]
        starts = [readers[group[0]][0] for group in groups]
        for before, group in zip([graph.first("backward"), *starts], groups):
            for value in group:
                first = readers[value][0]
                at = before if self.overlaps else first
                with graph.inserting(at, "backward", module_of(first)) as insert:
                    back = insert(ops.reload, hosts[value], value.meta["val"].device)
                with graph.inserting(first, "backward", module_of(first)) as insert:
                    back = insert(ops.wait, back)
                for reader in readers[value]:
                    reader.replace_input_with(value, back)


def _under_boundaries(graph: TrainGraph) -> dict[fx.Node, str]:
    """The saved tensors that have a boundary, in order, with the group in which they are brought back.

    It is the region that the backward comes to first, the last of the forward; of a value from within its
    region, which a budget chose, itself.
    """
    found: dict[fx.Node, str] = {}
    saved = set(graph.outputs("saved"))
    for node in graph.nodes("forward"):
        if is_call(node, ops.checkpoint):
            value, region = cast(tuple[fx.Node, str], node.args)
            if value in saved and isinstance(value.meta.get("val"), Tensor):
                chosen = checkpoint_of(value) == region
                found[value] = f"{region} {value.name}" if chosen else region
    return found


def _leaving(graph: TrainGraph) -> list[fx.Node]:
    """What is returned, and what is saved."""
    sections = [graph.outputs(name) for name in ("forward", "saved", "backward")]
    return [node for section in sections for node in section if node is not None]


def _last_use(value: fx.Node) -> fx.Node:
    """The last node of the forward that reads a value, or what shares its storage."""
    readers = users_of_aliases(view_root(value))
    return max(node for node in (value, *readers) if region_of(node) == "forward")


def _readers(value: fx.Node) -> list[fx.Node]:
    """The nodes of the backward that read a value, in order."""
    return sorted(u for u in value.users if u.op != "output" and region_of(u) == "backward")
