"""State: the flat storage of one rank, and how values get into it and out.

Per bucket, by stage:

               parameters                     kept gradients     master, optimizer states
    stage 0    full                           full               full
    stage 1    full (shard = a view of it)    full               shard
    stage 2    full (shard = a view of it)    shard              shard
    stage 3    shard                          shard              shard

A bucket that is persistent lies at stage 3 as at stage 2 (layout.py). In fp32 the master is the parameter's
own storage. ZeRO, arXiv:1910.02054, figure 1.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zerograph.collectives import Channel
from zerograph.errors import PlanError
from zerograph.layout import Bucket, Layout, Param
from zerograph.nodes import Role
from zerograph.precision import Precision
from zerograph.runtime.ahead import Ahead
from zerograph.runtime.regions import Regions
from zerograph.runtime.world import World


@dataclass
class Storage:
    """One bucket on this rank."""

    bucket: Bucket
    full: Tensor | None
    shard: Tensor
    """This rank's slice; the whole bucket at stage 0."""
    master: Tensor | None
    """What the optimizer updates; None for a frozen bucket. May be `shard` itself."""
    states: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    """Gradients since the last step; None before the first backward."""
    squares: Tensor | None = None
    """Of the gradients that the backward since the last step has applied, their sums of squares."""


@dataclass
class State:
    """All buckets of one rank, and the module whose parameters they hold."""

    module: nn.Module
    layout: Layout
    precision: Precision
    stage: int
    world: World
    storages: dict[str, Storage] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    scale: Tensor | None = None
    """The loss scale, fp32 []; None where the loss is not scaled."""
    shown: set[str] = field(default_factory=set)
    """Parameters that hold their full values at the moment (runtime/shown.py)."""
    ahead: Ahead = field(init=False)
    """What the last step has started for the next."""
    regions: Regions = field(init=False)
    """Where checkpointed regions begin and end."""
    version: int = 0
    """Counts the changes of parameters, so that a backward notices one since its forward."""

    def __post_init__(self) -> None:
        self.ahead = Ahead(self.world)
        self.regions = Regions(self.world.device, self.world.rank == 0)

    @classmethod
    def take_over(
        cls,
        module: nn.Module,
        layout: Layout,
        precision: Precision,
        stage: int,
        world: World,
        states: tuple[str, ...],
    ) -> "State":
        """Move rank 0's parameters into flat storage, bucket by bucket, freeing the model's own.

        At the peak a rank holds the model and one bucket. Other ranks' models may be on the meta device.
        """
        state = cls(module, layout, precision, stage, world)
        state.parameters = {name: module.get_parameter(name) for name in layout.params}
        for parameter in state.parameters.values():
            parameter._zerograph_state = state  # type: ignore[attr-defined]
        _require_values(state)
        for bucket in layout.buckets.values():
            master = state._flat_from(bucket, precision.master(bucket.dtype))
            for param in layout.bucket_params(bucket.name):
                clear(state.parameters[param.name], param)
            state.storages[bucket.name] = state.store(bucket, master, states)
        _move_buffers(module, world)
        return state

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nobody, ()

    # Reading

    def resolve(self, role: Role) -> Tensor | Channel | Ahead | World | Regions | None:
        """The tensor (or channel) behind a program's input."""
        if role.kind == "scale":
            return self.scale
        if role.kind == "channel":
            return self._channel(role.name)
        name, _, part = role.name.partition("/")
        storage = self.storages[name]
        if role.kind == "state":
            return storage.states[part]
        found: Tensor | None = getattr(storage, role.kind)
        return found

    def _channel(self, name: str) -> Channel | Ahead | World | Regions:
        if name == "regions":
            return self.regions
        if name in ("ahead", "mesh"):
            return self.ahead if name == "ahead" else self.world
        kind, _, axis = name.partition("/")
        return self.world.channel(kind, axis)

    def full_values(self, bucket: Bucket) -> Tensor:
        """The whole bucket [numel] in its most precise form, the same on all ranks. A new tensor."""
        storage = self.storages[bucket.name]
        if storage.master is None:
            if storage.full is not None:
                return storage.full.clone()
            return self.world.all_gather(storage.shard)
        if self.stage == 0:
            return storage.master.clone()
        return self.world.all_gather(storage.master)

    def view(self, flat: Tensor, param: Param) -> Tensor:
        """A parameter as a view of its full bucket."""
        return flat.as_strided(param.shape, param.stride, param.offset)

    def own(self, flat: Tensor) -> Tensor:
        """This rank's slice of a full bucket (all of it at stage 0)."""
        if self.stage == 0:
            return flat
        size, place = flat.numel() // self.world.mesh.slices, self.world.place
        return flat[place * size : (place + 1) * size]

    # Writing

    def write(self, bucket: Bucket, flat: Tensor, params: Iterable[Param]) -> None:
        """Take the values of these parameters from `flat` [numel], the same on all ranks."""
        self.ahead.settle()
        storage = self.storages[bucket.name]
        targets = [(storage.master, self.own(flat)), (storage.shard, self.own(flat))]
        for param in params:
            low, high = self.piece(param)
            pairs = [(t[low:high], new[low:high]) for t, new in targets if t is not None]
            if storage.full is not None:
                whole = slice(param.offset, param.offset + param.numel)
                pairs.append((storage.full[whole], flat[whole]))
            for target, new in pairs:
                new = new.to(target.dtype)
                if not torch.equal(target, new):
                    target.copy_(new)
                    self.version += 1

    def piece(self, param: Param) -> tuple[int, int]:
        """(start, stop) of a parameter's elements in this rank's slice of its bucket, padding left out."""
        size = self.storages[param.bucket].shard.numel()
        begin = size * self.world.place if self.stage else 0
        low = min(max(param.offset - begin, 0), size)
        return low, max(low, min(param.offset + param.numel - begin, size))

    def drop_gradients(self) -> None:
        for storage in self.storages.values():
            storage.kept = storage.squares = None

    def nbytes(self) -> dict[str, int]:
        """Live bytes on this rank: of parameters, gradients and optimizer, each storage once."""
        seen: set[int] = set()

        def count(tensors: Iterable[Tensor | None]) -> int:
            total = 0
            for tensor in tensors:
                if tensor is not None and tensor.untyped_storage().data_ptr() not in seen:
                    seen.add(tensor.untyped_storage().data_ptr())
                    total += tensor.untyped_storage().nbytes()
            return total

        all_ = list(self.storages.values())
        return {
            "parameters": count(t for s in all_ for t in (s.full, s.shard)),
            "gradients": count(s.kept for s in all_),
            "optimizer": count(t for s in all_ for t in (s.master, *s.states.values())),
        }

    # Building

    def _flat_from(self, bucket: Bucket, dtype: torch.dtype) -> Tensor:
        """The bucket's values of rank 0 on every rank, in the master dtype (frozen: the bucket's)."""
        dtype = dtype if bucket.trainable else bucket.dtype
        flat = torch.zeros(bucket.numel, dtype=dtype, device=self.world.device)
        if self.world.rank == 0:
            for param in self.layout.bucket_params(bucket.name):
                self.view(flat, param).copy_(self.parameters[param.name].detach())
        self.world.broadcast(flat)
        return flat

    def store(self, bucket: Bucket, values: Tensor, states: tuple[str, ...]) -> Storage:
        """The storage of a bucket whose full `values` [numel] are given; states are zero."""
        low = values if values.dtype == bucket.dtype else values.to(bucket.dtype)
        full = None if bucket.sliced(self.stage) else low
        own = self.own(low)
        shard = own if full is not None else own.clone()
        storage = Storage(bucket, full, shard, None)
        if bucket.trainable:
            same = values.dtype == bucket.dtype
            storage.master = shard if same else self.own(values).clone()
            storage.states = {name: torch.zeros_like(storage.master) for name in states}
        return storage


def require_unowned(module: nn.Module) -> None:
    """Raise PlanError if an engine has a parameter of `module`: its values are elsewhere."""
    for name, parameter in module.named_parameters():
        owner = getattr(parameter, "_zerograph_state", None)
        if owner is not None:
            raise PlanError(
                f"parameter {name} of {type(module).__name__} belongs to an engine already (of "
                f"{type(owner.module).__name__}), which has its values; destroy() that engine first, or "
                "train both parts in one model"
            )


def _nobody() -> None:
    """What a State is in a copy or a pickle of its model: these belong to no engine."""


def clear(parameter: nn.Parameter, param: Param) -> None:
    """Leave a parameter its shape and dtype, with one element of NaN as storage."""
    value = float("nan") if parameter.dtype.is_floating_point or parameter.dtype.is_complex else 0
    one = torch.full((), value, dtype=parameter.dtype, device=_home(parameter))
    with torch.no_grad():
        parameter.data = one.expand(param.shape)
    parameter.grad = None


def _home(parameter: nn.Parameter) -> torch.device:
    return torch.device("cpu") if parameter.is_meta else parameter.device


def _require_values(state: State) -> None:
    if state.world.rank != 0:
        return
    on_meta = [name for name, parameter in state.parameters.items() if parameter.is_meta]
    if on_meta:
        raise PlanError(
            f"{len(on_meta)} parameters have no values (they are on the meta device), the first is "
            f"{on_meta[0]}; give rank 0 a model with values, or plan it with zerograph.plan"
        )


def _move_buffers(module: nn.Module, world: World) -> None:
    """Buffers go to the device with rank 0's values; from then on each rank keeps its own."""
    for owner, name, buffer in named_buffers(module):
        if buffer.is_meta:
            buffer = torch.empty_like(buffer, device=world.device)
        buffer = buffer.detach().to(world.device)
        if buffer.numel():
            flat = buffer.contiguous()
            world.broadcast(flat)
            buffer = flat if buffer.is_contiguous() else buffer.copy_(flat)
        owner._buffers[name] = buffer


def named_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, key, buffer) of every buffer, shared ones at each owner."""
    for owner in module.modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                yield owner, name, buffer
