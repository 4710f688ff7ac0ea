"""update: the step region: mean gradients, their norm, clipping, the optimizer, fresh parameters.

    step()                                         # stage 1, with clipping
      %b0.mean = zero.reduce_scatter %b0.sum       # at stages 2 and 3 the backward did this
      zero.wait %b0.mean
      %part = zero.norm_partials [%b0.mean]
      %parts = zero.gather_partials %part
      zero.wait %parts
      %finish = zero.finish %parts, max_norm=1.0
      %norm = %finish[0]
      %control = %finish[1]                        # the factor of gradients
      zero.update %b0.shard, %b0.mean, .., control=%control   # in place on this rank's slice
      %b0.new = zero.refresh %b0.full, %b0.shard   # stages 1 and 2, persistent buckets: everyone's slices
      zero.wait %b0.new

The norm is at every stage the sum, in rank order, of one partial for each rank's slice (of one copy); at
stage 0, where every rank has every slice, no communication is needed for it. Where some parameter has no
gradient in this graph, ranks exchange which ones had (a parameter is left alone if it had none on any rank).
ZeRO, arXiv:1910.02054 section 5.1.

What gradients were multiplied by is divided out of the norm and, with clipping, in one factor:

      %0 = aten.reciprocal %scale                  # fp16; with weighted accumulation world / sum of weights
      %finish = zero.finish %parts, divided=%0, max_norm=1.0, skips   # fp16, bf16, weights: skips

A rule that needs norms of whole parameters (LAMB) takes its states first, and one exchange:

      %b0.norms = zero.measure %b0.shard, %b0.mean, .., control=%control   # sums of squares by parameter
      %norms = zero.gather_norms [%b0.norms]       # all buckets at once; not at stage 0
      zero.wait %norms
      %b0.totals = zero.sum_norms %norms
      zero.update %b0.shard, .., control=%control, norms=%b0.totals

`control` has the factor, and whether updates apply: with `skips` they do not if the norm is not finite.
The norm is the same on every rank, so all skip or none: a NaN or infinity anywhere is in everyone's norm.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import fx

from zerograph import ops
from zerograph.ir import Inserter, TrainGraph
from zerograph.layout import Bucket
from zerograph.mesh import over
from zerograph.nodes import is_call, region_of, role_of
from zerograph.passes.partials import partials_of
from zerograph.passes.reduce import MEAN, Average, means
from zerograph.passes.scale import add_scalar

aten = torch.ops.aten
_getitem = cast(Any, operator.getitem)


@dataclass(frozen=True)
class Update:
    rule: str
    """Name of the optimizer's rule."""
    states: tuple[str, ...]
    """Names of the rule's state slices, each as long as the master slice."""
    scalars: int
    """Columns of the table of scalars, one row a parameter group."""
    max_norm: float = 0.0
    """Global norm that gradients are clipped to; 0 for no clipping."""
    average: Average = MEAN
    weighted: bool = False
    """Whether losses carry weights, whose sum over micro-batches and ranks is divided out."""
    measures: bool = False
    """Whether the rule needs norms of whole parameters."""
    overlaps: bool = True
    """Whether refreshes are waited for in the next forward, and not where they start."""

    name: ClassVar[str] = "update"
    requires: ClassVar[frozenset[str]] = frozenset({"reduced"})
    provides: ClassVar[frozenset[str]] = frozenset({"updated"})

    def apply(self, graph: TrainGraph) -> str:
        kept = [n for g, n in zip(graph.gradients, graph.outputs("backward")) if g.kind == "kept"]
        if self.rule and self.overlaps:
            _wait_for_refreshes(graph)
        if not kept or not self.rule:
            return "no optimizer" if kept else "no gradients"
        graph.notes["optimizer"] = self.rule
        step = _Step(self, graph)
        buckets = [graph.layout.buckets[g.name] for g in graph.gradients if g.kind == "kept"]
        step.run({bucket: cast(fx.Node, node) for bucket, node in zip(buckets, kept)})
        return f"{len(kept)} buckets updated by {self.rule}"


@dataclass
class _Step:
    """Builds the step region at the end of the graph."""

    options: Update
    graph: TrainGraph

    def run(self, kept: Mapping[Bucket, fx.Node]) -> None:
        with self.graph.inserting(self.graph.output, "step") as insert:
            grads = means(self.graph, insert, self.options.average, kept, self.options.overlaps)
            norm, control = self._finish(insert, grads)
            used = self._used(insert)
            hyper = self._hyper()
            self._updates(insert, grads, hyper, used, control)
        self.graph.set_outputs(step=[norm])

    def _finish(
        self, insert: Inserter, grads: Mapping[Bucket, fx.Node]
    ) -> tuple[fx.Node, fx.Node | None]:
        """The norm, and what controls the updates; None where that is nothing."""
        partials = partials_of(self.graph, insert, grads)
        divided = self._divided(insert)
        skips = self.graph.precision.skips or self.options.weighted
        made = insert(ops.finish, partials, divided, self.options.max_norm, skips)
        norm = insert(_getitem, made, 0)
        if divided is None and not skips and self.options.max_norm <= 0:
            return norm, None
        return norm, insert(_getitem, made, 1)

    def _divided(self, insert: Inserter) -> fx.Node | None:
        """One over what mean gradients are too large by; None where that is one."""
        parts = []
        if self.graph.precision.scaled:
            scale = add_scalar(self.graph, "scale", torch.float32)
            parts.append(insert(aten.reciprocal.default, scale))
        if self.options.weighted:
            weight = add_scalar(self.graph, "weight", torch.float64)
            total = insert(ops.wait, insert(ops.sum_weights, weight, self.graph.world))
            one = insert(aten.reciprocal.default, total)
            parts.append(insert(aten.mul.Scalar, one, float(self.graph.world)))
        if len(parts) == 2:
            return insert(aten.mul.Tensor, *parts)
        return parts[0] if parts else None

    def _used(self, insert: Inserter) -> fx.Node:
        """Which parameters have a gradient: the host's to know, unless ranks have to ask each other."""
        count = sum(p.trainable for p in self.graph.layout.params.values())
        device = self._device if self.graph.unused else torch.device("cpu")
        with self.graph.fake_mode:
            value = torch.empty(count, dtype=torch.uint8, device=device)
        used = self.graph.add_placeholder("used", "used", value)
        if not self.graph.unused:
            return used
        return insert(ops.wait, insert(ops.any_rank, used, self.graph.world))

    def _hyper(self) -> fx.Node:
        shape = len(self.graph.layout.groups), self.options.scalars
        with self.graph.fake_mode:
            value = torch.empty(shape, dtype=torch.float32, device=self._device)
        return self.graph.add_placeholder("hyper", "hyper", value)

    def _updates(
        self,
        insert: Inserter,
        grads: Mapping[Bucket, fx.Node],
        hyper: fx.Node,
        used: fx.Node,
        control: fx.Node | None,
    ) -> None:
        rule, slices = self.options.rule, {bucket: self._slices(bucket) for bucket in grads}
        norms: dict[Bucket, fx.Node] = {}
        if self.options.measures:
            for bucket, (master, state, _) in slices.items():
                given = master, grads[bucket], state, hyper, used, control, bucket.name, rule
                norms[bucket] = insert(ops.measure, *given, len(bucket.params))
            norms = self._totals(insert, norms)
        for bucket in (b for b in self.graph.layout.trainable_buckets() if b in slices):
            master, state, low = slices[bucket]
            args = master, grads[bucket], state, low, hyper, used, control, bucket.name, rule
            insert(ops.update, *args, *([norms[bucket]] if norms else []))
            if bucket.refreshed(self.graph.stage):
                full = self.graph.placeholder("full", bucket.name)
                own, mesh = self._own(bucket), self.graph.mesh
                insert(ops.refresh, full, own, bucket.name, mesh.slices, **over(mesh.cut))
                if not self.options.overlaps:
                    insert(ops.refreshed, full, bucket.name)

    def _totals(self, insert: Inserter, own: dict[Bucket, fx.Node]) -> dict[Bucket, fx.Node]:
        """Sums over all ranks' parts of each parameter. All ranks exchange, whatever parameters they used."""
        if self.graph.stage == 0:
            return own
        mesh, norms = self.graph.mesh, list(own.values())
        gathered = insert(ops.wait, insert(ops.gather_norms, norms, mesh.slices, **over(mesh.cut)))
        firsts = accumulate((len(bucket.params) for bucket in own), initial=0)
        return {
            bucket: insert(ops.sum_norms, gathered, bucket.name, first, len(bucket.params))
            for bucket, first in zip(own, firsts)
        }

    def _slices(self, bucket: Bucket) -> tuple[fx.Node, list[fx.Node], fx.Node | None]:
        """(master, states, low-precision copy or None) that the optimizer writes."""
        own = self._own(bucket)
        master_dtype = self.graph.precision.master(bucket.dtype)
        numel = own.meta["val"].numel()
        master, low = own, None
        if bucket.dtype != master_dtype:
            master, low = self._state(bucket, "master", bucket.name, numel), own
        names = [f"{bucket.name}/{state}" for state in self.options.states]
        return master, [self._state(bucket, "state", name, numel) for name in names], low

    def _own(self, bucket: Bucket) -> fx.Node:
        """What the optimizer writes: all of the bucket at stage 0, else this rank's slice."""
        if self.graph.stage == 0:
            return self.graph.placeholder("full", bucket.name)
        found = [p for p in self.graph.placeholders("shard") if role_of(p).name == bucket.name]
        if found:
            return found[0]
        value = self.graph.fake(bucket.shard_numel, bucket.dtype, self._device)
        return self.graph.add_placeholder("shard", bucket.name, value)

    def _state(self, bucket: Bucket, kind: str, name: str, numel: int) -> fx.Node:
        dtype = self.graph.precision.master(bucket.dtype)
        return self.graph.add_placeholder(kind, name, self.graph.fake(numel, dtype, self._device))

    @property
    def _device(self) -> torch.device:
        return cast(torch.Tensor, self.graph.outputs("backward")[0].meta["val"]).device  # type: ignore[union-attr]


def _wait_for_refreshes(graph: TrainGraph) -> None:
    """Read a trained bucket only once the others' slices are there, which the step before has asked for."""
    trained = {b.name for b in graph.layout.buckets.values() if b.refreshed(graph.stage)}
    if trained:
        graph.notes["refreshes"] = True
    waited: dict[str, fx.Node] = {}
    for node in graph.nodes():
        bucket = (
            graph.layout.params[cast(str, node.args[1])].bucket if is_call(node, ops.param) else ""
        )
        if bucket not in trained:
            continue
        full, region = cast(fx.Node, node.args[0]), region_of(node)
        if bucket not in waited:
            block = graph.layout.buckets[bucket].block
            with graph.inserting(node, region, block) as insert:
                waited[bucket] = insert(ops.refreshed, full, bucket)
        if region_of(waited[bucket]) == region:
            node.replace_input_with(full, waited[bucket])
