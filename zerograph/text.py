"""Canonical text: a TrainGraph as lines that a person can read, diff and keep as a golden.

Values of aten ops are numbered in order; zero.* values carry their bucket's or parameter's name, so that a
gather more or less renumbers nothing. One node a line, keyword arguments sorted, no paths, ids, times,
ranks or names that torch made up. The summary comes last. The skeleton form folds runs of aten ops.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.collectives import ALGORITHMS
from zerograph.compat import SYMBOLIC
from zerograph.cost import collective_bytes, memory_of, nbytes, traffic_of
from zerograph.ir import (
    REGIONS,
    Region,
    TrainGraph,
    bucket_of,
    is_call,
    map_tensors,
    module_of,
    region_of,
    role_of,
)
from zerograph.precision import short
from zerograph.sizes import Sizes

VERSION = 1
_ARGUMENTS: dict[Region, tuple[str, ...]] = {
    "forward": ("input", "buffer", "constant"),
    "backward": ("tangent", "scale"),
    "step": ("hyper", "used", "scale", "weight"),
}
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


def text(graph: TrainGraph, after: str, *, skeleton: bool = False) -> str:
    """The canonical text of `graph` after the pass named `after`."""
    return "".join(f"{line.text}\n" for line in lines(graph, after, skeleton=skeleton))


def lines(graph: TrainGraph, after: str, *, skeleton: bool = False) -> list[Line]:
    """The lines of the canonical text."""
    return forms(graph, after)[skeleton]


def forms(graph: TrainGraph, after: str) -> tuple[list[Line], list[Line]]:
    """The lines of the full text and of the skeleton, whose names and costs are found once."""
    names = _names(graph)
    head = _head(graph, after)
    full = _body(graph, names, lambda nodes: [_line(node, names) for node in nodes])
    folded = _folded(names)
    short = _body(graph, folded, lambda nodes: _skeleton(nodes, folded))
    last = Line(summary(graph))
    return [*head, *full, last], [*head, *short, last]


def _head(graph: TrainGraph, after: str) -> list[Line]:
    head = f"# zerograph {VERSION} | {graph.model} | stage {graph.stage} | world {graph.world}"
    return [
        Line(f"{head} | after {after}"),
        Line(f"precision  {graph.precision.describe()}"),
        *(Line(each) for each in _collectives(graph)),
        *(Line(each) for each in (*_sizes(graph), *_buckets(graph))),
    ]


def _collectives(graph: TrainGraph) -> Iterator[str]:
    """The algorithm that moves the buckets."""
    if graph.world > 1 and "collectives" in graph.notes:
        yield f"collectives  {ALGORITHMS[graph.notes['collectives']]}"


def _body(
    graph: TrainGraph, names: "_Names", shown: Callable[[list[fx.Node]], list[Line]]
) -> Iterator[Line]:
    """The lines of the regions, whose nodes are `shown`."""
    for region in REGIONS:
        nodes = graph.nodes(region)
        if nodes:
            yield Line(f"{region}({_arguments(graph, region, names)})", region)
            yield from shown(nodes)
            yield from (Line(each, region) for each in _returns(graph, region, names))


def summary(graph: TrainGraph) -> str:
    """The last line: what a step costs a rank."""
    traffic = traffic_of(graph)
    memory = memory_of(graph)
    parts = [f"{name} {t.count} ({size(t.nbytes)})" for name, t in traffic.items()]
    parts.append(f"states {size(memory.states)}")
    parts.append(f"gathered {size(memory.gathered)}")
    parts.append(f"saved {size(memory.saved)}")
    parts.append(f"peak {size(memory.peak)}")
    return "summary  " + "  ".join(parts)


def size(count: int) -> str:
    """Bytes with a binary unit: `640 B`, `3.2 MiB`."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if value < 1024 or unit == units[-1]:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds with a unit, to three digits: `12.3 ms`, `1.20 s`."""
    value, units = seconds * 1e6, ("us", "ms", "s")
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError


def _sizes(graph: TrainGraph) -> Iterator[str]:
    """The symbols of a dynamic graph with their values at capture, and the guards."""
    sizes = graph.sizes
    if sizes.symbols:
        yield "sizes  " + ", ".join(f"{s.name} = {s} ({s.hint})" for s in sizes.symbols)
    if sizes.guards:
        yield "guards  " + ", ".join(map(sizes.show, sizes.guards))


def _buckets(graph: TrainGraph) -> Iterator[str]:
    yield "buckets"
    buckets = graph.layout.buckets.values()
    width = max((len(b.block) for b in buckets), default=0)
    for b in buckets:
        count = f"{len(b.params)} param{'s' * (len(b.params) != 1)}"
        frozen = "" if b.trainable else "  frozen"
        yield (
            f"  {b.name:<4} {b.block:<{width}}  {count:<10} {short(b.dtype):<5}"
            f"{b.numel:>12} {b.shard_numel:>10}/rank{frozen}"
        )
    if graph.unused:
        yield f"without gradient  {', '.join(graph.unused)}"


# Names


class _Names(dict[fx.Node, str]):
    """Names of nodes, and of the symbols in their shapes."""

    sizes: Sizes


def _names(graph: TrainGraph) -> _Names:
    names = _Names()
    names.sizes = graph.sizes
    for node in graph.placeholders():
        role = role_of(node)
        names[node] = {
            "input": f"%{role.name}",
            "buffer": f"%{role.name}",
            "constant": f"%{role.name}",
            "size": f"%{role.name}",
            "param": f"%{role.name}",
            "tangent": f"%d_{role.name}",
            "hyper": "%hyper",
            "used": "%used",
            "scale": "%scale",
            "weight": "%weight",
            "state": "%" + role.name.replace("/", "."),
        }.get(role.kind, f"%{role.name}.{role.kind}")
    count = 0
    for node in graph.nodes():
        if ops.is_zero(node.target):
            names[node] = _zero_name(node, names)
        elif _is_of_finish(node):
            names[node] = ("%norm", "%control")[cast(int, node.args[1])]
        else:
            names[node] = f"%{count}"
            count += 1
    return names


def _is_of_finish(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and is_call(source, ops.finish)


def _zero_name(node: fx.Node, names: _Names) -> str:
    first = node.args[0]
    if is_call(node, ops.wait, ops.put):
        return names[cast(fx.Node, first)]
    if is_call(node, ops.param):
        return f"%{node.args[1]}"
    if is_call(node, ops.finish):
        return "%finish"
    if is_call(node, ops.norm_partials):
        return "%partial"
    if is_call(node, ops.gather_partials):
        return "%partials"
    if is_call(node, ops.gather_norms):
        return "%norms"
    if is_call(node, ops.any_rank):
        return "%used_anywhere"
    if is_call(node, ops.sum_weights):
        return "%weights"
    suffix = {
        ops.gather: "",
        ops.grad_buffer: ".grad",
        ops.reduce_scatter: ".mean",
        ops.all_reduce: ".mean",
        ops.accumulate: ".sum",
        ops.measure: ".norms",
        ops.sum_norms: ".totals",
        ops.refresh: ".full",
    }.get(cast(Any, node.target), "")
    return f"%{_bucket_of(node)}{suffix}"


def _bucket_of(node: fx.Node) -> str:
    schema = cast(OpOverload, node.target)._schema
    index = next((i for i, a in enumerate(schema.arguments) if a.name == "bucket"), None)
    return "" if index is None else cast(str, node.args[index])


# Lines


def _line(node: fx.Node, names: _Names) -> Line:
    if ops.is_zero(node.target):
        body = _zero_line(node, names)
        note = size(collective_bytes(node)) if is_call(node, *ops.COLLECTIVES) else ""
    else:
        body = f"{names[node]}: {_type(node, names)} = {_call(node, names)}"
        note = module_of(node)
    shown = f"  {body:<68}  # {note}" if note else f"  {body}"
    return Line(shown, region_of(node), module_of(node), bucket_of(node))


def _zero_line(node: fx.Node, names: _Names) -> str:
    target = f"zero.{cast(OpOverload, node.target)._schema.name.partition('::')[2]}"
    name, args = names[node], node.args
    first = _value(args[0], names)
    if is_call(node, ops.gather):
        return f"{name} = {target} {args[1]}"
    if is_call(node, ops.wait, ops.release):
        return f"{target} {first}"
    if is_call(node, ops.param):
        return f"{name}: {_type(node, names)} = {target} {first}"
    if is_call(node, ops.put):
        return f'{target} {first}, {_value(args[1], names)} "{args[2]}"'
    if is_call(node, ops.grad_buffer):
        return f"{name}: {_type(node, names)} = {target} {args[1]}"
    if is_call(node, ops.update):
        return f"{target}.{args[8]} {_update_arguments(node, names)}"
    if is_call(node, ops.measure):
        shown = _measure_arguments(node, names)
        return f"{name}: {_type(node, names)} = {target}.{args[7]} {shown}"
    if is_call(node, ops.finish):
        return f"{name}: {_type(node, names)} = {target} {_finish_arguments(node, names)}"
    shown = ", ".join(_value(a, names) for a in _shown(node))
    return f"{name}: {_type(node, names)} = {target} {shown}"


def _shown(node: fx.Node) -> Sequence[Any]:
    """Arguments apart from names, the world size, and weights that change nothing."""
    args = [a for a in node.args if not isinstance(a, str)]
    if is_call(node, ops.reduce_scatter, ops.all_reduce):
        buffer, pre, post, world = args
        return [buffer] if (pre, post) == (1.0, 1 / cast(int, world)) else [buffer, pre, post]
    if is_call(node, *ops.COLLECTIVES):
        return args[:-1]
    return args[:-1] if is_call(node, ops.accumulate) and args[-1] == 1.0 else args


def _finish_arguments(node: fx.Node, names: _Names) -> str:
    partials, divided, max_norm, skips = node.args
    parts = [_value(partials, names)]
    parts += [f"divided={_value(divided, names)}"] if divided is not None else []
    parts += [f"max_norm={max_norm}"] if max_norm else []
    return ", ".join([*parts, *["skips"] * bool(skips)])


def _measure_arguments(node: fx.Node, names: _Names) -> str:
    *given, control = node.args[:6]
    parts = [_value(each, names) for each in given]
    parts += [f"control={_value(control, names)}"] if control is not None else []
    return ", ".join(parts)


def _update_arguments(node: fx.Node, names: _Names) -> str:
    master, grad, state, low, hyper, used, control, _, _, *norms = node.args
    parts = [_value(master, names), _value(grad, names), _value(state, names)]
    parts += [f"low={_value(low, names)}"] if low is not None else []
    parts += [_value(hyper, names), _value(used, names)]
    parts += [f"control={_value(control, names)}"] if control is not None else []
    parts += [f"norms={_value(each, names)}" for each in norms]
    return ", ".join(parts)


def _call(node: fx.Node, names: _Names) -> str:
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


def _value(value: Any, names: _Names) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v, names) for v in value)}]"
    if isinstance(value, torch.dtype):
        return short(value)
    if isinstance(value, torch.memory_format):
        return str(value).removeprefix("torch.")
    return repr(value)


def _type(node: fx.Node, names: _Names) -> str:
    value, show = node.meta.get("val"), names.sizes.show
    types = map_tensors(value, lambda t: f"{short(t.dtype)}[{','.join(map(show, t.shape))}]")
    if isinstance(value, SYMBOLIC):
        return show(value)
    if len(types) == 1 and isinstance(value, torch.Tensor):
        return str(types[0])
    return f"({', '.join(types)})" if types else "none"


def _arguments(graph: TrainGraph, region: Region, names: _Names) -> str:
    kinds = _ARGUMENTS[region]
    found = [n for n in graph.placeholders() if role_of(n).kind in kinds and _read(n, region)]
    found.sort(key=lambda n: (kinds.index(role_of(n).kind), role_of(n).name))
    return ", ".join(f"{names[n]}: {_type(n, names)}" for n in found)


def _read(node: fx.Node, region: Region) -> bool:
    return any(user.op == "output" or region_of(user) == region for user in node.users)


def _returns(graph: TrainGraph, region: Region, names: _Names) -> list[str]:
    """What leaves a region, by name; and how much the forward saves."""
    values = graph.outputs(region)
    entries: Sequence[Any] = graph.results if region == "forward" else graph.gradients
    labels = [f"{_label(e)}={names[n]}" for e, n in zip(entries, values) if n is not None]
    if region == "step":
        labels = [f"norm={names[n]}" for n in values if n is not None]
    lines = [f"  return {', '.join(labels)}"] if labels else []
    saved = [n for n in graph.outputs("saved") if n is not None]
    if region == "forward" and saved:
        lines.append(f"  save {len(saved)} values  # {size(sum(map(nbytes, saved)))}")
    return lines


def _label(entry: Any) -> str:
    prefix = {"update": "new ", "input_update": "new ", "param": "grad ", "input": "grad "}
    return prefix.get(entry.kind, "") + str(entry.name)


def _folded(names: _Names) -> _Names:
    """Names in a skeleton: values of aten ops have no number, which torch's decompositions decide."""
    folded = _Names({n: name if _is_kept(n) else "%_" for n, name in names.items()})
    folded.sizes = names.sizes
    return folded


def _is_kept(node: fx.Node) -> bool:
    """Whether a skeleton shows a node: those of ZeRO, not those of aten."""
    return node.op == "placeholder" or ops.is_zero(node.target) or _is_of_finish(node)


def _skeleton(nodes: list[fx.Node], names: _Names) -> list[Line]:
    """zero.* lines, with each run of aten ops between them folded into one."""
    found: list[Line] = []
    for node in nodes:
        if _is_kept(node):
            found.append(_line(node, names))
        elif not found or found[-1].text != "  ...":
            found.append(Line("  ...", region_of(node), module_of(node)))
    return found
