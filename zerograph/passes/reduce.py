"""reduce: gradients go into flat buffers as they appear, and the buffers over the ranks.

    before                                     after (stages 2 and 3)
      %8 = aten.mm(..)       # grad of w         %b0.grad = zero.grad_buffer b0
      return %8                                  %8 = aten.mm(..)
                                                 zero.put %b0.grad, %8 "w"
                                                 %b0.mean = zero.reduce_scatter %b0.grad
                                                 zero.wait %b0.mean
                                                 %b0.sum = zero.accumulate %b0.kept, %b0.mean
                                                 return %b0.sum

At stages 0 and 1 with gradient accumulation the buffer itself is accumulated, and reduced in the step, at the
boundary; at 2 and 3 (gradient partitioning, ZeRO, arXiv:1910.02054 section 5.2), and where a step has one
backward, each backward reduces, behind its compute, and what it receives accumulates. Every trainable bucket
is reduced, whichever gradients this graph has, so that the order of collectives never depends on them. Each
backward weighs 1/accumulation (with weighted accumulation 1: the losses carry their weights, and `update`
divides by their sum).

Where the config has `reduce_scatter` false a bucket is summed in whole, and a rank keeps its slice of it: the
same numbers for twice the bytes on a link.

      %b0.whole = zero.all_reduce %b0.grad
      zero.wait %b0.whole
      %b0.mean = zero.partition %b0.whole

With copies (MiCS, arXiv:2205.00119 section 3.4, its 2-hop synchronization) a reduction has two halves, the
second in the step where that has several backwards:

      %b0.group = zero.reduce_scatter %b0.grad over dp_shard
      zero.wait %b0.group
      %b0.mean = zero.all_reduce %b0.group over dp_replicate
      zero.wait %b0.mean
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from zerograph import ops
from zerograph.ir import Gradient, Inserter, TrainGraph
from zerograph.layout import Bucket
from zerograph.mesh import Mesh, over
from zerograph.nodes import axis_of, is_call


@dataclass(frozen=True)
class Average:
    """How the sum over ranks becomes a mean."""

    before: float = 1.0
    """Divisor of each rank's gradients before the sum; the rest is divided after it."""
    mean: bool = True
    """False for the plain sum."""
    scatters: bool = True
    """Whether a rank that keeps a slice is given that alone; else all of the bucket, of which it takes it."""

    def factors(self, world: int) -> tuple[float, float]:
        """(pre, post) of `post * sum over ranks of (pre * gradient)`."""
        return 1 / self.before, self.before / (world if self.mean else 1)

    def halves(self, mesh: Mesh) -> tuple[tuple[float, float], tuple[float, float]]:
        """The factors of a reduction over `mesh.cut`, and of the one along `mesh.copies` behind it."""
        pre, post = self.factors(mesh.world)
        if not mesh.copies:
            return (pre, post), (1.0, 1.0)
        if (pre, post) == MEAN.factors(mesh.world):  # each is then the collective's own average
            return (1.0, 1 / mesh.slices), (1.0, 1 / mesh.size(mesh.copies))
        return (pre, 1.0), (1.0, post)


MEAN = Average()


@dataclass(frozen=True)
class Reduce:
    weight: float = 1.0
    """What a backward's gradients are multiplied by when they are accumulated."""
    average: Average = MEAN

    name: ClassVar[str] = "reduce"
    requires: ClassVar[frozenset[str]] = frozenset({"sharded"})
    provides: ClassVar[frozenset[str]] = frozenset({"reduced"})

    def apply(self, graph: TrainGraph) -> str:
        if not graph.training:
            return "no backward"
        grads = dict(zip(graph.gradients, graph.outputs("backward"), strict=True))
        kept: list[tuple[Gradient, fx.Node]] = []
        order = {node: index for index, node in enumerate(graph.graph.nodes)}
        last: fx.Node | None = None
        for bucket in reversed(graph.layout.trainable_buckets()):
            found = {p: grads.get(Gradient("param", p)) for p in bucket.params}
            present = {p: n for p, n in found.items() if n is not None}
            in_order = sorted(present, key=lambda p: order[present[p]])
            filled = _fill(graph, bucket, {p: present[p] for p in in_order})
            place = filled.next if last is None else _later(graph, filled.next, last.next)
            total = self._reduce(graph, bucket, filled, place)
            kept.append((Gradient("kept", bucket.name), total))
            last = total if _in_layout_order(graph) else None
        inputs = [(g, n) for g, n in grads.items() if g.kind == "input"]
        graph.gradients = tuple(g for g, _ in kept + inputs)
        graph.set_outputs(backward=[n for _, n in kept + inputs])
        return f"{len(kept)} buckets reduced"

    def _reduce(
        self, graph: TrainGraph, bucket: Bucket, filled: fx.Node, place: fx.Node
    ) -> fx.Node:
        dtype = graph.precision.accumulate(bucket.dtype)
        whole = graph.stage == 0 or not graph.reduces_early
        numel = bucket.numel if whole else bucket.shard_numel
        value = graph.fake(numel, dtype, filled.meta["val"].device)
        kept = graph.add_placeholder("kept", bucket.name, value)
        with graph.inserting(place, "backward", bucket.block) as insert:
            grad = filled
            if graph.reduces_early:
                started = _start(graph, insert, self.average, bucket, grad)
                grad = _arrived(graph, insert, bucket, started)
            if graph.mesh.copies and not graph.syncs_late:
                grad = insert(ops.wait, _along_copies(graph, insert, self.average, bucket, grad))
            return insert(ops.accumulate, kept, grad, bucket.name, self.weight)


def means(
    graph: TrainGraph,
    insert: Inserter,
    average: Average,
    kept: Mapping[Bucket, fx.Node],
    overlaps: bool = True,
) -> dict[Bucket, fx.Node]:
    """In the step, each bucket's mean gradient: of the whole at stage 0, else of this rank's slice.

    All are started before the first is waited for, unless nothing `overlaps`.
    """
    if graph.reduces_early and not graph.syncs_late:
        return dict(kept)
    start, started = _along_copies if graph.syncs_late else _start, {}
    for bucket, node in kept.items():
        sent = cast_to(insert, node, graph.precision.reduce(bucket.dtype))
        started[bucket] = start(graph, insert, average, bucket, sent)
        if not overlaps:
            started[bucket] = _arrived(graph, insert, bucket, started[bucket])
    if not overlaps:
        return started
    return {bucket: _arrived(graph, insert, bucket, node) for bucket, node in started.items()}


def _start(
    graph: TrainGraph, insert: Inserter, average: Average, bucket: Bucket, sent: fx.Node
) -> fx.Node:
    """The reduction of one bucket, over the ranks that hold it together."""
    scatters = average.scatters and graph.stage > 0
    target = ops.reduce_scatter if scatters else ops.all_reduce
    mesh, (factors, _) = graph.mesh, average.halves(graph.mesh)
    return insert(target, sent, bucket.name, *factors, mesh.slices, **over(mesh.cut))


def _arrived(graph: TrainGraph, insert: Inserter, bucket: Bucket, started: fx.Node) -> fx.Node:
    """What a rank keeps of a reduction: what it is given, or its slice of that."""
    given, mesh = insert(ops.wait, started), graph.mesh
    whole = is_call(started, ops.all_reduce) and axis_of(started) == mesh.cut
    if graph.stage == 0 or not whole:
        return given
    return insert(ops.partition, given, bucket.name, mesh.slices, **over(mesh.cut))


def _along_copies(
    graph: TrainGraph, insert: Inserter, average: Average, bucket: Bucket, sent: fx.Node
) -> fx.Node:
    """The second half of it: the sum of a slice over the copies of the bucket."""
    mesh, (_, factors) = graph.mesh, average.halves(graph.mesh)
    size = mesh.size(mesh.copies)
    return insert(ops.all_reduce, sent, bucket.name, *factors, size, **over(mesh.copies))


def cast_to(insert: Inserter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A value in `dtype`; itself if it is."""
    if node.meta["val"].dtype == dtype:
        return node
    return insert(torch.ops.aten._to_copy.default, node, dtype=dtype)


def _in_layout_order(graph: TrainGraph) -> bool:
    """Whether a backward's reductions are in the same order in every graph of a model.

    Below stage 2 ranks may use different heads in one step, so that none waits for a gradient that it lacks.
    """
    return graph.stage < 2 and graph.reduces_early


def _fill(graph: TrainGraph, bucket: Bucket, grads: dict[str, fx.Node]) -> fx.Node:
    """A buffer with the bucket's gradients, each put there as soon as it exists."""
    storage = graph.placeholder("shard" if bucket.sliced(graph.stage) else "full", bucket.name)
    dtype = graph.precision.reduce(bucket.dtype)
    first = next(iter(grads.values()), None)
    none = graph.first("backward") if _in_layout_order(graph) else graph.end("backward")
    place = _behind(graph, first) if first is not None else none
    with graph.inserting(place, "backward", bucket.block) as insert:
        buffer = insert(ops.grad_buffer, storage, bucket.name, bucket.numel, dtype)
    for name, grad in grads.items():
        param = graph.layout.params[name]
        before = _later(graph, _behind(graph, grad), buffer.next)
        with graph.inserting(before, "backward", bucket.block) as insert:
            view = list(param.shape), list(param.stride)
            buffer = insert(ops.put, buffer, grad, name, param.offset, *view)
    return buffer


def _behind(graph: TrainGraph, grad: fx.Node) -> fx.Node:
    """The place right behind a gradient, in the backward."""
    backward = grad.op == "call_function" and grad.meta["region"] == "backward"
    return grad.next if backward else graph.first("backward")


def _later(graph: TrainGraph, one: fx.Node, other: fx.Node) -> fx.Node:
    return other if one < other else one
