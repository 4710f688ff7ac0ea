"""Mean gradients before the step, for `engine.gradients()`: what the step would make of those kept so far.

At stages 0 and 1 ranks keep gradients of their own, which the step reduces, in the dtype and way that
the config says. Here the same nodes are a program of their own, so that the bits are the step's:

    step()
      %0: bf16[n] = aten._to_copy(%b0.kept, dtype=bf16)      # where they are reduced in another dtype
      %b0.mean = zero.reduce_scatter %0                      # stage 0: all_reduce
      zero.wait %b0.mean                                     # reduce_scatter false: this rank's slice of all

Where every backward reduces (stages 2 and 3, or one backward a step) what is kept are the means; with copies
(MiCS) and several backwards, those of one copy, and what is left is the sum along the copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from zerograph.ir import TrainGraph
from zerograph.layout import Bucket, Layout
from zerograph.passes.lower import Lower, Program
from zerograph.passes.reduce import Average, means
from zerograph.runtime.state import State


@dataclass
class Means:
    """The mean gradients of one engine."""

    state: State
    average: Average
    early: bool
    """Whether every backward reduces, over all ranks: what is kept are the means."""
    _made: tuple[Layout, Program] | None = None

    @torch.no_grad()
    def full(self) -> dict[str, Tensor | None]:
        """By trainable bucket the mean gradient [numel] so far, a new tensor in the dtype that it is kept in.

        None before the first backward since the last update. All ranks call it.
        """
        kept = {b.name: self.state.storages[b.name].kept for b in self._buckets()}
        own = {name: grad for name, grad in kept.items() if grad is not None}
        late = not self.early and len(own) == len(kept)
        reduced = self._reduced(own) if late else own
        return {name: self._whole(name, reduced) for name in kept}

    def _whole(self, name: str, reduced: Mapping[str, Tensor]) -> Tensor | None:
        if name not in reduced:
            return None
        own = reduced[name]
        whole = own if self.state.stage == 0 else self.state.world.all_gather(own)
        return whole.to(self.state.precision.accumulate(self.state.layout.buckets[name].dtype))

    def _reduced(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the step's reductions answer; `kept` stays as it is."""
        inputs: list[Any] = [
            kept[role.name].clone() if role.kind == "kept" else self.state.resolve(role)
            for role in self._program().inputs
        ]
        return dict(zip(kept, self._program().module(inputs)))

    def _program(self) -> Program:
        if self._made is None or self._made[0] is not self.state.layout:
            lower = Lower(self.state.world.name_of)
            self._made = self.state.layout, lower.program(self._graph(), "step")
        return self._made[1]

    def _graph(self) -> TrainGraph:
        """Of the reductions alone, bucket by bucket."""
        state, graph = self.state, fx.Graph()
        graph.output(dict.fromkeys(("forward", "saved", "backward", "step"), ()))
        module, mode = fx.GraphModule({}, graph), FakeTensorMode()
        tables = state.layout, state.precision, (), ()
        made = TrainGraph(module, "", *tables, mode, training=True, stage=state.stage)
        made.notes["collectives"] = state.world.algorithm
        kept = {}
        for bucket in self._buckets():
            dtype = state.precision.accumulate(bucket.dtype)
            numel = bucket.numel if state.stage < 3 else bucket.shard_numel
            value = made.fake(numel, dtype, state.world.device)
            kept[bucket] = made.add_placeholder("kept", bucket.name, value)
        with made.inserting(made.output, "step") as insert:
            found = means(made, insert, self.average, kept)
        made.set_outputs(step=list(found.values()))
        return made

    def _buckets(self) -> list[Bucket]:
        return self.state.layout.trainable_buckets()
