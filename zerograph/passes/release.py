"""release: a gathered bucket ends after its last use.

    before                                     after
      %b0 = zero.gather b0                       %b0 = zero.gather b0
      zero.wait %b0                              zero.wait %b0
      %w = zero.param %b0 "w"                    %w = zero.param %b0 "w"
      %1 = aten.mm(%x, %w)                       %1 = aten.mm(%x, %w)
                                                 zero.release %b0

The last use is that of any view of the bucket: `%t = aten.t(%w)` lives as long as `%t` is read. That of a
bucket which the forward keeps is in the backward.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, is_view, region_of


@dataclass(frozen=True)
class Release:
    name: ClassVar[str] = "release"
    requires: ClassVar[frozenset[str]] = frozenset({"gathered"})
    provides: ClassVar[frozenset[str]] = frozenset({"released"})

    def apply(self, graph: TrainGraph) -> str:
        order = {node: index for index, node in enumerate(graph.graph.nodes)}
        waits = [n for n in graph.nodes() if is_call(n, ops.wait)]
        gathered = [n for n in waits if is_call(cast(fx.Node, n.args[0]), ops.gather)]
        for full in gathered:
            last = max(aliases(full) | users_of_aliases(full), key=order.__getitem__)
            bucket = cast(str, cast(fx.Node, full.args[0]).args[1])
            with graph.inserting(last.next, region_of(last), full.meta["module"]) as insert:
                insert(ops.release, full, bucket)
        return f"{len(gathered)} releases"


def aliases(full: fx.Node) -> set[fx.Node]:
    """`full` and every view of it."""
    found, stack = {full}, [full]
    while stack:
        for user in stack.pop().users:
            if user not in found and is_view(user) and user.args[0] in found:
                found.add(user)
                stack.append(user)
    return found


def users_of_aliases(full: fx.Node) -> set[fx.Node]:
    """Every node of the graph that reads `full` or a view of it, releases apart."""
    readers = {user for alias in aliases(full) for user in alias.users}
    return {n for n in readers if n.op != "output" and not is_call(n, ops.release)}
