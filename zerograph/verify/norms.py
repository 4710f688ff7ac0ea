"""Checks of rules that need norms of whole parameters: states are measured once, and sums are exchanged."""

from collections import Counter
from collections.abc import Iterator
from typing import cast

from torch import fx

from zerograph import ops
from zerograph.codegen.rules import rule_of
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call
from zerograph.verify.common import bucket_of, say, source_of

_SHARED = {
    "master": (0, 0),
    "gradient": (1, 1),
    "states": (2, 2),
    "flags": (4, 5),
    "control": (5, 6),
}
"""What a measure and its bucket's update both take, with the argument of each."""


def measured_once(graph: TrainGraph) -> Iterator[str]:
    """Every bucket is measured once, of what its update takes; where the rule has no norms, never."""
    counts = Counter(bucket_of(n) for n in graph.nodes() if is_call(n, ops.measure))
    updates = {bucket_of(n): n for n in graph.nodes("step") if is_call(n, ops.update)}
    for bucket in dict.fromkeys([*updates, *counts]):
        due = int(bucket in updates and _measures(updates[bucket]))
        if counts[bucket] != due:
            yield f"bucket {bucket} is measured {counts[bucket]} times, not {due}"
    for node in graph.nodes("step"):
        if not is_call(node, ops.measure) or bucket_of(node) not in updates:
            continue
        update = updates[bucket_of(node)]
        for what, (here, there) in _SHARED.items():
            if node.args[here] != update.args[there]:
                yield f"{say(node)} takes another {what} than {say(update)}"


def norms_are_whole(graph: TrainGraph) -> Iterator[str]:
    """An update takes the sums over all ranks of what its own bucket's measure gave."""
    for node in graph.nodes("step"):
        if not is_call(node, ops.update):
            continue
        norms = node.args[9] if len(node.args) > 9 else None
        if not _measures(node):
            if norms is not None:
                yield f"{say(node)} takes norms, which its rule does not have"
        elif not isinstance(norms, fx.Node):
            yield f"{say(node)} takes no norms of whole parameters"
        else:
            yield from _whole(graph, node, norms)


def _whole(graph: TrainGraph, update: fx.Node, norms: fx.Node) -> Iterator[str]:
    if graph.stage > 0:
        if not is_call(norms, ops.sum_norms):
            yield f"{say(update)} takes {norms.name}, which is not summed over ranks"
            return
        gathered, bucket, first, params = norms.args
        start = source_of(cast(fx.Node, gathered))
        if not is_call(start, ops.gather_norms):
            yield f"{norms.name} sums {start.name}, which is not of all ranks"
            return
        found = _at(cast(list[fx.Node], start.args[0]), cast(int, first), cast(int, params))
        if found is None:
            yield f"{norms.name} of {bucket} sums other rows than one bucket's"
            return
        norms = found
    if not is_call(norms, ops.measure) or bucket_of(norms) != bucket_of(update):
        yield f"{say(update)} takes norms of {norms.name}, which is not its own bucket's measure"


def _at(gathered: list[fx.Node], first: int, params: int) -> fx.Node | None:
    """Whose rows these are among what is gathered."""
    offset = 0
    for node in gathered:
        rows = len(node.meta["val"])
        if (offset, rows) == (first, params):
            return node
        offset += rows
    return None


def _measures(update: fx.Node) -> bool:
    rule = rule_of(cast(str, update.args[8]))
    return rule is not None and rule.apply is not None
