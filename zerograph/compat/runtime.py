"""What runs beside the graph: autograd nodes, torch's optimizers, the process group's store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def clear_saved(ctx: Any) -> bool:
    """Let go of an autograd node's saved tensors in its backward. False if the graph is kept."""
    clear: Callable[[], None] | None = getattr(ctx, "maybe_clear_saved_tensors", None)
    if clear is not None:
        clear()
    try:
        return not ctx.saved_tensors
    except RuntimeError:  # they are freed
        return True


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """What torch's schedulers look at before they warn of a step() before the optimizer's."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def mark_tracked(step: Callable[..., Any]) -> None:
    """Tell torch's schedulers that this replacement of an optimizer's step() is known to them."""
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the user registered a hook on the optimizer's step()."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def optimizer_hooks() -> set[str]:
    """Names of the attributes in which a torch optimizer keeps its hooks."""
    when = ("step_pre", "step_post", "state_dict_pre", "state_dict_post")
    return {
        f"_optimizer_{name}_hooks"
        for name in (*when, "load_state_dict_pre", "load_state_dict_post")
    }


def default_store() -> Any:
    """The key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def group_beside(
    group: dist.ProcessGroup, ranks: list[int], backend: str | None = None
) -> dist.ProcessGroup:
    """A new group of some ranks of `group`, with its timeout; those ranks alone call this."""
    some = len(ranks) < dist.get_world_size()
    made: dist.ProcessGroup = dist.new_group(
        ranks, timeout=timeout_of(group), backend=backend, use_local_synchronization=some
    )
    return made


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of this name, as functional collectives have it."""
    groups: Any = dist.distributed_c10d
    made: dist.ProcessGroup = groups._resolve_process_group(name)
    return made


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of a gloo or NCCL group may take."""
    options: Any = group._get_backend(group._device_types[0]).options
    timeout: timedelta = options._timeout
    return timeout


@contextmanager
def unrecorded() -> Iterator[None]:
    """What is started here outlives any profiler of torch's.

    gloo's work tells the profiler of its end, and corrupts the heap if the profiler ended before it (torch
    2.13; thirty lines of pure torch crash every time). What a step sends for the next one may end later.
    """
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)
