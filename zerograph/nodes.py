"""Nodes: what one node of a TrainGraph says of itself, and what follows from its operator.

Facts are written when a node is inserted, in `node.meta`: `region`, `role` (of a placeholder), `module`;
`checkpoint`, the checkpointed region that it is in; `recomputed`, the name of the forward's node that it
repeats. What asks about a single node is here, so that no pass matches patterns; ir.py is the whole graph.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.mesh import ALL

Region = Literal["forward", "backward", "step"]
REGIONS: tuple[Region, ...] = ("forward", "backward", "step")


@dataclass(frozen=True)
class Role:
    """What a placeholder stands for; ir.py lists the kinds."""

    kind: str
    name: str


def region_of(node: fx.Node) -> Region:
    return cast(Region, node.meta["region"])


def role_of(node: fx.Node) -> Role:
    return cast(Role, node.meta["role"])


def module_of(node: fx.Node) -> str:
    """FQN of the module that a node's work comes from; empty when there is none."""
    return cast(str, node.meta.get("module", ""))


def checkpoint_of(node: fx.Node) -> str:
    """The checkpointed region that a node of the forward, or its repetition, is in; empty for none."""
    return cast(str, node.meta.get("checkpoint", ""))


def is_recomputed(node: fx.Node) -> bool:
    """Whether a node of the backward repeats one of the forward."""
    return "recomputed" in node.meta


def bucket_of(node: fx.Node) -> str:
    """The bucket that a zero.* node works on; empty for one of several, and for other nodes."""
    if node.op == "placeholder":
        return role_of(node).name.partition("/")[0] if role_of(node).kind in _OF_BUCKETS else ""
    if not ops.is_zero(node.target):
        return ""
    if is_call(node, ops.wait, ops.param, ops.put):
        return bucket_of(cast(fx.Node, node.args[0]))
    named = dict(zip((a.name for a in _schema(node).arguments), node.args))
    return str(named.get("bucket", ""))


_OF_BUCKETS = ("full", "shard", "kept", "master", "state")


def _schema(node: fx.Node) -> torch._C.FunctionSchema:
    return cast(OpOverload, node.target)._schema


def axis_of(node: fx.Node) -> str:
    """The axis that a collective is over; ALL for all ranks."""
    return cast(str, node.kwargs.get("axis", ALL)) if ops.is_zero(node.target) else ALL


def is_ahead(node: fx.Node) -> bool:
    """Whether a gather is one that the step before has started."""
    return is_call(node, ops.gather) and node.args[3:] == (True,)


def is_reduced(partition: fx.Node) -> bool:
    """Whether a partition is a slice of what an all-reduce answers, not of gathered parameters."""
    given = cast(fx.Node, partition.args[0])
    return is_call(given, ops.wait) and is_call(cast(fx.Node, given.args[0]), ops.all_reduce)


def slice_of(reduction: fx.Node) -> fx.Node | None:
    """The partition that a rank takes of a reduction, once it is there; None if it keeps all it is given."""
    users = (user for wait in reduction.users for user in wait.users)
    return next((user for user in users if is_call(user, ops.partition)), None)


def is_call(node: fx.Node, *targets: OpOverload) -> bool:
    return node.op == "call_function" and node.target in targets


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers; attention with a dropout of zero draws none."""
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    given = dict(zip((a.name for a in _schema(node).arguments), node.args)) | dict(node.kwargs)
    default = {a.name: a.default_value for a in _schema(node).arguments}
    return bool({**default, **given}.get("dropout_p") != 0.0)


def is_pure(node: fx.Node) -> bool:
    """Whether a node's result follows from its arguments alone, and it does nothing else."""
    if node.op == "get_attr" or getattr(node.target, "__name__", "") == "getitem":
        return True
    target = node.target
    if not isinstance(target, OpOverload) or "c10d" in target.namespace:
        return False
    if ops.is_zero(target):
        return target in (ops.checkpoint, ops.param)
    return not is_random(node) and not target._schema.is_mutable


def is_view(node: fx.Node) -> bool:
    """Whether a node's result shares storage with its first argument and writes nothing."""
    if node.op != "call_function":
        return False
    if getattr(node.target, "__name__", "") == "getitem":
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    return _makes_views(node.target)


@functools.cache
def _makes_views(target: object) -> bool:
    if not isinstance(target, OpOverload):
        return False
    if target in _VIEWS_WITHOUT_ALIAS_INFO:
        return True
    info = [r.alias_info for r in target._schema.returns]
    return bool(info) and all(a is not None and not a.is_write for a in info)


_VIEWS_WITHOUT_ALIAS_INFO: tuple[object, ...] = (
    torch.ops.aten._unsafe_view.default,
    ops.checkpoint,
    ops.param,
    ops.refreshed,
    ops.wait,
)


def view_root(node: fx.Node) -> fx.Node:
    """The node whose storage `node` is a view of; itself if it is none."""
    while is_view(node):
        node = cast(fx.Node, node.args[0])
    return node


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> list[Any]:
    """`function` of every tensor in a node's value (a tensor, or a list of them)."""
    if isinstance(value, torch.Tensor):
        return [function(value)]
    if isinstance(value, (list, tuple)):
        return [result for item in value for result in map_tensors(item, function)]
    return []
