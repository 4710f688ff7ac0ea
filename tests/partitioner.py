"""Choices at a budget or a peak: torch's own partitioner's for a joint graph, and zerograph's beside it."""

import copy

from torch import fx
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition

from zerograph.ir import TrainGraph
from zerograph.recompute import Choice
from zerograph.recompute.regions import Options


def kept_by_torch(graph: TrainGraph, fraction: float) -> list[fx.Node]:
    """The nodes of `graph` that torch saves for the backward, of values and views."""
    joint, origin = _flat(graph)
    results = len(graph.outputs("forward"))
    with config.patch(activation_memory_budget=fraction, cse=False):
        forward, _ = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=results)
    saved = forward.graph.output_node().args[0][results:]  # type: ignore[index]
    return [origin[node.name] for node in saved if isinstance(node, fx.Node)]


def choices(options: Options, count: int) -> list[tuple[int, Choice]]:
    """(peak of activations in bytes, choice) of our own for each of so many budgets, least to most."""
    found = [options.choose(options.budget(step / count))[1] for step in range(count + 1)]
    return [(options.peaks.peak(choice.keep), choice) for choice in found]


def cheapest(found: list[tuple[int, Choice]], peak: int) -> tuple[int, Choice]:
    """Of those with at most `peak` bytes the one that repeats the fewest FLOPs, then the least traffic."""
    fitting = [(p, choice) for p, choice in found if p <= peak]
    return min(fitting, key=lambda pair: (pair[1].flops, pair[1].traffic))


def _flat(graph: TrainGraph) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """The graph as AOTAutograd has it: primals and tangents in, one flat list out."""
    joint, made, origin = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    tangents = set(graph.placeholders("tangent"))
    for index, node in enumerate(graph.graph.nodes):
        if node.op == "output":
            continue
        if node.op == "placeholder":
            kind = "tangents" if node in tangents else "primals"
            made[node] = joint.placeholder(f"{kind}_{index}")
            made[node].meta = copy.copy(node.meta)
        else:
            made[node] = joint.node_copy(node, made.__getitem__)
        origin[made[node].name] = node
    flat = [*graph.outputs("forward"), *graph.outputs("backward")]
    joint.output(tuple(None if node is None else made[node] for node in flat))
    joint.output_node().meta["desc"] = [None] * len(flat)
    return fx.GraphModule(graph.module, joint), origin
