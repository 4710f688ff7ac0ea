"""Memory of a rank that runs a TrainGraph, from liveness on the graph: what is held, and for what.

What a rank holds from step to step (parameters, optimizer states, buffers) is alive throughout; lifetimes.py
says how long everything else is. Both are bytes of storages, without what an allocator adds.

What `zero.offload` moved is counted apart, as the host's. All other figures are the device's. Where the
device is a CPU the copies lie beside it in the same memory: the process then holds both.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import cast

from torch import fx

from zerograph import ops
from zerograph.cost.lifetimes import HOST, Lifetimes, Stored
from zerograph.cost.traffic import nbytes
from zerograph.ir import TrainGraph
from zerograph.nodes import is_ahead, is_call, module_of, region_of, role_of

CATEGORIES = (
    "parameters",
    "optimizer",
    "buffers",
    "gradients",
    "inputs",
    "gathered",
    "activations",
    "recomputed",
)
"""What bytes are for; "activations" are all computed values that are none of the others.

"recomputed" are the values of the forward that the backward computes again.
"""


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
    saved: int
    """Bytes that the forward keeps for the backward on the device, inputs left out."""
    padding: int
    """Bytes of `parameters` that are alignment and padding."""
    gathered_elements: int
    """Most gathered elements alive at once, from the start of a gather to its release."""
    stored: tuple[Stored, ...]
    """The storages that a step makes or is given, beside what is held from step to step."""
    places: tuple[tuple[str, str], ...]
    """(region, module) of each call of the graph, in order."""

    @property
    def states(self) -> int:
        """Bytes held from step to step: parameters, gradients and optimizer states."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def resident(self) -> dict[str, int]:
        """Bytes that are alive throughout, by category."""
        return {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "buffers": self.buffers,
        }

    @cached_property
    def alive(self) -> tuple[tuple[int, ...], ...]:
        """Bytes alive during each call of the graph, by category in the order of CATEGORIES."""
        count = len(self.places)
        changes = {c: [self.resident.get(c, 0)] + [0] * (count + 1) for c in CATEGORIES}
        for stored in self.stored:
            if stored.category != HOST:
                change = changes[stored.category]
                change[stored.birth] += stored.nbytes
                change[stored.death + 1] -= stored.nbytes
        return tuple(zip(*(accumulate(change[:count]) for change in changes.values())))

    @cached_property
    def on_host(self) -> tuple[int, ...]:
        """Bytes in the host's memory during each call of the graph: copies of what is kept."""
        change = [0] * (len(self.places) + 1)
        for stored in self.stored:
            if stored.category == HOST:
                change[stored.birth] += stored.nbytes
                change[stored.death + 1] -= stored.nbytes
        return tuple(accumulate(change[:-1]))

    @cached_property
    def host(self) -> int:
        """Most bytes in the host's memory at once."""
        return max(self.on_host, default=0)

    @cached_property
    def peak(self) -> int:
        """Most bytes alive at once in a training step, all of the above included but the host's."""
        return max(map(sum, self.alive), default=sum(self.resident.values()))

    @cached_property
    def gathered(self) -> int:
        """Most bytes of gathered buckets alive at once (stage 3); one rank alone gathers nothing."""
        return max((alive[CATEGORIES.index("gathered")] for alive in self.alive), default=0)

    @cached_property
    def series(self) -> tuple[Moment, ...]:
        """One moment for each call of the graph, in order."""
        pairs = enumerate(zip(self.places, self.alive, strict=True))
        return tuple(Moment(i, region, module, alive) for i, ((region, module), alive) in pairs)

    @cached_property
    def peak_moment(self) -> Moment | None:
        """The first moment at which the peak is reached; None in a graph without calls."""
        return max(self.series, key=lambda m: m.total, default=None)

    @cached_property
    def kept_at_peak(self) -> int:
        """Of the activations alive at the peak: what the forward keeps for the backward."""
        now = 0 if self.peak_moment is None else self.peak_moment.node
        kept = (s for s in self.stored if s.saved and s.category == "activations")
        return sum(s.nbytes for s in kept if s.birth <= now <= s.death)

    @property
    def host_at_peak(self) -> int:
        """Bytes on the host while the device's peak is reached; no part of it."""
        return 0 if self.peak_moment is None else self.on_host[self.peak_moment.node]

    @cached_property
    def at_peak(self) -> tuple[Held, ...]:
        """What is alive at the peak, the largest first; its bytes add up to the peak.

        Parameters, optimizer states, buffers and the batch are one entry each, of the owner "" (the whole
        model); gathered buckets and gradients one a block; activations one for each module that made some.
        """
        held = {("", category): size for category, size in self.resident.items()}
        now = 0 if self.peak_moment is None else self.peak_moment.node
        for stored in self.stored:
            if stored.birth <= now <= stored.death and stored.category != HOST:
                key = stored.owner, stored.category
                held[key] = held.get(key, 0) + stored.nbytes
        entries = [Held(owner, category, size) for (owner, category), size in held.items() if size]
        return tuple(sorted(entries, key=lambda h: (-h.bytes, h.category, h.owner)))


def memory_of(graph: TrainGraph) -> Memory:
    """The memory of a rank that runs `graph`."""
    held: dict[str, int] = defaultdict(int)
    for node in graph.placeholders():
        role = role_of(node)
        if role.kind != "shard" or graph.layout.buckets[role.name].sliced(graph.stage):
            held[role.kind] += nbytes(node)  # another slice is a part of the full bucket
    nodes = graph.nodes()
    stored = Lifetimes.read(graph, nodes).found
    return Memory(
        parameters=held["full"] + held["shard"] + _unread(graph),
        gradients=held["kept"],
        optimizer=held["master"] + held["state"],
        buffers=held["buffer"] + held["constant"],
        saved=sum(s.nbytes for s in stored if s.saved),
        padding=_padding(graph),
        gathered_elements=_peak_gathered(nodes, graph.resident),
        stored=tuple(stored),
        places=tuple((region_of(node), module_of(node)) for node in nodes),
    )


def peak_gathered(graph: TrainGraph) -> int:
    """Most gathered elements alive at once, from the start of a gather to its release.

    Persistent buckets (stage 3) are among them throughout.
    """
    return _peak_gathered(graph.nodes(), graph.resident)


def _peak_gathered(nodes: list[fx.Node], resident: int) -> int:
    elements: int = resident + sum(node.meta["val"].numel() for node in nodes if is_ahead(node))
    peak = elements
    for node in nodes:
        if is_call(node, ops.gather, ops.gather_ahead) and not is_ahead(node):
            elements += node.meta["val"].numel()
        elif is_call(node, ops.release):
            elements -= cast(fx.Node, node.args[0]).meta["val"].numel()
        peak = max(peak, elements)
    return peak


def _unread(graph: TrainGraph) -> int:
    """Bytes of buckets that this graph does not read but a rank holds all the same."""
    present = {
        role_of(n).name for n in graph.placeholders() if role_of(n).kind in ("full", "shard")
    }
    missing = [b for b in graph.layout.buckets.values() if b.name not in present]
    shares = [graph.layout.world if b.sliced(graph.stage) else 1 for b in missing]
    return sum(b.nbytes // share for b, share in zip(missing, shares))


def _padding(graph: TrainGraph) -> int:
    whole = sliced = 0
    for bucket in graph.layout.buckets.values():
        used = sum(p.numel for p in graph.layout.bucket_params(bucket.name))
        padding = (bucket.numel - used) * bucket.dtype.itemsize
        if bucket.sliced(graph.stage):
            sliced += padding
        else:
            whole += padding
    return whole + sliced // graph.layout.world
