"""Bucketing: blocks larger than the config's bucket sizes are cut; small parameters may stay gathered.

    by block                            reduce_bucket_size 40, stage3_param_persistence_threshold 9
      b0  blocks.0   4 params  80         b0  blocks.0                        1 param   40
                                          b1  blocks.0.norm .. blocks.1.norm  6 params  48  persistent
      b1  blocks.1   4 params  80         b2  blocks.1                        1 param   40

A block is cut between parameters, in order of registration: each bucket takes what fits, and a parameter that
is larger than the size gets a bucket of its own. Sizes are elements of parameters, without padding. Which of
the config's keys bind, the smallest of them being the size:

    reduce_bucket_size             all stages: a bucket is reduced at once
    allgather_bucket_size          stages 1 and 2: it is gathered at once behind its update
    stage3_prefetch_bucket_size    stage 3, where it is given and not 0: what is larger starts just in time

Persistent parameters (stage 3, where the config gives stage3_param_persistence_threshold) are those with
fewer elements than the threshold, the smallest first, as long as all together have no more than
stage3_model_persistence_threshold. Those of all blocks share buckets, which ranks hold as at stage 2.
DeepSpeed's default of 100,000 is not taken over: parameters that are gathered one by one cost a message each,
and a small one in the bucket of its block costs none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from zerograph.config import ZeroConfig
from zerograph.layout import Layout, Param, label_of, packed

_NO_SIZE = 1 << 62


@dataclass(frozen=True)
class Limits:
    """Sizes in elements of parameters."""

    bucket: int = _NO_SIZE
    """The most in one bucket, unless a single parameter has more."""
    persistence: int = 0
    """Parameters with fewer are persistent."""
    persistent: int = _NO_SIZE
    """The most in all persistent parameters together."""


UNLIMITED = Limits()


def limits_of(config: ZeroConfig) -> Limits:
    """What the config's keys say at its stage."""
    zero = config.zero_optimization
    bucket = zero.reduce_bucket_size
    if zero.stage in (1, 2):
        bucket = min(bucket, zero.allgather_bucket_size)
    if zero.stage < 3:
        return Limits(bucket)
    given = zero.model_fields_set
    prefetch = zero.stage3_prefetch_bucket_size
    if "stage3_prefetch_bucket_size" in given and prefetch > 0:
        bucket = min(bucket, prefetch)
    persists = "stage3_param_persistence_threshold" in given
    threshold = zero.stage3_param_persistence_threshold if persists else 0
    return Limits(bucket, threshold, zero.stage3_model_persistence_threshold)


def within(layout: Layout, limits: Limits) -> Layout:
    """The layout with its buckets cut to the limits; what is within them stays as it is.

    The engine's layout is cut before it is traced, and `shard` cuts what a graph was traced with: so the same
    limits twice must be the same layout.
    """
    chosen = _persistent(layout, limits)
    members: list[tuple[str, bool, Sequence[Param]]] = []
    together: dict[tuple[torch.dtype, bool, bool], list[Param]] = {}
    for param in chosen:
        key = param.dtype, param.trainable, param.parallel
        together.setdefault(key, []).append(param)
    names = {param.name for param in chosen}
    for bucket in layout.buckets.values():
        own = layout.bucket_params(bucket.name)
        sharded = [param for param in own if param.name not in names]
        members += [(bucket.block, False, piece) for piece in cut(sharded, limits.bucket)]
        if len(sharded) < len(own):  # those of later blocks come along
            kind = bucket.dtype, bucket.trainable, layout.parallel(bucket.name)
            found = together.pop(kind, [])
            for piece in cut(found, limits.bucket):
                members.append((label_of([param.name for param in piece]), True, piece))
    return replace(packed(layout.mesh, members, layout.groups), blocks=layout.blocks)


def cut(params: Sequence[Param], size: int) -> Iterator[list[Param]]:
    """Runs of `params` with at most `size` elements each, or of one parameter that has more."""
    piece: list[Param] = []
    total = 0
    for param in params:
        if piece and total + param.numel > size:
            yield piece
            piece, total = [], 0
        piece.append(param)
        total += param.numel
    if piece:
        yield piece


def _persistent(layout: Layout, limits: Limits) -> list[Param]:
    """The parameters that stay gathered, in order of registration."""
    small = [p for p in layout.params.values() if p.numel < limits.persistence]
    left, names = limits.persistent, set()
    buckets = layout.buckets  # of equal ones, those that are persistent already come first
    for param in sorted(small, key=lambda p: (p.numel, not buckets[p.bucket].persistent)):
        if param.numel > left:
            break
        left -= param.numel
        names.add(param.name)
    return [param for param in small if param.name in names]
