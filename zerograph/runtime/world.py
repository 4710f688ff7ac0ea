"""World: this process's rank, device and process groups."""

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zerograph import compat
from zerograph.collectives import Algorithm, Channel, algorithm_for
from zerograph.errors import PlanError
from zerograph.mesh import ALL, MODEL, Mesh

CHANNELS = ("gathers", "reductions")
"""Groups of their own, so that neither kind of collective queues behind the other."""
Key = tuple[str, int, int]
"""What a group along an axis is told by: the axis, its size and its stride."""
_groups: WeakKeyDictionary[dist.ProcessGroup, dict[Key, dist.ProcessGroup]] = WeakKeyDictionary()
_channels: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, Key], Channel]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class World:
    """Data-parallel ranks. Without torch.distributed it is one process.

    With a model-parallel group the processes are a grid (model_parallel.py): `rank`, `size` and `group` are
    of those that have the same part of the model.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    grid: Mesh | None = None
    """The axes of the ranks; None for one axis."""
    model: "World | None" = None
    """The ranks that compute one batch together, as a world of their own; None for each alone."""
    label: str = ""
    """What tells this world from others of the same processes, the same on all of its ranks."""

    def over(self, mesh: Mesh) -> "World":
        """The same ranks on a mesh."""
        return replace(self, grid=mesh)

    @property
    def mesh(self) -> Mesh:
        if self.grid is not None:
            return self.grid
        return Mesh.flat(self.size, self.model.size if self.model else 1)

    @property
    def place(self) -> int:
        """Which slice of every bucket this rank has."""
        return self.mesh.index(self.mesh.cut, self.rank)

    def name_of(self, axis: str = ALL) -> str:
        """The name of the group along an axis as functional collectives know it."""
        return str(self.group_along(axis).group_name) if self.group is not None else "alone"

    def group_along(self, axis: str) -> dist.ProcessGroup:
        """This rank's process group along an axis. The first asked for makes all, on all ranks together."""
        assert self.group is not None
        if axis == MODEL and self.model is not None:
            return self.model.group_along(ALL)
        if axis == ALL:
            return self.group
        made = _groups.setdefault(self.group, {})
        for each in self.mesh.used:
            if each != ALL and self._key(each) not in made:
                ranks = self.mesh.members(each, self.rank)
                made[self._key(each)] = compat.group_beside(self.group, ranks)
        return made[self._key(axis)]

    def _key(self, axis: str) -> Key:
        return axis, self.mesh.size(axis), self.mesh.stride(axis)

    @property
    def algorithm(self) -> Algorithm:
        """How this world's programs gather and reduce-scatter."""
        gloo = self.group is None or dist.get_backend(self.group) == "gloo"
        return algorithm_for(self.device) if gloo else "native"

    def channel(self, name: str, axis: str = ALL) -> Channel:
        """One of CHANNELS along an axis. The first one asked for makes all, on all ranks at the same time."""
        assert self.group is not None
        made = _channels.setdefault(self.group, {})
        for along in dict.fromkeys((axis, *self.mesh.used)):
            for kind in CHANNELS:
                if (kind, self._key(along)) not in made:
                    channel = Channel.beside(self.group_along(along), along)
                    made[kind, self._key(along)] = channel
        return made[name, self._key(axis)]

    def channels(self) -> Mapping[str, Channel]:
        """Those made so far, by name."""
        made = _channels.get(self.group, {}) if self.group is not None else {}
        return {f"{kind} {key}": channel for (kind, key), channel in made.items()}

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite `tensor` with rank `source`'s, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=source)

    def part(self, full: torch.Tensor, axis: str) -> torch.Tensor:
        """A copy of this rank's slice [n] of `full` [n * size], cut over an axis."""
        size, place = full.numel() // self.mesh.size(axis), self.mesh.index(axis, self.rank)
        return full[place * size : (place + 1) * size].clone()

    def share(
        self, value: torch.Tensor, axis: str, arena: torch.Tensor | None = None, place: int = 0
    ) -> torch.Tensor:
        """A copy of this rank's share [share] of a dense `value`, which all ranks along an axis have.

        Shares are cut from its storage; the last ones may be padded at their ends. With an arena [values,
        length] the copy is in row `place` of it.
        """
        assert self.model is not None, axis
        flat = value.as_strided((value.numel(),), (1,))
        length = -(-value.numel() // self.model.size)
        own = flat[length * self.model.rank : length * (self.model.rank + 1)]
        made = value.new_empty(length) if arena is None else arena[place, :length]
        made[: len(own)].copy_(own)
        made[len(own) :].zero_()
        return made

    def all_gather(self, shard: torch.Tensor) -> torch.Tensor:
        """The shards [n] of all ranks that hold a bucket together, in their order [n * slices]."""
        if self.size == 1:
            return shard.clone()
        ops, (slices, axis) = torch.ops._c10d_functional, (self.mesh.slices, self.mesh.cut)
        full = shard.new_empty(slices * shard.numel())
        ops.all_gather_into_tensor_out(shard.contiguous(), slices, self.name_of(axis), out=full)
        gathered: torch.Tensor = ops.wait_tensor(full)
        return gathered

    def gather_objects(self, mine: Any) -> list[Any]:
        """Everyone's object, in rank order."""
        found: list[Any] = [mine]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of `tensor` over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
            tensor.div_(self.size)
        return tensor


def init_distributed(backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the process group that torchrun describes in the environment; once, or not at all.

    `backend` is "nccl" where CUDA is available and "gloo" elsewhere, unless given. Without torchrun's
    variables, or when a group exists already, this does nothing.
    """
    if dist.is_initialized() or "RANK" not in os.environ:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 1:
        raise PlanError(f"WORLD_SIZE must be at least 1, got {os.environ['WORLD_SIZE']}")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend or ("nccl" if cuda else "gloo"), timeout=timeout)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def current_world(device: str | torch.device | None = None) -> World:
    """The world of this process, joining the process group if torchrun started it."""
    init_distributed()
    if device is None:
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else "cpu"
        )
    chosen = torch.device(device)
    if not dist.is_initialized():
        return World(0, 1, chosen, None)
    return World(dist.get_rank(), dist.get_world_size(), chosen, dist.group.WORLD)
