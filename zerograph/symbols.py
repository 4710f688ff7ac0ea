"""From the symbols of a capture to the sizes of a graph: their sources, guards and placeholders."""

import torch

from zerograph import compat, nodes
from zerograph.errors import CaptureError
from zerograph.ir import TrainGraph
from zerograph.sizes import Size, Sizes


def symbols_of(captured: compat.Captured, fakes: list[torch.Tensor], paths: list[str]) -> Sizes:
    """The symbols of a capture, in the order of the call, and what it assumed about them."""
    places = compat.sizes_of(captured, fakes)
    symbols: list[Size] = []
    for symbol, (index, kind, dim) in sorted(places.items(), key=lambda item: item[1]):
        fake = fakes[index]
        hint = fake.size(dim) if kind == "size" else fake.stride(dim)
        symbols.append(Size(f"s{len(symbols)}", symbol, index, paths[index], kind, dim, hint))
    guards = compat.guards_of(captured)
    unknown = {s for guard in guards for s in guard.free_symbols} - set(places)
    if unknown:
        raise CaptureError(
            f"the forward depends on {', '.join(sorted(map(str, unknown)))}, which is no size of an input"
        )
    return Sizes(tuple(symbols), tuple(guards))


def compute_sizes(graph: TrainGraph, captured: compat.Captured) -> None:
    """A placeholder for every symbol, and all other sizes as what follows from these.

    So no size is read from a tensor within the graph, and any size can be computed in any region.
    """
    present = {nodes.role_of(node).name for node in graph.placeholders("size")}
    for size in graph.sizes.symbols:
        if size.name not in present:
            value = compat.new_size(captured, size.symbol, size.hint)
            graph.add_placeholder("size", size.name, value)
    for node in graph.nodes():
        read = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if read and isinstance(node.meta.get("val"), torch.SymInt):
            with graph.inserting(node, nodes.region_of(node), nodes.module_of(node)) as insert:
                node.replace_all_uses_with(insert.size(node.meta["val"]))  # type: ignore[arg-type]
            graph.graph.erase_node(node)
