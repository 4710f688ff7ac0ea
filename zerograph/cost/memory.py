"""Memory of a rank that runs a TrainGraph, from liveness on the graph: what is held, and for what.

Every value belongs to the node that owns its storage, through views, waits and writes in place. It is
alive from that node to its last use; what leaves a region, or is saved for the backward, to the region's
end or its last use there. What a rank holds from step to step is alive throughout.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import fx

from zerograph import ops
from zerograph.cost.traffic import nbytes
from zerograph.ir import (
    REGIONS,
    TrainGraph,
    is_call,
    is_view,
    module_of,
    region_of,
    role_of,
)

CATEGORIES = (
    "parameters",
    "optimizer",
    "buffers",
    "gradients",
    "inputs",
    "gathered",
    "activations",
)
"""What bytes are for; "activations" are all computed values that are none of the others."""


@dataclass(frozen=True)
class Moment:
    """What is alive while one node runs."""

    node: int
    """Index in `graph.nodes()`."""
    region: str
    module: str
    bytes: tuple[int, ...]
    """By category, in the order of CATEGORIES."""

    @property
    def total(self) -> int:
        return sum(self.bytes)


@dataclass(frozen=True)
class Held:
    """Bytes alive at the peak that one module (or bucket) accounts for."""

    owner: str
    category: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Predicted bytes on one rank. Padding is part of each figure, and stated on its own."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    gathered: int
    """Most bytes of gathered buckets alive at once (stage 3)."""
    saved: int
    """Bytes that the forward keeps for the backward, inputs left out."""
    peak: int
    """Most bytes alive at once in a training step, all of the above included."""
    padding: int
    """Bytes of `parameters` that are alignment and padding."""
    gathered_elements: int
    series: tuple[Moment, ...]
    """One for each node of the graph, in order."""
    at_peak: tuple[Held, ...]
    """What is alive at the peak, the largest first."""

    @cached_property
    def peak_moment(self) -> Moment | None:
        """The first moment at which the peak is reached; None in a graph without nodes."""
        return max(self.series, key=lambda m: m.total, default=None)

    @property
    def states(self) -> int:
        """Bytes held from step to step: parameters, gradients and optimizer states."""
        return self.parameters + self.gradients + self.optimizer


def memory_of(graph: TrainGraph) -> Memory:
    """The memory of a rank that runs `graph`."""
    held: dict[str, int] = defaultdict(int)
    for node in graph.placeholders():
        held[role_of(node).kind] += nbytes(node)
    parameters = held["full"] + (held["shard"] if graph.stage == 3 else 0) + _unread(graph)
    saved = _saved_bytes(graph)
    resident = _resident(graph, parameters)
    series = tuple(m for region in REGIONS for m in _moments(graph, region, resident))
    peak_elements, peak_bytes = _gathered_peaks(graph)
    return Memory(
        parameters=parameters,
        gradients=held["kept"],
        optimizer=held["master"] + held["state"],
        buffers=held["buffer"],
        gathered=peak_bytes,
        saved=saved,
        peak=max((m.total for m in series), default=sum(resident.values())),
        padding=_padding(graph),
        gathered_elements=peak_elements,
        series=series,
        at_peak=(),
    )


def peak_gathered(graph: TrainGraph) -> int:
    """Most gathered elements alive at once, from the start of a gather to its release."""
    return _gathered_peaks(graph)[0]


def _gathered_peaks(graph: TrainGraph) -> tuple[int, int]:
    elements = size = peak_elements = peak_bytes = 0
    for node in graph.nodes():
        if is_call(node, ops.gather):
            elements += node.meta["val"].numel()
            size += nbytes(node)
        elif is_call(node, ops.release):
            source = cast(fx.Node, node.args[0])
            elements -= source.meta["val"].numel()
            size -= nbytes(source)
        peak_elements, peak_bytes = max(peak_elements, elements), max(peak_bytes, size)
    return peak_elements, peak_bytes


def _unread(graph: TrainGraph) -> int:
    """Bytes of buckets that this graph does not read but a rank holds all the same."""
    present = {
        role_of(n).name for n in graph.placeholders() if role_of(n).kind in ("full", "shard")
    }
    share = graph.world if graph.stage == 3 else 1
    return sum(b.nbytes // share for b in graph.layout.buckets.values() if b.name not in present)


def _padding(graph: TrainGraph) -> int:
    share = graph.world if graph.stage == 3 else 1
    total = 0
    for bucket in graph.layout.buckets.values():
        used = sum(p.numel for p in graph.layout.bucket_params(bucket.name))
        total += (bucket.numel - used) * bucket.dtype.itemsize
    return total // share


def _storage(node: fx.Node) -> fx.Node:
    """The node that owns a node's storage, through views, waits and writes in place."""
    while True:
        through = is_call(node, ops.wait, ops.put) or (
            is_view(node) and not is_call(node, ops.param)
        )
        if is_call(node, ops.param) or through:
            node = cast(fx.Node, node.args[0])
        else:
            return node


def _saved_bytes(graph: TrainGraph) -> int:
    owners = {_storage(n) for n in graph.outputs("saved") if n is not None}
    return sum(nbytes(n) for n in owners if n.op == "call_function")


_RESIDENT = ("full", "shard", "master", "state", "buffer", "constant", "hyper", "used", "param")


def _resident(graph: TrainGraph, parameters: int) -> dict[str, int]:
    """Bytes that are alive throughout, by category."""
    held: dict[str, int] = defaultdict(int)
    for node in graph.placeholders():
        held[role_of(node).kind] += nbytes(node)
    optimizer = held["master"] + held["state"]
    return {"parameters": parameters, "optimizer": optimizer, "buffers": held["buffer"]}


def _category(owner: fx.Node) -> str:
    if owner.op == "placeholder":
        return "gradients" if role_of(owner).kind == "kept" else "inputs"
    if is_call(owner, ops.gather):
        return "gathered"
    gradients = (ops.grad_buffer, ops.reduce_scatter, ops.all_reduce, ops.accumulate)
    return "gradients" if is_call(owner, *gradients) else "activations"


def _moments(graph: TrainGraph, region: str, resident: dict[str, int]) -> Iterator[Moment]:
    """What is alive at each node of a region."""
    numbered = [(i, n) for i, n in enumerate(graph.nodes()) if region_of(n) == region]
    nodes = [n for _, n in numbered]
    own = set(nodes)
    last: dict[fx.Node, fx.Node | None] = {}
    for node in nodes:
        for source in (node, *node.all_input_nodes):
            last[_storage(source)] = node
    for section in ("forward", "saved") if region == "forward" else (region,):
        for result in graph.outputs(section):
            if result is not None:
                last[_storage(result)] = None
    alive = dict.fromkeys(CATEGORIES, 0) | resident
    for owner in last:
        if owner not in own and not _always_there(owner):
            alive[_category(owner)] += nbytes(owner)
    ends: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for owner, final in last.items():
        if final is not None and not _always_there(owner):
            ends[final].append(owner)
    for index, node in numbered:
        if _storage(node) is node and node in last:
            alive[_category(node)] += nbytes(node)
        yield Moment(index, region, module_of(node), tuple(alive[c] for c in CATEGORIES))
        for owner in ends[node]:
            alive[_category(owner)] -= nbytes(owner)


def _always_there(node: fx.Node) -> bool:
    return node.op == "placeholder" and role_of(node).kind in _RESIDENT
