"""The model-parallel group: what `mpu=` or `mesh=` says, as a World whose ranks are data parallel.

    processes          0 1 2 3          mpu of 2 x 2, or DeviceMesh ("dp", "mp")
    data parallel      {0, 2} {1, 3}    each rank has the same part of the model, and a batch of its own
    model parallel     {0, 1} {2, 3}    each has a part of its own, and the same batch

`mpu` is the object that Megatron's users give DeepSpeed: get_{data,model}_parallel_{rank,group,world_size},
or get_tensor_model_parallel_* as newer Megatrons have it. The model is cut by its own code, with its own
collectives; here its parts are trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from zerograph import compat
from zerograph.errors import PlanError
from zerograph.layout import Layout
from zerograph.mesh import MODEL
from zerograph.runtime.world import World

_NAMES = ("tensor_model_parallel", "model_parallel")
Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]


def world_of(world: World, mpu: Any, mesh: DeviceMesh | None) -> World:
    """The data-parallel ranks of `world`, all processes, with their model-parallel ones.

    Raises PlanError if both are given, or are no grid of all processes.
    """
    if mpu is None and mesh is None:
        return world
    if mpu is not None and mesh is not None:
        raise PlanError("mpu= and mesh= both say which ranks are model parallel; give one of them")
    if world.group is None:
        raise PlanError(
            "mpu= and mesh= describe several processes, and there is no process group; start them with "
            "torchrun, or call torch.distributed.init_process_group first"
        )
    data, model = _of_mpu(mpu) if mesh is None else _of_mesh(mesh)
    _require_grid(world, data, model)
    place, index = dist.get_rank(data), dist.get_rank(model)
    sizes = dist.get_world_size(data), dist.get_world_size(model)
    made = replace(world, rank=place, size=sizes[0], group=data)
    if sizes[1] == 1:
        return made
    across = replace(world, rank=index, size=sizes[1], group=model, label=f"dp{place}/")
    return replace(made, model=across, label=f"mp{index}/")


def joins_model(world: World, group: str) -> bool:
    """Whether the process group of this name has this rank's model-parallel ranks, and no others."""
    if world.model is None or world.model.group is None:
        return False
    own = dist.get_process_group_ranks(world.model.group)
    return sorted(dist.get_process_group_ranks(compat.group_named(group))) == sorted(own)


def require_alike(world: World, layout: Layout, module: nn.Module, shares: bool) -> None:
    """Raise PlanError on all ranks unless model-parallel ranks have the same values of what is no part.

    These are the parameters that are not marked, and, where activations are shared, buffers.
    """
    if world.model is None:
        return
    marks = (
        "set parameter.tensor_model_parallel = True on those that are cut over model-parallel ranks"
    )
    whole = {n: module.get_parameter(n) for n, param in layout.params.items() if not param.parallel}
    _require(world, "parameter", whole, f"{marks}, and start all others alike")
    if shares:
        mend = "set activation_checkpointing.partition_activations to false, or make it alike"
        _require(world, "buffer", dict(module.named_buffers()), mend)


def _require(world: World, kind: str, tensors: Mapping[str, Tensor], mend: str) -> None:
    found: list[str] = []
    if world.rank == 0:  # whose values the other data-parallel ranks take
        found = [name for name, value in tensors.items() if not _is_alike(world, value)]
    found = world.gather_objects(found)[0]
    if found:
        raise PlanError(f"{kind} {found[0]} has other values on other model-parallel ranks; {mend}")


def _is_alike(world: World, value: Tensor) -> bool:
    assert world.model is not None
    own = value.detach().to(world.device).reshape(-1).view(torch.uint8)
    first = own.clone()
    world.model.broadcast(first)
    return all(world.model.gather_objects(torch.equal(own, first)))


def _of_mesh(mesh: DeviceMesh) -> Groups:
    names = mesh.mesh_dim_names or ()
    if sorted(names) != ["dp", MODEL]:
        raise PlanError(
            f"mesh= has the axes {', '.join(map(repr, names)) or 'without names'}; give it two, named 'dp' "
            f"(data parallel) and '{MODEL}' (model parallel)"
        )
    return mesh.get_group("dp"), mesh.get_group(MODEL)


def _of_mpu(mpu: Any) -> Groups:
    data = _asked(mpu, ("data_parallel",))
    return data, _asked(mpu, _NAMES)


def _asked(mpu: Any, kinds: tuple[str, ...]) -> dist.ProcessGroup:
    """The group of the first of these kinds that `mpu` has, whose rank and size it must confirm."""
    kind = next((kind for kind in kinds if hasattr(mpu, f"get_{kind}_group")), None)
    if kind is None:
        raise PlanError(
            f"mpu= ({type(mpu).__name__}) has no get_{kinds[-1]}_group(); give an object with "
            "get_model_parallel_* and get_data_parallel_* of rank, group and world_size, as Megatron's"
        )
    group: dist.ProcessGroup = getattr(mpu, f"get_{kind}_group")()
    real = {"rank": dist.get_rank(group), "world_size": dist.get_world_size(group)}
    for what, expected in real.items():
        ask: Callable[[], int] | None = getattr(mpu, f"get_{kind}_{what}", None)
        if ask is not None and ask() != expected:
            raise PlanError(
                f"mpu.get_{kind}_{what}() is {ask()}, and that of its get_{kind}_group() is {expected}"
            )
    return group


def _require_grid(world: World, data: dist.ProcessGroup, model: dist.ProcessGroup) -> None:
    """Each process is at one place of a grid of data- and model-parallel ranks that has all of them."""
    rows = [set(dist.get_process_group_ranks(group)) for group in (data, model)]
    sizes = len(rows[0]), len(rows[1])
    if rows[0] & rows[1] != {world.rank} or sizes[0] * sizes[1] != world.size:
        raise PlanError(
            f"data-parallel ranks {sorted(rows[0])} and model-parallel ranks {sorted(rows[1])} of rank "
            f"{world.rank} are no grid of all {world.size} ranks; other kinds of parallelism (pipeline, "
            "context, expert) are not built beside these"
        )
