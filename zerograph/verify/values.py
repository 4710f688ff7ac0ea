"""Checks of values: their order, what the backward reads, and whose storage leaves the graph."""

from collections import Counter
from collections.abc import Iterator

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.nodes import (
    REGIONS,
    is_call,
    is_pure,
    is_random,
    is_recomputed,
    region_of,
    role_of,
    view_root,
)


def regions_in_order(graph: TrainGraph) -> Iterator[str]:
    reached = 0
    for node in graph.nodes():
        index = REGIONS.index(region_of(node))
        if index < reached:
            yield f"{node.name} of the {region_of(node)} stands behind a later region"
        reached = max(reached, index)


def values_in_order(graph: TrainGraph) -> Iterator[str]:
    for node in graph.nodes():
        for source in node.all_input_nodes:
            if not source < node:
                yield f"{node.name} reads {source.name} before it exists"


def no_repeated_effects(graph: TrainGraph) -> Iterator[str]:
    """The backward draws no random numbers of the forward's again."""
    random = [n for n in graph.nodes() if is_random(n) and n.meta.get("seq_nr") is not None]
    drawn = Counter(node.meta["seq_nr"] for node in random)
    for node in random:
        if region_of(node) == "backward" and drawn[node.meta["seq_nr"]] > 1:
            yield f"{node.name} repeats a random operation of the forward"


def recomputed_is_pure(graph: TrainGraph) -> Iterator[str]:
    """What the backward computes again draws nothing, writes nothing, communicates nothing, and is of now."""
    stored = {n for r, n in zip(graph.results, graph.outputs("forward")) if r.kind != "output"}
    for node in graph.nodes():
        if not is_recomputed(node):
            continue
        if region_of(node) != "backward":
            yield f"{node.name} of the {region_of(node)} is said to be computed again"
        if node in stored:
            yield f"{node.name} updates a buffer a second time"
        if not is_pure(node):
            yield f"{node.name} in the backward does again what must be done once"


def saved_is_no_parameter(graph: TrainGraph) -> Iterator[str]:
    kinds = ("param", "full", "shard")
    for node in graph.nodes("backward"):
        for source in node.all_input_nodes:
            crosses = source.op == "call_function" and region_of(source) == "forward"
            gathered = is_call(node, ops.param, ops.release, ops.wait) and _is_gathered(source)
            if crosses and not gathered and _comes_from(source, kinds):
                yield (
                    f"{node.name} in the backward reads {source.name}, which the forward made and "
                    "which keeps a parameter's storage alive"
                )


def results_are_no_parameter(graph: TrainGraph) -> Iterator[str]:
    for section in ("forward", "saved", "backward", "step"):
        for node in graph.outputs(section):
            kept = section == "saved" and node is not None and _is_kept(node)
            if node is not None and not kept and _comes_from(node, ("param", "full", "shard")):
                yield f"{section} output {node.name} shares storage with a parameter"


def old_buffers_are_kept(graph: TrainGraph) -> Iterator[str]:
    """The backward reads no buffer that the forward has updated by then."""
    updated = {r.name for r in graph.results if r.kind == "update"}
    for node in graph.placeholders("buffer"):
        if role_of(node).name in updated:
            for user in node.users:
                if user.op != "output" and region_of(user) == "backward":
                    yield f"{user.name} reads buffer {role_of(node).name} after its update"


def _is_gathered(node: fx.Node) -> bool:
    """Whether a value is a whole gathered bucket, which a release ends, or one under way."""
    source = node.args[0] if is_call(node, ops.wait) else node
    return isinstance(source, fx.Node) and is_call(source, ops.gather)


def _is_kept(node: fx.Node) -> bool:
    """Whether a value is such a bucket, and the backward is who ends it, or waits for it."""
    users = [user for user in node.users if user.op != "output"]
    return _is_gathered(node) and any(region_of(user) == "backward" for user in users)


def _comes_from(node: fx.Node, kinds: tuple[str, ...]) -> bool:
    root = view_root(node)
    if is_call(root, ops.gather):
        return True
    return root.op == "placeholder" and role_of(root).kind in kinds


def saved_is_complete(graph: TrainGraph) -> Iterator[str]:
    saved = set(graph.outputs("saved"))
    for node in graph.outputs("saved"):
        if node is not None and node.op != "placeholder" and region_of(node) != "forward":
            yield f"the forward saves {node.name}, which the {region_of(node)} makes"
    kinds = ("buffer", "constant", "input", "size")
    for node in graph.nodes("backward"):
        for source in node.all_input_nodes:
            forward = source.op != "placeholder" and region_of(source) == "forward"
            outside = source.op == "placeholder" and role_of(source).kind in kinds
            if (forward or outside) and source not in saved:
                yield f"{node.name} reads {source.name}, which the forward does not save"
