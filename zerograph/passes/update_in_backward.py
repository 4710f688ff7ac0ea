"""update_in_backward: each bucket is updated as soon as it is reduced, and its gradient ends there.

    before                                         after
      backward                                       backward
        zero.wait %b0.mean                             zero.wait %b0.mean
        %b0.sum = zero.accumulate %b0.kept, ..         %b0.squares = zero.squares %b0.mean, 1
        return %b0.sum                                 zero.update.adamw %b0.shard, %b0.mean, ..
      step                                             return %b0.squares
        %partial = zero.norm_partials [%b0.sum, ..]  step
        ..                                             %partial = zero.sum_squares [%b0.squares, ..]
        zero.update.adamw %b0.shard, %b0.sum, ..       ..

The update stands behind the last use of the bucket's parameters: where a rank holds them in full the
backward reads what the update writes, and a gather that is under way reads the shard. Of a gradient nothing
is left but its sums of squares, of which the step makes the norm, with the same bits. No update waits for
that norm, so none may depend on it (`config` and `optimizer_of` refuse what does). Where some parameter has
no gradient, ranks exchange which ones have at the start of the backward, not in the step.

The refreshes of stages 1 and 2 stay in the step; `schedule` says which of them start here.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from zerograph import ops
from zerograph.ir import Gradient, TrainGraph
from zerograph.nodes import bucket_of, is_call, region_of, role_of
from zerograph.passes.reduce import cast_to
from zerograph.passes.release import aliases, users_of_aliases


@dataclass(frozen=True)
class UpdateInBackward:
    name: ClassVar[str] = "update_in_backward"
    requires: ClassVar[frozenset[str]] = frozenset({"updated"})
    provides: ClassVar[frozenset[str]] = frozenset({"updated_in_backward"})

    def apply(self, graph: TrainGraph) -> str:
        updates = {bucket_of(n): n for n in graph.nodes("step") if is_call(n, ops.update)}
        if not updates:
            return "no updates"
        graph.notes["updates"] = "backward"
        pairs = list(zip(graph.gradients, graph.outputs("backward"), strict=True))
        parts = graph.world if graph.stage == 0 else 1
        kept: dict[fx.Node, fx.Node] = {}
        returned: list[tuple[Gradient, fx.Node]] = []
        for gradient, node in pairs:
            node = cast(fx.Node, node)
            if gradient.kind == "kept":
                gradient, made = Gradient("squares", gradient.name), _squares(graph, node, parts)
                _move(graph, updates[gradient.name], made)
                kept[node] = node = made
            returned.append((gradient, node))
        graph.gradients = tuple(gradient for gradient, _ in returned)
        graph.set_outputs(backward=[node for _, node in returned])
        _sum_squares(graph, kept)
        for accumulated in kept:
            _end(graph, accumulated)
        _ask_early(graph, min(updates.values()))
        return f"{len(updates)} buckets updated in the backward"


def _squares(graph: TrainGraph, accumulated: fx.Node, parts: int) -> fx.Node:
    """The sums of squares of a mean gradient, in place of its accumulation, which others still read."""
    mean, bucket = cast(fx.Node, accumulated.args[1]), bucket_of(accumulated)
    with graph.inserting(accumulated, "backward", accumulated.meta["module"]) as insert:
        mean = cast_to(insert, mean, accumulated.meta["val"].dtype)
        return insert(ops.squares, mean, bucket, parts)


def _move(graph: TrainGraph, update: fx.Node, squares: fx.Node) -> None:
    """Let an update take the mean of which `squares` are, behind the last use of its bucket's parameters."""
    update.update_arg(1, squares.args[0])
    last = max([squares, *reads(graph, bucket_of(update))])
    last.append(update)
    update.meta = {**update.meta, "region": "backward", "module": squares.meta["module"]}


def reads(graph: TrainGraph, bucket: str) -> list[fx.Node]:
    """Everything in forward and backward that reads, waits for or releases a bucket's parameters."""
    full = [p for p in graph.placeholders("full") if role_of(p).name == bucket]
    gathers = [n for n in graph.nodes() if is_call(n, ops.gather) and bucket_of(n) == bucket]
    found = {n for root in (*full, *gathers) for n in aliases(root) | users_of_aliases(root)}
    found |= {user for n in found for user in n.users if is_call(user, ops.release)}
    return [n for n in found if n.op == "call_function" and region_of(n) != "step" and _reads(n)]


def _reads(node: fx.Node) -> bool:
    """Whether a node does not write what it is given, and makes no buffer in its likeness."""
    return not is_call(node, ops.update, ops.refresh, ops.grad_buffer)


def _sum_squares(graph: TrainGraph, kept: dict[fx.Node, fx.Node]) -> None:
    """The norm's partials from the squares of each gradient."""
    (partials,) = (n for n in graph.nodes("step") if is_call(n, ops.norm_partials))
    squares = [kept[grad] for grad in cast(list[fx.Node], partials.args[0])]
    with graph.inserting(partials, "step") as insert:
        partials.replace_all_uses_with(insert(ops.sum_squares, squares))
    graph.graph.erase_node(partials)


def _end(graph: TrainGraph, accumulated: fx.Node) -> None:
    kept = cast(fx.Node, accumulated.args[0])
    graph.graph.erase_node(accumulated)
    graph.graph.erase_node(kept)


def _ask_early(graph: TrainGraph, first: fx.Node) -> None:
    """Ask other ranks which parameters they used at the start, and wait for it before the first update."""
    for node in graph.nodes("step"):
        if is_call(node, ops.any_rank):
            (wait,) = node.users
            graph.first("backward").prepend(node)
            first.prepend(wait)
            node.meta["region"] = wait.meta["region"] = "backward"
