"""Checks of the updates: every bucket once, from its mean gradient, by one factor, where nothing reads it."""

import operator
from collections import Counter
from collections.abc import Iterator
from typing import cast

import torch
from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.mesh import MODEL
from zerograph.nodes import Region, axis_of, is_call, is_reduced
from zerograph.passes.update_in_backward import reads
from zerograph.verify.common import bucket_of, say, source_of


def updated_once(graph: TrainGraph) -> Iterator[str]:
    if not graph.training or "optimizer" not in graph.notes:
        return
    step, where = graph.nodes("step"), _where(graph)
    trained = [b.name for b in graph.layout.trainable_buckets()]
    updates = {bucket_of(n): n for n in graph.nodes(where) if is_call(n, ops.update)}
    refreshes = {bucket_of(n): n for n in graph.nodes() if is_call(n, ops.refresh)}
    counts = Counter((n.target, bucket_of(n)) for n in graph.nodes())
    reduced = Counter(bucket_of(n) for n in step if is_call(n, ops.all_reduce, ops.reduce_scatter))
    due_reductions = int(not graph.reduces_early or graph.syncs_late)
    refreshed = {b.name for b in graph.layout.buckets.values() if b.refreshed(graph.stage)}
    for bucket in dict.fromkeys([*trained, *updates, *refreshes]):
        due_refreshes, times = int(bucket in refreshed), counts[ops.update, bucket]
        if times != 1 or bucket not in trained or bucket not in updates:
            yield f"bucket {bucket} is updated {times} times in the {where}, not once"
        if reduced[bucket] != due_reductions:
            yield f"bucket {bucket} is reduced {reduced[bucket]} times in the step"
        if (times := counts[ops.refresh, bucket]) != due_refreshes:
            yield f"bucket {bucket} is refreshed {times} times at stage {graph.stage}"
        elif due_refreshes and bucket in updates and refreshes[bucket] < updates[bucket]:
            yield f"bucket {bucket} is refreshed before its update"


def _where(graph: TrainGraph) -> Region:
    return "backward" if graph.updates_in_backward else "step"


def updates_stand_behind_reads(graph: TrainGraph) -> Iterator[str]:
    """An update in the backward changes what nothing of forward and backward reads any more."""
    for node in graph.nodes("backward"):
        if is_call(node, ops.update):
            for reader in reads(graph, cast(str, bucket_of(node))):
                if node < reader:
                    yield f"{reader.name} reads parameters of {bucket_of(node)} behind {say(node)}"


def updates_agree(graph: TrainGraph) -> Iterator[str]:
    """Every update takes its bucket's mean gradient, and the same flags and control."""
    kept = graph.reduces_early and not (graph.syncs_late or graph.updates_in_backward)
    updates = [n for n in graph.nodes(_where(graph)) if is_call(n, ops.update)]
    for node in updates:
        grad, used, control = (cast(fx.Node, node.args[i]) for i in (1, 5, 6))
        source = source_of(grad)
        if not (is_call(source, ops.accumulate) if kept else _is_mean(graph, source)):
            yield f"{say(node)} takes {grad.name}, which is not the mean over ranks"
        if control is not updates[0].args[6]:
            yield f"{say(node)} takes another factor or skip than {say(updates[0])}"
        if graph.unused and not is_call(source_of(used), ops.any_rank):
            yield f"{say(node)} does not know which parameters other ranks used"
    for node in updates[:1]:
        yield from _control_is_whole(graph, node)


def _is_mean(graph: TrainGraph, node: fx.Node) -> bool:
    """Whether a value is the last reduction of a bucket, or its slice where that is of all."""
    if graph.stage == 0 or graph.mesh.copies:
        return is_call(node, ops.all_reduce)
    return is_call(node, ops.reduce_scatter) or (is_call(node, ops.partition) and is_reduced(node))


def _control_is_whole(graph: TrainGraph, update: fx.Node) -> Iterator[str]:
    """Clipping, scale, weights and the skip are in what controls an update, if the step has any."""
    found = [n for n in graph.nodes("step") if is_call(n, ops.finish)]
    if len(found) != 1:
        yield f"the step has {len(found)} finishes, not one"
        return
    _, divided, max_norm, skips = found[0].args
    for what in ("scale", "weight"):
        source = set(graph.placeholders(what))
        if source and not _derives(divided, source, set()):
            yield f"{say(found[0])} leaves out the {what}"
    if graph.precision.skips and not skips:
        yield f"{say(update)} is not skipped when the norm is not finite"
    control = update.args[6]
    if (divided is not None or max_norm or skips) and not _is_control(control, found[0]):
        yield f"{say(update)} does not follow {say(found[0])}"


def _is_control(value: object, finish: fx.Node) -> bool:
    """Whether `value` is the second result of `finish`."""
    return (
        isinstance(value, fx.Node)
        and value.target is operator.getitem
        and value.args == (finish, 1)
    )


def _derives(value: object, sources: set[fx.Node], not_through: set[fx.Node]) -> bool:
    """Whether `value` is one of `sources`, or is computed from one past the nodes `not_through`."""
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if node in sources:
            return True
        if isinstance(node, fx.Node) and node not in seen and node not in not_through:
            seen.add(node)
            stack += node.all_input_nodes
    return False


def norm_covers_all(graph: TrainGraph) -> Iterator[str]:
    """All gradients that are applied are in the norm's partials, before an update overwrites them."""
    updates = [n for n in graph.nodes(_where(graph)) if is_call(n, ops.update)]
    partials = [n for n in graph.nodes("step") if is_call(n, ops.norm_partials, ops.sum_squares)]
    terms = {node: cast(list[fx.Node], node.args[0]) for node in partials}
    covered = Counter(_squared(term) for found in terms.values() for term in found)
    if partials and covered != Counter(n.args[1] for n in updates):
        names = ", ".join(node.name for node in partials)
        yield f"{names} does not cover the gradients that are applied"
    for node, found in terms.items():
        readers = {_squared(term): term for term in found}
        for update in updates:  # which may overwrite its gradient
            reader = readers.get(cast(fx.Node, update.args[1]))
            if reader is not None and update < (reader if is_call(reader, ops.squares) else node):
                yield f"{say(update)} stands before {node.name}"


def _squared(term: fx.Node) -> fx.Node:
    """The gradient of which a term of the norm is."""
    return cast(fx.Node, term.args[0]) if is_call(term, ops.squares) else term


def norm_counts_each_once(graph: TrainGraph) -> Iterator[str]:
    """With model-parallel ranks: parts count on each of them, what all have on the first."""
    if graph.mesh.model == 1:
        return
    buckets = {n.args[1]: str(bucket_of(n)) for n in graph.nodes("step") if is_call(n, ops.update)}
    counted = _counted(graph)
    for node in graph.nodes("step"):
        if not is_call(node, ops.norm_partials):
            continue
        grads = cast(list[fx.Node], node.args[0])
        parallel = {graph.layout.parallel(buckets[g]) for g in grads if g in buckets}
        if len(parallel) > 1:
            yield f"{node.name} sums parts of parameters and whole ones"
        if node not in counted:
            yield f"{node.name} is not gathered over model-parallel ranks"
            continue
        gathered, first = counted[node]
        if parallel == {first is not None}:
            counts, due = ("all ranks", "one") if first is None else ("one rank", "all")
            yield f"{node.name} counts {counts} along {MODEL}, not {due}"
        elif first is not None and first.args[1:] != (0, 0, gathered):
            yield f"{first.name} takes other partials than the first rank's"


def _counted(graph: TrainGraph) -> dict[fx.Node, tuple[int, fx.Node | None]]:
    """By partials that the norm sums over model-parallel ranks: how many a rank has, and a slice of them."""
    finishes = [n for n in graph.nodes("step") if is_call(n, ops.finish)]
    if not finishes:
        return {}
    joined = cast(fx.Node, finishes[0].args[0])
    several = is_call(joined, torch.ops.aten.cat.default)
    found: dict[fx.Node, tuple[int, fx.Node | None]] = {}
    for term in cast(list[fx.Node], joined.args[0]) if several else [joined]:
        first = term if is_call(term, torch.ops.aten.slice.Tensor) else None
        gather = source_of(cast(fx.Node, term.args[0]) if first is not None else term)
        if is_call(gather, ops.gather_partials) and axis_of(gather) == MODEL:
            own = cast(fx.Node, gather.args[0])
            start = source_of(own)
            if is_call(start, ops.gather_partials):
                start = source_of(cast(fx.Node, start.args[0]))
            found[start] = len(own.meta["val"]), first
    return found
