"""Checks of gradients: scaled, put, reduced and accumulated once each, and all in one way."""

from collections import Counter
from collections.abc import Iterator
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.codegen import in_place
from zerograph.ir import TrainGraph
from zerograph.nodes import axis_of, is_call, role_of
from zerograph.verify.common import bucket_of, say, source_of


def gradients_are_scaled(graph: TrainGraph) -> Iterator[str]:
    """With a scaled loss every gradient that arrives is scaled once, and inputs' are scaled back."""
    if not (graph.training and graph.precision.scaled):
        return
    (scale,) = graph.placeholders("scale")
    for tangent in graph.placeholders("tangent"):
        for user in tangent.users:
            if not is_call(user, torch.ops.aten.mul.Tensor) or user.args[1] is not scale:
                yield f"{user.name} uses the gradient of {role_of(tangent).name} unscaled"
    for gradient, node in zip(graph.gradients, graph.outputs("backward"), strict=True):
        source = source_of(cast(fx.Node, node))
        back = is_call(source, torch.ops.aten.div.Tensor) and source.args[1] is scale
        if gradient.kind == "input" and not back:
            yield f"the gradient of input {gradient.name} is not scaled back"


def gradients_are_reduced_once(graph: TrainGraph) -> Iterator[str]:
    buffers = [n for n in graph.nodes("backward") if is_call(n, ops.grad_buffer)]
    per_bucket = Counter(cast(str, n.args[1]) for n in buffers)
    expected = {b.name for b in graph.layout.trainable_buckets()} if graph.training else set()
    for bucket in sorted(expected | set(per_bucket)):
        if bucket not in expected:
            yield f"frozen bucket {bucket} has a gradient buffer"
        elif per_bucket[bucket] != 1:
            yield f"bucket {bucket} has {per_bucket[bucket]} gradient buffers, not one"
    puts: Counter[str] = Counter()
    for buffer in buffers:
        yield from _chain(graph, buffer, puts)
    for node in graph.nodes():
        if is_call(node, ops.put) and puts[cast(str, node.args[2])] == 0:
            yield f"{node.name} is written to a buffer that is not its bucket's"
    for name, param in graph.layout.params.items():
        due = int(graph.training and param.trainable and name not in graph.unused)
        if puts[name] != due:
            yield f"the gradient of {name} is reduced {puts[name]} times, not {due}"


def _chain(graph: TrainGraph, buffer: fx.Node, puts: Counter[str]) -> Iterator[str]:
    """Follow a buffer through its puts to its reduction and accumulation."""
    bucket, node = cast(str, buffer.args[1]), buffer
    while True:
        users = list(node.users)
        if len(users) != 1:
            yield f"{node.name}, the buffer of {bucket}, has {len(users)} users, not one"
            return
        (user,) = users
        if not is_call(user, ops.put):
            break
        param = graph.layout.params[cast(str, user.args[2])]
        if param.bucket != bucket or user.args[3] != param.offset:
            yield f"the gradient of {param.name} is put to a wrong place of {bucket}"
        puts[param.name] += 1
        node = user
    if graph.reduces_early:
        if not is_call(user, *_reductions(graph)) or user.args[1] != bucket:
            yield f"the buffer of {bucket} goes to {user.name} unreduced"
            return
        whole, user = is_call(user, ops.all_reduce), _behind(user)
        if whole and graph.stage > 0:
            if not is_call(user, ops.partition):
                yield f"the sum of all of {bucket} goes to {user.name}, not a slice of it"
                return
            user = next(iter(user.users), user)
        if graph.mesh.copies and not graph.syncs_late:
            if not is_call(user, ops.all_reduce) or user.args[1] != bucket:
                yield f"the gradients of {bucket} go to {user.name} without those of the other copies"
                return
            user = _behind(user)
    if graph.updates_in_backward:
        return  # `updates_agree` knows the rest
    if not is_call(user, ops.accumulate) or user.args[2] != bucket:
        yield f"the gradients of {bucket} are not accumulated but go to {user.name}"


def _reductions(graph: TrainGraph) -> tuple[OpOverload, ...]:
    """What sums a bucket over the ranks that hold it together."""
    return (ops.all_reduce,) if graph.stage == 0 else (ops.reduce_scatter, ops.all_reduce)


def _behind(start: fx.Node) -> fx.Node:
    """What uses a reduction once it is there."""
    return next(iter(next(iter(start.users), start).users), start)


def written_in_place(graph: TrainGraph) -> Iterator[str]:
    """What is said to be in place is written there: by an operator that can, to a buffer that exists."""
    order = {node: index for index, node in enumerate(graph.nodes())}
    for source, put, _ in in_place.writers(graph.nodes("backward")):
        name = cast(str, put.args[2])
        if not in_place.can_write(put):
            yield f"{source.name} cannot write the gradient of {name} into its place"
        elif order[source] < order[in_place.buffer_of(put)]:
            yield f"{source.name} writes the gradient of {name} to a buffer that is made later"


def accumulated_once(graph: TrainGraph) -> Iterator[str]:
    found = [n for n in graph.nodes() if is_call(n, ops.accumulate)]
    counts = Counter(map(bucket_of, found))
    pairs = zip(graph.gradients, graph.outputs("backward"), strict=True)
    kept = {g.name: cast(fx.Node, node) for g, node in pairs if g.kind == "kept"}
    for bucket in dict.fromkeys([*kept, *counts]):
        if counts[bucket] != 1 or bucket not in kept:
            yield f"gradients of {bucket} are accumulated {counts[bucket]} times, not once"
    for bucket, node in kept.items():
        if not is_call(node, ops.accumulate) or bucket_of(node) != bucket:
            yield f"{node.name} is kept as the gradients of {bucket}"
    if len({n.args[3] for n in found}) > 1:
        yield "buckets are accumulated with different weights"


def reductions_agree(graph: TrainGraph) -> Iterator[str]:
    """All gradients are averaged in the same way, along each axis."""
    first: dict[str, fx.Node] = {}
    for node in graph.nodes():
        if is_call(node, ops.reduce_scatter, ops.all_reduce):
            other = first.setdefault(axis_of(node), node)
            if (node.target, node.args[2:]) != (other.target, other.args[2:]):
                yield f"{say(node)} averages otherwise than {say(other)}"
