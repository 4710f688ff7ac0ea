"""The lines of a whole graph: the head, each region with what enters and leaves it, the summary."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from zerograph.collectives import ALGORITHMS
from zerograph.cost import memory_of, nbytes, traffic_of
from zerograph.ir import TrainGraph
from zerograph.nodes import REGIONS, Region, is_recomputed, is_view, module_of, region_of, role_of
from zerograph.precision import short
from zerograph.text.names import Names, folded_names, is_kept, names_of
from zerograph.text.nodes import Line, line_of, type_of
from zerograph.units import size

VERSION = 1
_ARGUMENTS: dict[Region, tuple[str, ...]] = {
    "forward": ("input", "buffer", "constant", "arena"),
    "backward": ("tangent", "scale", "hyper", "used"),
    "step": ("hyper", "used", "scale", "weight"),
}


def text(graph: TrainGraph, after: str, *, skeleton: bool = False) -> str:
    """The canonical text of `graph` after the pass named `after`."""
    return "".join(f"{line.text}\n" for line in lines(graph, after, skeleton=skeleton))


def lines(graph: TrainGraph, after: str, *, skeleton: bool = False) -> list[Line]:
    """The lines of the canonical text."""
    return forms(graph, after)[skeleton]


def forms(graph: TrainGraph, after: str) -> tuple[list[Line], list[Line]]:
    """The lines of the full text and of the skeleton, whose names and costs are found once."""
    names = names_of(graph)
    head = _head(graph, after)
    full = _body(graph, names, lambda nodes: [line_of(node, names) for node in nodes])
    folded = folded_names(names)
    short = _body(graph, folded, lambda nodes: _skeleton(nodes, folded))
    last = Line(summary(graph))
    return [*head, *full, last], [*head, *short, last]


def summary(graph: TrainGraph) -> str:
    """The last line: what a step costs a rank."""
    traffic = traffic_of(graph)
    memory = memory_of(graph)
    parts = [f"{name} {t.count} ({size(t.nbytes)})" for name, t in traffic.items()]
    parts.append(f"states {size(memory.states)}")
    parts.append(f"gathered {size(memory.gathered)}")
    parts.append(f"saved {size(memory.saved)}")
    parts += [f"host {size(memory.host)}"] if memory.host else []
    recomputed = sum(is_recomputed(node) and not is_view(node) for node in graph.nodes("backward"))
    parts += [f"recomputed {recomputed} ops"] if recomputed else []
    parts.append(f"peak {size(memory.peak)}")
    return "summary  " + "  ".join(parts)


def _head(graph: TrainGraph, after: str) -> list[Line]:
    head = f"# zerograph {VERSION} | {graph.model} | stage {graph.stage} | world {graph.world}"
    return [
        Line(f"{head} | after {after}"),
        Line(f"precision  {graph.precision.describe()}"),
        *(Line(each) for each in graph.mesh.lines()),
        *(Line(each) for each in _collectives(graph)),
        *(Line(each) for each in (*_sizes(graph), *_buckets(graph))),
    ]


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
        frozen = ("" if b.trainable else "  frozen") + ("  persistent" if b.persistent else "")
        frozen += "  own parts" if graph.layout.parallel(b.name) else ""
        yield (
            f"  {b.name:<4} {b.block:<{width}}  {count:<10} {short(b.dtype):<5}"
            f"{b.numel:>12} {b.shard_numel:>10}/rank{frozen}"
        )
    if graph.unused:
        yield f"without gradient  {', '.join(graph.unused)}"


def _collectives(graph: TrainGraph) -> Iterator[str]:
    """The algorithm that moves the buckets."""
    if graph.world > 1 and "collectives" in graph.notes:
        yield f"collectives  {ALGORITHMS[graph.notes['collectives']]}"


def _body(
    graph: TrainGraph, names: Names, shown: Callable[[list[fx.Node]], list[Line]]
) -> Iterator[Line]:
    """The lines of the regions, whose nodes are `shown`."""
    for region in REGIONS:
        nodes = graph.nodes(region)
        if nodes:
            yield Line(f"{region}({_arguments(graph, region, names)})", region)
            yield from shown(nodes)
            yield from (Line(each, region) for each in _returns(graph, region, names))


def _arguments(graph: TrainGraph, region: Region, names: Names) -> str:
    kinds = _ARGUMENTS[region]
    found = [n for n in graph.placeholders() if role_of(n).kind in kinds and _read(n, region)]
    found.sort(key=lambda n: (kinds.index(role_of(n).kind), role_of(n).name))
    return ", ".join(f"{names[n]}: {type_of(n, names)}" for n in found)


def _read(node: fx.Node, region: Region) -> bool:
    return any(user.op == "output" or region_of(user) == region for user in node.users)


def _returns(graph: TrainGraph, region: Region, names: Names) -> list[str]:
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


def _skeleton(nodes: list[fx.Node], names: Names) -> list[Line]:
    """zero.* lines, with each run of aten ops between them folded into one."""
    found: list[Line] = []
    for node in nodes:
        if is_kept(node):
            found.append(line_of(node, names))
        else:
            folded = "  ... recomputed" if is_recomputed(node) else "  ..."
            if not found or found[-1].text != folded:
                found.append(Line(folded, region_of(node), module_of(node)))
    return found
