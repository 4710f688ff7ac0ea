"""The layout: every parameter's place in the flat buckets, decided from the module alone.

    model.embed_tokens.weight                       b0   model.embed_tokens
    model.layers.0.self_attn.q_proj.weight  ...     b1   model.layers.0
    model.layers.1.self_attn.q_proj.weight  ...     b2   model.layers.1
    model.norm.weight, lm_head.weight               b3   model.norm .. lm_head

A bucket is the unit of storage and of communication: one block's parameters (a repeated layer, or
the run of parameters before, between or after the repeated layers), one dtype, trainable apart from
frozen; bucketing.py cuts blocks that are larger than the config says. Rank r owns the r-th of `world`
equal slices ("flat parameter" of ZeRO, arXiv:1910.02054 section 5, in the per-block form of FSDP,
arXiv:2304.11277 section 3.2); with copies (mesh.py) the slices are fewer than the ranks. The layout reads
shapes and dtypes only, so a model on the meta device and a real one have the same layout.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from zerograph.errors import PlanError
from zerograph.mesh import Mesh
from zerograph.precision import Precision

ALIGN_BYTES = 128
"""Every parameter starts at a multiple of this many bytes in its bucket (a GPU's memory line)."""
PAD_ELEMENTS = 16
"""A bucket's length is a multiple of the number of ranks times this, so that every slice vectorises."""


@dataclass(frozen=True)
class Param:
    """One parameter: what the model says of it and where it lies."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    """The dtype in the bucket, in which it is gathered and used."""
    model_dtype: torch.dtype
    """The dtype in the user's model, in which it is shown and saved."""
    trainable: bool
    tied: tuple[str, ...]
    """Other names of the same tensor."""
    group: int
    """Index of its optimizer parameter group; 0 for frozen parameters."""
    bucket: str = ""
    offset: int = 0
    """Elements from the start of the bucket."""
    parallel: bool = False
    """Whether each model-parallel rank has its own part of it; otherwise all have the same values."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """A run of a bucket whose parameters share one optimizer group; padding included."""

    offset: int
    length: int
    group: int


@dataclass(frozen=True)
class Bucket:
    """One flat storage unit, cut into `world` equal slices."""

    name: str
    block: str
    dtype: torch.dtype
    trainable: bool
    params: tuple[str, ...]
    numel: int
    """Elements, padding included."""
    world: int
    persistent: bool = False
    """Whether every rank holds all of it from step to step at stage 3 too (bucketing.py)."""

    @property
    def shard_numel(self) -> int:
        return self.numel // self.world

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def sliced(self, stage: int) -> bool:
        """Whether a rank holds no more than its slice of the parameters, which are gathered for each use."""
        return stage == 3 and not self.persistent

    def refreshed(self, stage: int) -> bool:
        """Whether ranks hold all of it and update a slice each, so that others' slices are fetched then."""
        return self.trainable and stage > 0 and not self.sliced(stage)


@dataclass(frozen=True)
class Layout:
    """All parameters and buckets of a model for one mesh of ranks. Immutable, the same on all ranks."""

    mesh: Mesh
    params: Mapping[str, Param]
    buckets: Mapping[str, Bucket]
    groups: tuple[Mapping[str, Any], ...] = field(default=({},))
    """Optimizer options that differ from the config's, per parameter group."""
    blocks: tuple[str, ...] = ()
    """Names of the repeated layers, in the order of the model."""

    @property
    def world(self) -> int:
        """How many slices a bucket is cut into: the ranks that hold all of it together."""
        return self.mesh.slices

    def over(self, mesh: Mesh) -> "Layout":
        """The same buckets, cut over another mesh of as many ranks."""
        assert mesh.world == self.mesh.world, "buckets are padded for the number of ranks"
        if mesh == self.mesh:
            return self
        cut = {name: replace(b, world=mesh.slices) for name, b in self.buckets.items()}
        return replace(self, mesh=mesh, buckets=cut)

    def trainable_buckets(self) -> list[Bucket]:
        return [bucket for bucket in self.buckets.values() if bucket.trainable]

    def bucket_params(self, bucket: str) -> list[Param]:
        return [self.params[name] for name in self.buckets[bucket].params]

    def extents(self, bucket: str) -> list[tuple[Param, int, int]]:
        """(parameter, start, stop) of each parameter, the padding behind it counted to it."""
        params = self.bucket_params(bucket)
        stops = [p.offset for p in params[1:]] + [self.buckets[bucket].numel]
        return [(p, p.offset, stop) for p, stop in zip(params, stops, strict=True)]

    def parallel(self, bucket: str) -> bool:
        """Whether a bucket's parameters are parts of ones that are cut over model-parallel ranks."""
        return any(param.parallel for param in self.bucket_params(bucket))

    def segments(self, bucket: str) -> list[Segment]:
        """The bucket as runs of one parameter group each, covering it without a gap."""
        runs: list[Segment] = []
        for param, start, stop in self.extents(bucket):
            if runs and runs[-1].group == param.group:
                runs[-1] = Segment(runs[-1].offset, stop - runs[-1].offset, param.group)
            else:
                runs.append(Segment(start, stop - start, param.group))
        return runs

    def canonical(self, name: str) -> str | None:
        """The owning name of `name`, itself or one that it is tied to; None if not a parameter."""
        if name in self.params:
            return name
        return next((p.name for p in self.params.values() if name in p.tied), None)


def layout_of(
    model: nn.Module,
    world: int,
    precision: Precision,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    trained: Collection[str] = (),
    model_parallel: int = 1,
) -> Layout:
    """Lay out `model` for `world` ranks. Parameters in `trained` stay trainable though frozen now.

    With `model_parallel` ranks for each, parameters that are marked as parts (`is_part`) have buckets of
    their own.

    `param_groups` is torch's list of dicts with "params" (tensors of the model, or names); a
    trainable parameter in no group is left out of the optimizer, so it is an error, as is one in two.
    """
    if world < 1:
        raise PlanError(f"world_size must be at least 1, got {world}")
    names = _names_by_tensor(model)
    tensors = {found[0]: tensor for tensor, found in names.items()}
    group_of, groups = _groups(model, tensors, names, param_groups)
    blocks = block_of_each(model, list(tensors))
    members: dict[tuple[str, bool, torch.dtype, bool], list[Param]] = {}
    for name, tensor in tensors.items():
        _require_real(name, tensor)
        param = Param(
            name=name,
            shape=tuple(tensor.shape),
            stride=_dense_stride(tensor),
            dtype=precision.parameter(name, tensor.dtype),
            model_dtype=tensor.dtype,
            trainable=tensor.requires_grad or name in trained,
            tied=tuple(names[tensor][1:]),
            group=group_of.get(name, 0),
            parallel=model_parallel > 1 and is_part(tensor),
        )
        key = blocks[name], param.trainable, param.dtype, param.parallel
        members.setdefault(key, []).append(param)
    whole = [(block, False, found) for (block, *_), found in members.items()]
    mesh = Mesh.flat(world, model_parallel)
    return replace(packed(mesh, whole, groups), blocks=tuple(repeated_blocks(model)))


def _require_real(name: str, parameter: torch.Tensor) -> None:
    if parameter.requires_grad and parameter.dtype.is_complex:
        dtype, own = str(parameter.dtype).removeprefix("torch."), name.rpartition(".")[2]
        raise PlanError(
            f"parameter {name} is {dtype}, and complex parameters are not trained; make "
            f"torch.view_as_real({own}) the parameter, and have the forward call torch.view_as_complex on it"
        )


def is_part(parameter: torch.Tensor) -> bool:
    """Whether a parameter is marked, as in Megatron, as a part of one cut over model-parallel ranks."""
    marks = ("tensor_model_parallel", "model_parallel")
    return any(bool(getattr(parameter, mark, False)) for mark in marks)


def packed(
    mesh: Mesh,
    members: Iterable[tuple[str, bool, Sequence[Param]]],
    groups: tuple[Mapping[str, Any], ...],
) -> Layout:
    """The layout with a bucket b0, b1, ... for each of `members`: (block, whether persistent, parameters).

    Parameters of one bucket have one dtype, and are all trainable or all frozen; all parts, or none.
    """
    params: dict[str, Param] = {}
    buckets: dict[str, Bucket] = {}
    for index, (block, persistent, found) in enumerate(members):
        name, offset = f"b{index}", 0
        dtype, trainable = found[0].dtype, found[0].trainable
        for param in found:
            params[param.name] = replace(param, bucket=name, offset=offset)
            offset = _round_up(offset + param.numel, ALIGN_BYTES // dtype.itemsize)
        padded = mesh.world * PAD_ELEMENTS
        numel = max(_round_up(offset, padded), padded)
        held = tuple(param.name for param in found)
        buckets[name] = Bucket(name, block, dtype, trainable, held, numel, mesh.slices, persistent)
    return Layout(mesh, params, buckets, groups)


def block_of_each(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The label of the block that each parameter belongs to.

    Repeated layers are their own blocks; the parameters between them, in registration order, form
    one block a run, labelled by the modules that they come from.
    """
    repeated = sorted(repeated_blocks(model), key=len)
    labels: dict[str, str] = {}
    run: list[str] = []

    def close() -> None:
        labels.update(dict.fromkeys(run, label_of(run)))
        run.clear()

    for name in names:
        block = next((b for b in repeated if name.startswith(b + ".")), None)
        if block is None:
            run.append(name)
            continue
        if run:
            close()
        labels[name] = block
    if run:
        close()
    return labels


def label_of(names: Sequence[str]) -> str:
    """What a run of parameters is called: by the modules that the first and the last come from."""
    owners = list(dict.fromkeys(_owner(name) for name in names))
    label = owners[0] if len(owners) == 1 else f"{owners[0]} .. {owners[-1]}"
    return label or "(root)"


def repeated_blocks(model: nn.Module) -> Iterator[str]:
    """Names of the outermost repeated layers.

    Children of a ModuleList, and of a Sequential in which a class that has children of its own
    occurs twice (a stage of a convnet).
    """
    for name, child in model.named_children():
        inner = list(child.named_children())
        if isinstance(child, nn.ModuleList) or _is_stage(child):
            yield from (f"{name}.{key}" for key, _ in inner)
        else:
            yield from (f"{name}.{found}" for found in repeated_blocks(child))


def _is_stage(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential):
        return False
    kinds = [type(child) for child in module if any(True for _ in child.children())]
    return len(kinds) > len(set(kinds))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _names_by_tensor(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Each distinct parameter with all its names, first owner first, in registration order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(tensor, []).append(name)
    return names


def _groups(
    model: nn.Module,
    tensors: Mapping[str, nn.Parameter],
    names: Mapping[nn.Parameter, list[str]],
    param_groups: Sequence[Mapping[str, Any]] | None,
) -> tuple[dict[str, int], tuple[Mapping[str, Any], ...]]:
    if param_groups is None:
        return {}, ({},)
    by_name = {name: found[0] for found in names.values() for name in found}
    group_of: dict[str, int] = {}
    for index, group in enumerate(param_groups):
        for member in group["params"]:
            name = by_name.get(member) if isinstance(member, str) else names.get(member, [None])[0]
            if name is None:
                what = repr(member) if isinstance(member, str) else f"of shape {list(member.shape)}"
                raise PlanError(
                    f"parameter group {index} holds a parameter {what} that is not in "
                    f"{type(model).__name__}; build the groups from the model that you compile"
                )
            if name in group_of:
                raise PlanError(
                    f"parameter {name} is in groups {group_of[name]} and {index}; leave it in one"
                )
            group_of[name] = index
    missing = [n for n, t in tensors.items() if t.requires_grad and n not in group_of]
    if missing:
        raise PlanError(
            f"{len(missing)} trainable parameters are in no parameter group, the first is "
            f"{missing[0]}; add them to a group or call requires_grad_(False) on them"
        )
    options = [{k: v for k, v in group.items() if k != "params"} for group in param_groups]
    return group_of, tuple(options)


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's strides if they are dense (channels_last, say), else contiguous ones."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]))
    expected = 1
    for dim in order:
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return tuple(torch.empty(tensor.shape, device="meta").stride())
        expected *= tensor.shape[dim]
    return tuple(tensor.stride())


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
