"""What a step starts for the next one, and where: gathers that the forward needs first, refreshes.

Where the step updates, right behind the update of a bucket:

    step      zero.update.adamw %b0.shard, ..  zero.gather_ahead b0  zero.update.adamw %b1.shard, ..

Where the backward updates, the link has room for some of them behind the reductions. What the forward needs
last is reduced and updated first, so these are of the last buckets, `SHARE` of all elements. The others are
in the forward's order in the step, behind the start of the norm's exchange, which is small and waited for:

    backward  zero.update.adamw %b3.shard, ..  zero.gather_ahead b3  ..  zero.update.adamw %b0.shard, ..
    step      %partials = zero.gather_partials %partial  zero.gather_ahead b0  ..  zero.wait %partials
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.nodes import bucket_of, is_call, module_of

SHARE = 1 / 3
"""Of all elements, how many are sent to the next step in the backward. A backward computes about twice as
long as a forward, in which the link has the rest to send; beside the reductions, which all fall into the
backward, both are then equally long on the link: (1 + SHARE) / (1 - SHARE) = 2."""


def start_gathers(graph: TrainGraph, gathers: Sequence[fx.Node]) -> None:
    """Have the step before start these gathers of the forward."""
    if not gathers:
        return
    starts, place = [], _first_place(graph)
    for gather in gathers:
        shard, bucket, world = gather.args
        gather.args = (shard, bucket, world, True)
        if not graph.updates_in_backward:
            place = max(place, _updates(graph).get(cast(str, bucket), place))
        with graph.inserting(place.next, "step", module_of(gather)) as insert:
            place = insert(ops.gather_ahead, shard, bucket, world, **gather.kwargs)
        starts.append(place)
    if graph.updates_in_backward:
        _start_in_backward(graph, starts)


def start_refreshes(graph: TrainGraph) -> None:
    """Where the backward updates, start some refreshes there, and the others before the step waits."""
    refreshes = [n for n in graph.nodes("step") if is_call(n, ops.refresh)]
    if refreshes and graph.updates_in_backward:
        place = _first_place(graph)
        for refresh in refreshes:
            place.append(refresh)
            place = refresh
        _start_in_backward(graph, refreshes)


def _start_in_backward(graph: TrainGraph, starts: Sequence[fx.Node]) -> None:
    """Move the last of `starts` right behind the update of their buckets."""
    updates = _updates(graph)
    room = SHARE * sum(bucket.numel for bucket in graph.layout.trainable_buckets())
    backwards = starts[::-1]
    sizes = accumulate(int(start.meta["val"].numel()) for start in backwards)
    for start, total in zip(backwards, sizes):
        update = updates.get(bucket_of(start))
        if total > room or update is None:
            break
        update.append(start)
        start.meta["region"] = "backward"


def _updates(graph: TrainGraph) -> dict[str, fx.Node]:
    return {bucket_of(n): n for n in graph.nodes() if is_call(n, ops.update)}


def _first_place(graph: TrainGraph) -> fx.Node:
    """What the first start in the step stands behind."""
    step = graph.nodes("step")
    if graph.updates_in_backward:
        return next(n for n in step if is_call(n, ops.gather_partials))
    return next(n for n in step if is_call(n, ops.update))
