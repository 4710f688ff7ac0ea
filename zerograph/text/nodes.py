"""A node as a line: its name, its type, what is called, and on the right its module or its bytes."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.codegen.arenas import arena_of, offset_of, row_of
from zerograph.codegen.in_place import is_in_place
from zerograph.compat import SYMBOLIC
from zerograph.cost import collective_bytes, nbytes
from zerograph.mesh import named
from zerograph.nodes import (
    axis_of,
    bucket_of,
    is_ahead,
    is_call,
    is_recomputed,
    is_reduced,
    map_tensors,
    module_of,
    region_of,
)
from zerograph.precision import short
from zerograph.text.names import Names
from zerograph.units import size

_DROPPED = ("device", "layout", "pin_memory")


class Line(NamedTuple):
    """One line of a canonical text, with what it belongs to."""

    text: str
    region: str = ""
    """Empty for the head, the buckets and the summary."""
    module: str = ""
    """FQN of the module (or the block of the bucket) that a node is of."""
    bucket: str = ""
    """The bucket that a zero.* node names."""


def line_of(node: fx.Node, names: Names) -> Line:
    if ops.is_zero(node.target):
        body = _zero_line(node, names)
        moves = is_call(node, *ops.COLLECTIVES, ops.gather_ahead)
        note = size(collective_bytes(node)) if moves else ""
        own = is_call(node, ops.checkpoint, ops.place, ops.partition_activation, *ops.COPIES)
        note = size(nbytes(node)) + _at(node) if own else note
    else:
        body = f"{names[node]}: {type_of(node, names)} = {_call(node, names)}"
        note = f"recomputed {module_of(node)}" if is_recomputed(node) else module_of(node)
    shown = f"  {body:<68}  # {note}" if note else f"  {body}"
    return Line(shown, region_of(node), module_of(node), bucket_of(node))


def type_of(node: fx.Node, names: Names) -> str:
    value, show = node.meta.get("val"), names.sizes.show
    types = map_tensors(value, lambda t: f"{short(t.dtype)}[{','.join(map(show, t.shape))}]")
    if isinstance(value, SYMBOLIC):
        return show(value)
    if len(types) == 1 and isinstance(value, torch.Tensor):
        return str(types[0])
    return f"({', '.join(types)})" if types else "none"


def _zero_line(node: fx.Node, names: Names) -> str:
    target = f"zero.{cast(OpOverload, node.target)._schema.name.partition('::')[2]}"
    name, args = names[node], node.args
    first = _value(args[0], names)
    if is_call(node, ops.gather) or (is_call(node, ops.partition) and not is_reduced(node)):
        where = named(f"{target} {args[1]}", axis_of(node))
        return f"{name} = {where}" + (" ahead" if is_ahead(node) else "")
    if is_call(node, ops.gather_ahead):
        return named(f"{target} {args[1]}", axis_of(node))
    if is_call(node, ops.checkpoint):
        return f'{target} {first} "{args[1]}"'
    if is_call(node, *ops.BRACKETS):
        return f'{target} "{args[0]}" {_done_at(node)}'
    if is_call(node, ops.place, *ops.COPIES):
        return f"{name} = {target} {first}{_into(node, names)}"
    if is_call(node, ops.wait, ops.release, ops.refreshed):
        return f"{target} {first}"
    if is_call(node, ops.param):
        return f"{name}: {type_of(node, names)} = {target} {first}"
    if is_call(node, ops.put):
        how = " in place" if is_in_place(node) else ""
        return f'{target} {first}, {_value(args[1], names)} "{args[2]}"{how}'
    if is_call(node, ops.grad_buffer):
        return f"{name}: {type_of(node, names)} = {target} {args[1]}"
    if is_call(node, ops.update):
        return f"{target}.{args[8]} {_update_arguments(node, names)}"
    if is_call(node, ops.measure):
        shown = _measure_arguments(node, names)
        return f"{name}: {type_of(node, names)} = {target}.{args[7]} {shown}"
    if is_call(node, ops.finish):
        return f"{name}: {type_of(node, names)} = {target} {_finish_arguments(node, names)}"
    shown = ", ".join(_value(a, names) for a in _shown(node)) + _into(node, names)
    return named(f"{name}: {type_of(node, names)} = {target} {shown}", axis_of(node))


def _done_at(node: fx.Node) -> str:
    """What is done where a region begins or ends."""
    _, synchronizes, profiles = node.args
    return ", ".join(["synchronize"] * bool(synchronizes) + ["profile"] * bool(profiles))


def _into(node: fx.Node, names: Names) -> str:
    """The row of an arena in which a value is kept, and whether it is made there."""
    arena = arena_of(node)
    if arena is None:
        return ""
    made_there = is_call(node, ops.place) and node.args[3:] == (True,)
    return f", {names[arena]}[{row_of(node)}]" + (" in place" if made_there else "")


def _at(node: fx.Node) -> str:
    """The offset of a value in its arena."""
    offset = offset_of(node)
    return "" if offset is None else f" at {size(offset)}"


def _shown(node: fx.Node) -> Sequence[Any]:
    """Arguments apart from names, the world size, and weights that change nothing."""
    args = [a for a in node.args if not isinstance(a, str)]
    if is_call(node, ops.reduce_scatter, ops.all_reduce):
        buffer, pre, post, world = args
        return [buffer] if (pre, post) == (1.0, 1 / cast(int, world)) else [buffer, pre, post]
    if is_call(node, ops.partition_activation):
        return args[:1]
    if is_call(node, *ops.COLLECTIVES, ops.partition):
        return args[:-1]
    return args[:-1] if is_call(node, ops.accumulate) and args[-1] == 1.0 else args


def _finish_arguments(node: fx.Node, names: Names) -> str:
    partials, divided, max_norm, skips = node.args
    parts = [_value(partials, names)]
    parts += [f"divided={_value(divided, names)}"] if divided is not None else []
    parts += [f"max_norm={max_norm}"] if max_norm else []
    return ", ".join([*parts, *["skips"] * bool(skips)])


def _measure_arguments(node: fx.Node, names: Names) -> str:
    *given, control = node.args[:6]
    parts = [_value(each, names) for each in given]
    parts += [f"control={_value(control, names)}"] if control is not None else []
    return ", ".join(parts)


def _update_arguments(node: fx.Node, names: Names) -> str:
    master, grad, state, low, hyper, used, control, _, _, *norms = node.args
    parts = [_value(master, names), _value(grad, names), _value(state, names)]
    parts += [f"low={_value(low, names)}"] if low is not None else []
    parts += [_value(hyper, names), _value(used, names)]
    parts += [f"control={_value(control, names)}"] if control is not None else []
    parts += [f"norms={_value(each, names)}" for each in norms]
    return ", ".join(parts)


def _call(node: fx.Node, names: Names) -> str:
    if node.op == "get_attr":
        return "constant"
    args = [_value(a, names) for a in node.args]
    if _target(node) == "getitem":
        return f"{args[0]}[{args[1]}]"
    kwargs = {k: v for k, v in node.kwargs.items() if k not in _DROPPED and v is not None}
    args += [f"{k}={_value(kwargs[k], names)}" for k in sorted(kwargs)]
    return f"{_target(node)}({', '.join(args)})"


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, OpOverload):
        base = target._schema.name.replace("::", ".")
        return base if target._overloadname == "default" else f"{base}.{target._overloadname}"
    return str(getattr(target, "__name__", target)) if callable(target) else str(target)


def _value(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v, names) for v in value)}]"
    if isinstance(value, torch.dtype):
        return short(value)
    if isinstance(value, torch.memory_format):
        return str(value).removeprefix("torch.")
    return repr(value)
