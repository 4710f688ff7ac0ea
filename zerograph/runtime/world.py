"""World: this process's rank, device and process group."""

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zerograph.collectives import Algorithm, Channel, algorithm_for
from zerograph.errors import PlanError

CHANNELS = ("gathers", "reductions")
"""Groups of their own, so that neither kind of collective queues behind the other."""
_channels: WeakKeyDictionary[dist.ProcessGroup, dict[str, Channel]] = WeakKeyDictionary()


@dataclass(frozen=True)
class World:
    """Data-parallel ranks. Without torch.distributed it is one process."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def group_name(self) -> str:
        """The group's name as functional collectives know it."""
        return str(self.group.group_name) if self.group is not None else "alone"

    @property
    def algorithm(self) -> Algorithm:
        """How this world's programs gather and reduce-scatter."""
        gloo = self.group is None or dist.get_backend(self.group) == "gloo"
        return algorithm_for(self.device) if gloo else "native"

    def channel(self, name: str) -> Channel:
        """One of CHANNELS. The first one asked for makes all, on all ranks at the same time."""
        assert self.group is not None
        if self.group not in _channels:
            _channels[self.group] = {each: Channel.beside(self.group) for each in CHANNELS}
        return _channels[self.group][name]

    def channels(self) -> Mapping[str, Channel]:
        """Those made so far, by name."""
        return _channels.get(self.group, {}) if self.group is not None else {}

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite `tensor` with rank `source`'s, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=source, group=self.group)

    def all_gather(self, shard: torch.Tensor) -> torch.Tensor:
        """All ranks' shards [n] concatenated in rank order [size * n]."""
        if self.size == 1:
            return shard.clone()
        ops = torch.ops._c10d_functional
        full = shard.new_empty(self.size * shard.numel())
        ops.all_gather_into_tensor_out(shard.contiguous(), self.size, self.group_name, out=full)
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
