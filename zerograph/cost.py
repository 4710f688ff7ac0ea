"""Static costs of a TrainGraph, per rank: bytes moved, bytes held, and the peaks.

Everything follows from the graph, so that planning needs no rank and no device. Bytes are what a rank
holds or sends into the collective's buffer (a gather of a bucket counts the whole bucket).
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from zerograph import ops
from zerograph.compat import hint
from zerograph.ir import REGIONS, TrainGraph, is_call, is_view, map_tensors, region_of, role_of


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

    @property
    def states(self) -> int:
        """Bytes held from step to step: parameters, gradients and optimizer states."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many, and the bytes of their full buffers."""

    count: int
    nbytes: int


def memory_of(graph: TrainGraph) -> Memory:
    """The memory of a rank that runs `graph`."""
    held: dict[str, int] = defaultdict(int)
    for node in graph.placeholders():
        held[role_of(node).kind] += nbytes(node)
    parameters = held["full"] + (held["shard"] if graph.stage == 3 else 0) + _unread(graph)
    saved = _saved_bytes(graph)
    resident = parameters + held["master"] + held["state"] + held["buffer"]
    alive = max((_live_peak(graph, region) for region in REGIONS), default=0)
    peak_elements, peak_bytes = _gathered_peaks(graph)
    return Memory(
        parameters=parameters,
        gradients=held["kept"],
        optimizer=held["master"] + held["state"],
        buffers=held["buffer"],
        gathered=peak_bytes,
        saved=saved,
        peak=resident + alive,
        padding=_padding(graph),
        gathered_elements=peak_elements,
    )


def traffic_of(graph: TrainGraph) -> dict[str, Traffic]:
    """Per operator name ("gather", "reduce_scatter", ...): its collectives in one step."""
    found: dict[str, list[int]] = defaultdict(list)
    for node in graph.nodes():
        if is_call(node, *ops.COLLECTIVES):
            found[name_of(node)].append(collective_bytes(node))
    return {name: Traffic(len(sizes), sum(sizes)) for name, sizes in sorted(found.items())}


def name_of(node: fx.Node) -> str:
    """`gather` for a zero.gather node."""
    return str(cast(Any, node.target)._schema.name).partition("::")[2]


def collective_bytes(node: fx.Node) -> int:
    """Bytes of a collective's full buffer, the larger of its input and output."""
    return max(nbytes(node), *(nbytes(source) for source in node.all_input_nodes))


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's value at the captured call's sizes, as if its storage were its own."""
    sizes = map_tensors(node.meta.get("val"), lambda t: hint(t.numel()) * t.dtype.itemsize)
    return sum(sizes)


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


def _live_peak(graph: TrainGraph, region: str) -> int:
    """Most bytes alive in a region beside what is always resident."""
    nodes = [n for n in graph.nodes() if region_of(n) == region]
    if not nodes:
        return 0
    own = set(nodes)
    last: dict[fx.Node, fx.Node | None] = {}
    for node in nodes:
        for source in (node, *node.all_input_nodes):
            last[_storage(source)] = node
    for section in ("forward", "saved") if region == "forward" else (region,):
        for result in graph.outputs(section):
            if result is not None:
                last[_storage(result)] = None
    alive = sum(nbytes(n) for n in last if n not in own and not _always_there(n))
    peak = alive
    ends: dict[fx.Node, int] = defaultdict(int)
    for owner, final in last.items():
        if final is not None and not _always_there(owner):
            ends[final] += nbytes(owner)
    for node in nodes:
        if _storage(node) is node and node in last:
            alive += nbytes(node)
        peak = max(peak, alive)
        alive -= ends[node]
    return peak


def _always_there(node: fx.Node) -> bool:
    return node.op == "placeholder" and role_of(node).kind in _RESIDENT
