"""The mesh: the ranks as a grid of named axes, as numbers. It knows no rank.

    {"stage": 3}                                    dp 8                          buckets are cut over all
    {"stage": 3, "mics_shard_size": 4}              dp_replicate 2 x dp_shard 4   over dp_shard, with copies
    {"stage": 3, "zero_hpz_partition_size": 4}      nodes 2 x node 4              over all; again over node

The last axis is the innermost: rank = outer * (size of the inner one) + inner, so ranks that follow each
other share a node, as under torchrun. A collective is over one axis, or over all ranks (the axis `ALL`).

MiCS (arXiv:2205.00119, section 3.2) cuts buckets over `dp_shard` and keeps copies along `dp_replicate`; the
names are those of torch's hybrid sharding. hpZ (ZeRO++, arXiv:2306.10209, section 3.2) cuts them over all
ranks, and once more over `node` what the forward has gathered, for the backward.

With a model-parallel group every one of these ranks stands for `model` processes, each with its own part
of the model and the same batch. They are the axis `MODEL`, inside of all others, on which ZeRO cuts nothing:

    {"stage": 3}, mpu of 2 x 2                      dp 2 x mp 2                   over dp; activations over mp
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from zerograph.errors import ConfigError

ALL = ""
"""The axis of collectives over all data-parallel ranks."""
MODEL = "mp"
"""The axis of the ranks that compute one batch together, each with its part of the model."""


class Axis(NamedTuple):
    name: str
    size: int


@dataclass(frozen=True)
class Mesh:
    """The axes, the outermost first, and what each is for."""

    axes: tuple[Axis, ...]
    cut: str = ALL
    """The axis over which every bucket is cut into slices."""
    copies: str = ""
    """The axis along which ranks have the same slice; empty if no two have."""
    second: str = ""
    """The axis over which the forward cuts what it gathered, for the backward; empty if it does not."""
    model: int = 1
    """The ranks along `MODEL`. All other numbers of a mesh are of data-parallel ranks."""

    @classmethod
    def flat(cls, world: int, model: int = 1) -> "Mesh":
        """All data-parallel ranks on one axis."""
        return cls((Axis("dp", world),), model=model)

    @property
    def world(self) -> int:
        """All data-parallel ranks."""
        return prod(axis.size for axis in self.axes)

    @property
    def slices(self) -> int:
        """Into how many slices a bucket is cut."""
        return self.size(self.cut)

    @property
    def used(self) -> tuple[str, ...]:
        """The axes over which buckets move."""
        found = (self.cut, self.copies, self.second)
        return (self.cut, *(axis for axis in found[1:] if axis))

    def size(self, axis: str) -> int:
        """The number of ranks along an axis."""
        if axis == MODEL:
            return self.model
        return self.world if axis == ALL else self.axes[self._position(axis)].size

    def stride(self, axis: str) -> int:
        """How far apart ranks are that follow each other along an axis."""
        inner = () if axis == ALL else self.axes[self._position(axis) + 1 :]
        return prod(each.size for each in inner)

    def gap(self, axis: str) -> int:
        """How far apart they are when those along `MODEL` are counted as well, the innermost."""
        return 1 if axis == MODEL else self.stride(axis) * self.model

    def index(self, axis: str, rank: int) -> int:
        """The place of a rank along an axis."""
        return rank // self.stride(axis) % self.size(axis)

    def members(self, axis: str, rank: int) -> list[int]:
        """The ranks along an axis through one of them, in order."""
        first = rank - self.index(axis, rank) * self.stride(axis)
        return [first + place * self.stride(axis) for place in range(self.size(axis))]

    def lines(self) -> Iterator[str]:
        """The grid in words, for a plan's head; nothing for one axis."""
        model = (Axis(MODEL, self.model),) if self.model > 1 else ()
        if len(self.axes) > 1 or model:
            grid = " x ".join(f"{axis.name} {axis.size}" for axis in (*self.axes, *model))
            cut = self.cut or (self.axes[0].name if model else "all ranks")
            parts = [grid, f"buckets are cut over {cut}"]
            parts += [f"copies along {self.copies}"] if self.copies else []
            parts += [f"kept for the backward over {self.second}"] if self.second else []
            yield "mesh  " + "; ".join(parts)

    def _position(self, axis: str) -> int:
        return [each.name for each in self.axes].index(axis)


def over(axis: str) -> dict[str, str]:
    """The keyword argument of a collective over an axis: none for one over all ranks."""
    return {"axis": axis} if axis != ALL else {}


def named(what: str, axis: str) -> str:
    """`gather over node`; `gather` over all ranks."""
    return f"{what} over {axis}" if axis != ALL else what


def mesh_of(mics: int, hpz: int, world: int, model: int = 1) -> Mesh:
    """The mesh for `mics_shard_size` and `zero_hpz_partition_size`, of which one at most is in use.

    `world` data-parallel ranks, `model` model-parallel ones for each. A group as large as the world, or
    larger, is the world. Raises ConfigError if groups do not fill it, or for groups beside `model`.
    """
    size, key = (mics, "mics_shard_size") if mics > 1 else (hpz, "zero_hpz_partition_size")
    if size <= 1 or size >= world:
        return Mesh.flat(world, model)
    if model > 1:
        raise ConfigError(
            f"zero_optimization.{key}={size}: groups of data-parallel ranks are not built beside a "
            f"model-parallel group (here of {model}); leave {key} out, or give no mpu and no mesh"
        )
    if world % size:
        raise ConfigError(
            f"zero_optimization.{key}={size} does not divide the world of {world} ranks into equal groups; "
            f"take {_divisors(world)}, or another number of ranks"
        )
    if mics > 1:
        axes = Axis("dp_replicate", world // size), Axis("dp_shard", size)
        return Mesh(axes, cut="dp_shard", copies="dp_replicate")
    return Mesh((Axis("nodes", world // size), Axis("node", size)), second="node")


def _divisors(world: int) -> str:
    found = [str(size) for size in range(2, world + 1) if world % size == 0]
    return f"one of {', '.join(found)}" if len(found) > 1 else found[0]
