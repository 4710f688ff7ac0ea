"""What a step starts for the next one: gathers at stage 3, refreshes where ranks hold full buckets.

    step      zero.gather_ahead b0   ->  ahead.begin(shard, "b0")
    forward   zero.gather b0 ahead   ->  ahead.take(shard, "b0")       that one, or a new one
    step      zero.refresh           ->  ahead.refresh(full, shard, "b0")
    forward   zero.refreshed         ->  ahead.refreshed(full, "b0")   waits, if it is under way

All that is under way reads shards, so `settle` waits for it before anything else writes them: the next step,
loading, `gathered`. What was gathered from shards that then change is dropped.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from zerograph.collectives import start_gather
from zerograph.mesh import named
from zerograph.runtime.world import World


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor: ...


@dataclass
class Ahead:
    """What is under way for the next step of one engine."""

    world: World
    _gathers: dict[str, Pending] = field(default_factory=dict)
    _refreshes: dict[str, Pending] = field(default_factory=dict)

    def begin(self, shard: Tensor, bucket: str) -> None:
        """Start gathering the shards [n] of a bucket."""
        self._gathers[bucket] = self._start(shard, bucket)

    def take(self, shard: Tensor, bucket: str) -> Pending:
        """The gather that was begun, or one that is begun now."""
        found = self._gathers.pop(bucket, None)
        return self._start(shard, bucket) if found is None else found

    def refresh(self, full: Tensor, shard: Tensor, bucket: str) -> None:
        """Start gathering all ranks' slices into `full` [n * world], of which `shard` [n] is this rank's."""
        self._refreshes[bucket] = self._start(shard, bucket, full)

    def refreshed(self, full: Tensor, bucket: str) -> Tensor:
        """`full`, with the others' slices."""
        if bucket in self._refreshes:
            self._refreshes.pop(bucket).wait()
        return full

    def settle(self) -> None:
        """Wait for all; what was gathered is dropped."""
        for pending in [*self._refreshes.values(), *self._gathers.values()]:
            pending.wait()
        self._refreshes.clear()
        self._gathers.clear()

    def _start(self, shard: Tensor, bucket: str, full: Tensor | None = None) -> Pending:
        size, axis = self.world.mesh.slices, self.world.mesh.cut
        if full is None:
            full = shard.new_empty(shard.numel() * size)
        if self.world.algorithm == "point-to-point":
            return self.world.channel("gathers", axis).gather(shard, full, bucket)
        what = named(f"the gather of bucket {bucket}", axis)
        return start_gather(shard, full, what, size, self.world.name_of(axis))
