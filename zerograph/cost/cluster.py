"""Described machines: a device, the links within and between nodes, and what a collective costs on them.

A collective of `nbytes` (its full buffer) over `world` ranks is priced by alpha-beta: the latencies of its
messages, and the bytes that one rank sends over the bandwidth that it has. With r = 1 for a gather or a
reduce-scatter and 2 for an all-reduce, `nodes` nodes of `local` ranks:

    ring    r (world - nodes) intra latencies, r (nodes - 1) inter latencies;
            r nbytes (world - 1) / world at min(intra, local * inter), since a node's ranks share its rings
    tree    r (local - 1) intra latencies, r ceil(log2 nodes) inter latencies;
            all-reduce: 2 nbytes at the ring's bandwidth (two binary trees, each rank inner in one of them);
            others: nbytes (nodes - 1) / world between the ranks of one column, then a ring within the node,
            and no faster than the ring: the tree is there for small messages of large worlds

The cheaper is taken. Hops and bandwidths of ring and tree are those of NCCL's own tuning model
(src/graph/tuning.cc); the trees of gather and reduce-scatter are recursive doubling and halving (Thakur,
Rabenseifner, Gropp 2005, section 4), as in NCCL's PAT. On gloo buckets are gathered and reduce-scattered
point-to-point (collectives.py), in one hop and by the same bytes as in a ring; the host copies its own part
of a gather, and sums the parts of a reduction. gloo's all-reduce is a ring.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from zerograph.saved import Entry, Saved

Kind = Literal["gather", "reduce_scatter", "all_reduce"]
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("gather", "gather_ahead", "refresh"), "gather"),
    **dict.fromkeys(("gather_partials", "gather_norms", "gather_activation"), "gather"),
    "reduce_scatter": "reduce_scatter",
    **dict.fromkeys(("all_reduce", "any_rank", "sum_weights"), "all_reduce"),
}
_OF_BUCKETS = ("gather", "gather_ahead", "refresh", "reduce_scatter")

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Device(Entry):
    """One accelerator (or one rank's share of a CPU)."""

    name: str
    memory: int = Field(gt=0)
    """Bytes."""
    flops: dict[str, Rate]
    """Peak per second of dense matrix products, by dtype as the plan's text spells it; "f32" at least."""
    bandwidth: Rate
    """Peak bytes per second of its memory."""
    efficiency: Share = 1.0
    """The share of `flops` that products reach."""
    memory_efficiency: Share = 1.0
    """The share of `bandwidth` that other operators reach."""
    cache: int = Field(default=0, ge=0)
    """Operators that touch at most so many bytes work in a cache."""
    cache_bandwidth: Rate = 1.0
    """Bytes per second of that cache; of no account if `cache` is 0."""
    kernel: Seconds = 0.0
    """What an operator takes on the device beside its work."""
    host_bandwidth: Rate = 2.5e10
    """Bytes per second and direction between its memory and the host's, as copies reach it."""
    launch: Seconds
    """What it takes the host to start an operator."""
    view: Seconds = 0.0
    """What it takes the host to make a view."""
    asynchronous: bool = True
    """Whether the host runs ahead of the device; on a CPU the two are one thread."""

    @field_validator("flops")
    @classmethod
    def _has_f32(cls, flops: dict[str, float]) -> dict[str, float]:
        if "f32" not in flops:
            raise ValueError('needs at least "f32"')
        return flops

    def seconds(self, flops: int, nbytes: int, dtype: str) -> float:
        """Roofline: the slower of the products and of the memory traffic."""
        products = flops / (self.flops.get(dtype, self.flops["f32"]) * self.efficiency)
        if nbytes <= self.cache:
            return self.kernel + max(products, nbytes / self.cache_bandwidth)
        return self.kernel + max(products, nbytes / (self.bandwidth * self.memory_efficiency))


class Link(Entry):
    """How a rank reaches others."""

    bandwidth: Rate
    """Bytes per second and direction, for one rank."""
    latency: Seconds
    """Of one message."""
    efficiency: dict[Kind, Share] = Field(default_factory=dict)
    """The share of `bandwidth` that a kind of collective reaches; all of it if not given."""

    def rate(self, kind: Kind) -> float:
        return self.bandwidth * self.efficiency.get(kind, 1.0)


class Cluster(Saved):
    """Nodes of equal devices. A world no larger than `per_node` never leaves its node."""

    called: ClassVar[str] = "a cluster"
    indent: ClassVar[int | None] = 2

    name: str
    device: Device
    per_node: int = Field(gt=0)
    """Ranks of a node."""
    intra: Link
    inter: Link
    """Between nodes; `bandwidth` is one rank's share of its node's network."""
    backend: Literal["nccl", "gloo"] = "nccl"
    """Whose algorithms; RCCL's are NCCL's."""
    start: Seconds = 0.0
    """What each collective takes beside its messages."""
    slows_compute: float = Field(default=0.0, ge=0, lt=1)
    """The share of its speed that compute loses while a collective runs: on CPUs both take cores."""
    slowed_by_compute: float = Field(default=0.0, ge=0, lt=1)
    """The share of its speed that a collective loses while compute runs."""

    def collective(self, kind: str, nbytes: int, world: int, stride: int = 1) -> float:
        """Seconds of a collective, by the operator's name, with a full buffer of `nbytes`.

        It is among `world` ranks whose numbers are `stride` apart (an axis of a mesh), while the other groups
        along that axis do the same.
        """
        if world == 1:
            return 0.0
        if self.is_direct(kind):
            return self.start + self._direct(_KINDS[kind], nbytes, world, stride)
        ring = self._ring(_KINDS[kind], nbytes, world, stride)
        if self.backend == "gloo":
            return self.start + ring
        return self.start + min(ring, self._tree(_KINDS[kind], nbytes, world, stride))

    def bytes_per_link(self, kind: str, nbytes: int, world: int) -> float:
        """Bytes that one rank sends for a collective, headers left out.

        It is the mean over ranks: where `nbytes` does not divide into equal segments, some send a few more.
        """
        return self._rounds(_KINDS[kind]) * nbytes * (world - 1) / world

    def copied(self, kind: str, nbytes: int, world: int) -> int:
        """Bytes that the host reads and writes to start a collective: its own part of a gather."""
        gathers = self.is_direct(kind) and _KINDS[kind] == "gather" and world > 1
        return 2 * nbytes // world if gathers else 0

    def summed(self, kind: str, nbytes: int, world: int) -> int:
        """Bytes that the host reads and writes at a collective's wait: all parts of its slice, their mean."""
        sums = self.is_direct(kind) and _KINDS[kind] != "gather" and world > 1
        return (world + 3) * nbytes // world if sums else 0

    def hops(self, kind: str, world: int) -> int:
        """Messages that follow each other."""
        if self.is_direct(kind):
            return 1
        return self._rounds(_KINDS[kind]) * (world - 1)

    def is_direct(self, kind: str) -> bool:
        """Whether a collective goes point-to-point."""
        return self.backend == "gloo" and kind in _OF_BUCKETS

    def _rounds(self, kind: Kind) -> int:
        """How often the buffer goes round."""
        return 2 if kind == "all_reduce" else 1

    def _nodes(self, world: int, stride: int) -> tuple[int, int]:
        """(nodes, ranks of a node) of a group whose ranks are `stride` apart."""
        local = min(world, max(1, self.per_node // stride))
        return -(-world // local), local

    def _rate(self, kind: Kind, nodes: int, local: int) -> float:
        """Bytes per second that each rank of a ring sends."""
        rates = [self.intra.rate(kind)] if local > 1 else []
        return min(rates + ([local * self.inter.rate(kind)] if nodes > 1 else []))

    def _ring(self, kind: Kind, nbytes: int, world: int, stride: int = 1) -> float:
        nodes, local = self._nodes(world, stride)
        latency = (world - nodes) * self.intra.latency + (nodes - 1) * self.inter.latency
        moved = nbytes * (world - 1) / world / self._rate(kind, nodes, local)
        return self._rounds(kind) * (latency + moved)

    def _direct(self, kind: Kind, nbytes: int, world: int, stride: int = 1) -> float:
        """Every rank sends to every other at once; a node's ranks share its network."""
        nodes, local = self._nodes(world, stride)
        link = self.inter if nodes > 1 else self.intra
        part = nbytes / world
        within = (local - 1) * part / self.intra.rate(kind)
        across = (world - local) * part / self.inter.rate(kind)
        return link.latency + within + across

    def _tree(self, kind: Kind, nbytes: int, world: int, stride: int = 1) -> float:
        nodes, local = self._nodes(world, stride)
        depth = (nodes - 1).bit_length()
        latency = (local - 1) * self.intra.latency + depth * self.inter.latency
        if kind == "all_reduce":
            return 2 * (latency + nbytes / self._rate(kind, nodes, local))
        column = nbytes * (nodes - 1) / world / self.inter.rate(kind)
        within = nbytes * (local - 1) / local / self.intra.rate(kind)
        ring = nbytes * (world - 1) / world / self._rate(kind, nodes, local)
        return latency + max(column + within, ring)
