"""The zero.* operators: what ZeRO adds to a graph of aten ops.

Each has a schema and a fake implementation (shapes only); none has a real one. They stand in a
TrainGraph between the `shard` pass that brings the first of them and the `lower` pass that turns
them into collectives and kernels. `world` is a number of ranks, of all or of those along `axis` (mesh.py); no
operator knows a rank.

    checkpoint      a value that enters a checkpointed region: kept for the backward, which recomputes from it
    enter           a checkpointed region begins: wait for the device, or note the time
    leave           it ends: the same, and log how long it took
    place           a value that is kept for the backward, in its row of an arena. In place: the operator
                    that makes it wrote it there
    offload         start a copy of a value to the host's memory, with an arena to its row there; it is
                    pending until waited for
    reload          start the copy of such a result back to the device
    partition_activation  this rank's share of a value that all model-parallel ranks have, as a copy, with
                    an arena in its row there
    gather_activation     start an all-gather of such shares; the result is flat, with padding at its end
    gather          start an all-gather of a bucket's shards; the result is pending until waited for; with
                    `ahead` it is the one that the step before has started, if it has
    gather_ahead    start that all-gather, for the next forward
    partition       this rank's slice of a gathered bucket, or of one of gradients that was all-reduced, as a
                    copy that outlives it
    wait            the value of a pending collective or copy
    param           a parameter as a view of its (full) bucket
    release         the bucket's full storage ends here
    grad_buffer     an empty flat gradient buffer for a bucket, padding zeroed
    put             write one gradient into its place of a buffer; the result is the buffer. In place: the
                    operator that made the gradient wrote it there
    reduce_scatter  start `post * sum over ranks of (pre * buffer)`; each rank receives its slice
    all_reduce      start `post * sum over ranks of (pre * buffer)`; each rank receives all of it
    accumulate      add, times a weight, to the gradients kept since the last step (if any yet)
    norm_partials   sums of squares of gradient slices, one for each of `parts` ranks' slices
    squares         the sums of squares of one gradient that make these up, chunk by chunk
    sum_squares     from those of all gradients the partials, with the bits of `norm_partials`
    gather_partials start an all-gather of the partials that each rank has: one, or one for each slice
    finish          from all ranks' partials, summed in rank order: the global 2-norm, and what controls the
                    updates (the factor of gradients, and whether they apply)
    any_rank        start a maximum over ranks of the flags of parameters that received a gradient
    sum_weights     start a sum over ranks of the weights of the losses since the last step
    measure         the first half of a rule that needs norms of whole parameters: updates the states of one
                    bucket's shard in place, as `control` says; the result is, for each parameter of the
                    bucket, sums of squares over the shard's part of it: of the parameter, of its change
    gather_norms    start an all-gather of what `measure` gave for all buckets
    sum_norms       of one bucket the sums over ranks, one order for all: those over whole parameters
    update          the optimizer's rule on one bucket's shard, in place, as `control` says; of a rule with
                    `measure` its second half, which takes the sums over whole parameters as `norms`
    refresh         start an all-gather of updated shards into the full bucket, in place
    refreshed       the full bucket, once the refresh that the step before started is there
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from zerograph.codegen.spec import CHUNK

_library = torch.library.Library("zero", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Register an operator; the decorated function is its fake implementation."""

    def register(fake: Callable[..., Any]) -> OpOverload:
        name = schema.partition("(")[0]
        _library.define(schema)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"zero::{name}", fake, lib=_library)
        overload: OpOverload = getattr(torch.ops.zero, name).default
        return overload

    return register


@_define("checkpoint(Tensor value, str region) -> Tensor")
def checkpoint(value: Tensor, region: str) -> Tensor:
    return torch.empty_like(value)


@_define("enter(str region, bool synchronizes, bool profiles) -> ()")
def enter(region: str, synchronizes: bool, profiles: bool) -> None:
    return None


@_define("leave(str region, bool synchronizes, bool profiles) -> ()")
def leave(region: str, synchronizes: bool, profiles: bool) -> None:
    return None


@_define("place(Tensor value, Tensor arena, int row, bool in_place=False) -> Tensor")
def place(value: Tensor, arena: Tensor, row: int, in_place: bool = False) -> Tensor:
    return torch.empty_like(value)


@_define("offload(Tensor value, Tensor? arena=None, int row=0) -> Tensor")
def offload(value: Tensor, arena: Tensor | None = None, row: int = 0) -> Tensor:
    return torch.empty_like(value, device="cpu")


@_define("reload(Tensor host, Device device) -> Tensor")
def reload(host: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(host, device=device)


@_define(
    "partition_activation(Tensor value, int world, Tensor? arena=None, int row=0, *, str axis='') -> Tensor"
)
def partition_activation(
    value: Tensor, world: int, arena: Tensor | None = None, row: int = 0, *, axis: str = ""
) -> Tensor:
    return value.new_empty((value.numel() + world - 1) // world)


@_define("gather_activation(Tensor share, int world, *, str axis='') -> Tensor")
def gather_activation(share: Tensor, world: int, *, axis: str = "") -> Tensor:
    return share.new_empty(share.numel() * world)


@_define("gather(Tensor shard, str bucket, int world, bool ahead=False, *, str axis='') -> Tensor")
def gather(
    shard: Tensor, bucket: str, world: int, ahead: bool = False, *, axis: str = ""
) -> Tensor:
    return shard.new_empty(shard.numel() * world)


@_define("gather_ahead(Tensor shard, str bucket, int world, *, str axis='') -> Tensor")
def gather_ahead(shard: Tensor, bucket: str, world: int, *, axis: str = "") -> Tensor:
    return shard.new_empty(shard.numel() * world)


@_define("partition(Tensor full, str bucket, int world, *, str axis='') -> Tensor")
def partition(full: Tensor, bucket: str, world: int, *, axis: str = "") -> Tensor:
    return full.new_empty(full.numel() // world)


@_define("wait(Tensor pending) -> Tensor")
def wait(pending: Tensor) -> Tensor:
    return torch.empty_like(pending)


@_define("param(Tensor full, str name, int offset, int[] size, int[] stride) -> Tensor")
def param(full: Tensor, name: str, offset: int, size: list[int], stride: list[int]) -> Tensor:
    return full.new_empty_strided(size, stride)


@_define("release(Tensor full, str bucket) -> ()")
def release(full: Tensor, bucket: str) -> None:
    return None


@_define("grad_buffer(Tensor like, str bucket, int numel, ScalarType dtype) -> Tensor")
def grad_buffer(like: Tensor, bucket: str, numel: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty(numel, dtype=dtype)


@_define(
    "put(Tensor buffer, Tensor grad, str name, int offset, int[] size, int[] stride, "
    "bool in_place=False) -> Tensor"
)
def put(
    buffer: Tensor,
    grad: Tensor,
    name: str,
    offset: int,
    size: list[int],
    stride: list[int],
    in_place: bool = False,
) -> Tensor:
    return torch.empty_like(buffer)


@_define(
    "reduce_scatter(Tensor buffer, str bucket, float pre, float post, int world, *, str axis='') -> Tensor"
)
def reduce_scatter(
    buffer: Tensor, bucket: str, pre: float, post: float, world: int, *, axis: str = ""
) -> Tensor:
    return buffer.new_empty(buffer.numel() // world)


@_define(
    "all_reduce(Tensor buffer, str bucket, float pre, float post, int world, *, str axis='') -> Tensor"
)
def all_reduce(
    buffer: Tensor, bucket: str, pre: float, post: float, world: int, *, axis: str = ""
) -> Tensor:
    return torch.empty_like(buffer)


@_define("accumulate(Tensor kept, Tensor grad, str bucket, float weight) -> Tensor")
def accumulate(kept: Tensor, grad: Tensor, bucket: str, weight: float) -> Tensor:
    return torch.empty_like(kept)


@_define("norm_partials(Tensor[] grads, int parts) -> Tensor")
def norm_partials(grads: list[Tensor], parts: int) -> Tensor:
    return grads[0].new_empty(parts, dtype=torch.float64)


@_define("squares(Tensor grad, str bucket, int parts) -> Tensor")
def squares(grad: Tensor, bucket: str, parts: int) -> Tensor:
    return grad.new_empty(parts, -(-grad.numel() // parts // CHUNK), dtype=torch.float64)


@_define("sum_squares(Tensor[] squares) -> Tensor")
def sum_squares(squares: list[Tensor]) -> Tensor:
    return squares[0].new_empty(len(squares[0]), dtype=torch.float64)


@_define("gather_partials(Tensor partial, int world, *, str axis='') -> Tensor")
def gather_partials(partial: Tensor, world: int, *, axis: str = "") -> Tensor:
    return partial.new_empty(world * partial.numel())


@_define(
    "finish(Tensor partials, Tensor? divided, float max_norm, bool skips) -> (Tensor norm, Tensor control)"
)
def finish(
    partials: Tensor, divided: Tensor | None, max_norm: float, skips: bool
) -> tuple[Tensor, Tensor]:
    return partials.new_empty(()), partials.new_empty(2, dtype=torch.float32)


@_define("any_rank(Tensor flags, int world) -> Tensor")
def any_rank(flags: Tensor, world: int) -> Tensor:
    return torch.empty_like(flags)


@_define("sum_weights(Tensor weight, int world) -> Tensor")
def sum_weights(weight: Tensor, world: int) -> Tensor:
    return torch.empty_like(weight)


@_define(
    "measure(Tensor master, Tensor grad, Tensor[] state, Tensor hyper, Tensor used, Tensor? control, "
    "str bucket, str rule, int params) -> Tensor"
)
def measure(
    master: Tensor,
    grad: Tensor,
    state: list[Tensor],
    hyper: Tensor,
    used: Tensor,
    control: Tensor | None,
    bucket: str,
    rule: str,
    params: int,
) -> Tensor:
    return master.new_empty(params, 2, dtype=torch.float64)


@_define("gather_norms(Tensor[] norms, int world, *, str axis='') -> Tensor")
def gather_norms(norms: list[Tensor], world: int, *, axis: str = "") -> Tensor:
    return norms[0].new_empty(world, sum(len(each) for each in norms), 2)


@_define("sum_norms(Tensor gathered, str bucket, int first, int params) -> Tensor")
def sum_norms(gathered: Tensor, bucket: str, first: int, params: int) -> Tensor:
    return gathered.new_empty(params, 2)


@_define(
    "update(Tensor master, Tensor grad, Tensor[] state, Tensor? low, Tensor hyper, Tensor used, "
    "Tensor? control, str bucket, str rule, Tensor? norms=None) -> ()"
)
def update(
    master: Tensor,
    grad: Tensor,
    state: list[Tensor],
    low: Tensor | None,
    hyper: Tensor,
    used: Tensor,
    control: Tensor | None,
    bucket: str,
    rule: str,
    norms: Tensor | None = None,
) -> None:
    return None


@_define("refresh(Tensor full, Tensor shard, str bucket, int world, *, str axis='') -> Tensor")
def refresh(full: Tensor, shard: Tensor, bucket: str, world: int, *, axis: str = "") -> Tensor:
    return torch.empty_like(full)


@_define("refreshed(Tensor full, str bucket) -> Tensor")
def refreshed(full: Tensor, bucket: str) -> Tensor:
    return torch.empty_like(full)


COLLECTIVES = (
    gather,
    gather_activation,
    reduce_scatter,
    all_reduce,
    gather_partials,
    any_rank,
    sum_weights,
    gather_norms,
    refresh,
)
"""Operators that communicate, each once a step: `gather_ahead` is the start of a gather among them.

Each is asynchronous: its result is pending until one `wait` (or `refreshed`, in the next forward).
"""

COPIES = (offload, reload)
"""Operators that move a value between the device and the host, each pending until one `wait`.

They are no collectives: ranks need not agree on them.
"""

BRACKETS = (enter, leave)

EFFECTS = (
    *COLLECTIVES,
    *BRACKETS,
    gather_ahead,
    refreshed,
    wait,
    release,
    put,
    accumulate,
    measure,
    update,
)
"""Operators that dead-code elimination must keep even when nobody uses their result."""


def is_zero(target: object) -> bool:
    """Whether `target` is one of the operators of this file."""
    return isinstance(target, OpOverload) and target.namespace == "zero"
