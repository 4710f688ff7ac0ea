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

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from zerograph import ops
from zerograph.cost import nbytes
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.kept import SMALLEST, last_use, movable, returns, under_boundaries
from zerograph.nodes import module_of
from zerograph.units import size


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
        under = under_boundaries(graph)
        if not under:
            raise PlanError(
                "activation_checkpointing.cpu_checkpointing=true: what goes to the host is what checkpointed "
                f"regions keep, and {graph.model} has no regions; give "
                "activation_checkpointing.number_checkpoints, mark regions in the model with "
                "zerograph.checkpointing.checkpoint, or set cpu_checkpointing to false"
            )
        moved = movable(graph, under, self.smallest)
        hosts = self._offload(graph, moved)
        saved = graph.outputs("saved")
        graph.set_outputs(saved=[hosts.get(cast(fx.Node, node), node) for node in saved])
        self._reload(graph, hosts, under)
        total = size(sum(map(nbytes, moved)))
        return f"{len(moved)} of {len(under)} values at boundaries, {total}, go to the host"

    def _offload(self, graph: TrainGraph, moved: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """By value its copy on the host, which the forward has waited for."""
        last = {value: last_use(value) for value in moved}
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
        for value, readers, at in returns(graph, hosts, under, self.overlaps):
            first = readers[0]
            with graph.inserting(at, "backward", module_of(first)) as insert:
                back = insert(ops.reload, hosts[value], value.meta["val"].device)
            with graph.inserting(first, "backward", module_of(first)) as insert:
                back = insert(ops.wait, back)
            for reader in readers:
                reader.replace_input_with(value, back)
