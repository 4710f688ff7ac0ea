"""The partials of which the norm is the sum: one of each slice of every gradient, on all ranks.

      %partial = zero.norm_partials [%b0.mean, %b1.mean]   # at stage 0, where ranks have all slices, one each
      %partials = zero.gather_partials %partial            # not at stage 0
      zero.wait %partials

With model-parallel ranks there are more slices: those of parameters of which each rank has a part are of all
ranks along `mp`; those of the others, which all have, count once, as the first rank has them. So the norm
is the same everywhere, to the bit. Megatron-LM counts so (arXiv:1909.08053), and DeepSpeed.

      %partials = zero.gather_partials %0 over mp          # of the parts: all
      %partials = zero.gather_partials %1 over mp          # of the rest
      zero.wait ..
      %3 = aten.slice(%partials, 0, 0, 2)                  # the first rank's
      %4 = aten.cat([.., %3])
"""

from collections.abc import Mapping

import torch
from torch import fx

from zerograph import ops
from zerograph.ir import Inserter, TrainGraph
from zerograph.layout import Bucket
from zerograph.mesh import MODEL, over

aten = torch.ops.aten


def partials_of(graph: TrainGraph, insert: Inserter, grads: Mapping[Bucket, fx.Node]) -> fx.Node:
    """Sums of squares, float64 [slices], of the buckets' gradients, for `zero.finish`."""
    if graph.mesh.model == 1:
        return _of_ranks(graph, insert, list(grads.values()))
    found = []
    for parallel in (True, False):
        own = [g for bucket, g in grads.items() if graph.layout.parallel(bucket.name) == parallel]
        if own:
            partials = _of_ranks(graph, insert, own)
            count, size = len(partials.meta["val"]), graph.mesh.model
            started = insert(ops.gather_partials, partials, size, axis=MODEL)
            gathered = insert(ops.wait, started)
            if not parallel:
                gathered = insert(aten.slice.Tensor, gathered, 0, 0, count)
            found.append(gathered)
    return insert(aten.cat.default, found) if len(found) > 1 else found[0]


def _of_ranks(graph: TrainGraph, insert: Inserter, grads: list[fx.Node]) -> fx.Node:
    """One for each slice, in the order of the data-parallel ranks."""
    whole, mesh = graph.stage == 0, graph.mesh
    partials = insert(ops.norm_partials, grads, graph.world if whole else 1)
    if whole:
        return partials
    return insert(ops.wait, insert(ops.gather_partials, partials, mesh.slices, **over(mesh.cut)))
