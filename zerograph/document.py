"""Document: all that a plan shows, as plain data that can be saved, read again, diffed and drawn.

    Plan  ->  Document  ->  canonical text, JSON, diff, HTML report, traces

The tools of `zerograph.cli` and the report read documents only, so a saved plan shows what a fresh one shows,
without the model, without tracing and without the torch that made it. The JSON is the same byte for byte
from run to run: no times of this machine, no paths, no ids.
"""

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from zerograph.countable import Countable, holds, within
from zerograph.errors import PlanError, suggestion
from zerograph.nodes import REGIONS
from zerograph.saved import Entry, Saved
from zerograph.text import Line


class BucketEntry(Entry):
    """One bucket of the layout."""

    name: str
    block: str
    dtype: str
    trainable: bool
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """One for each of `params`."""
    numel: int
    shard_numel: int


class PassEntry(Entry):
    """One pass: what it did, and the text after it as indices into `Document.lines`."""

    name: str
    did: str
    full: tuple[int, ...]
    skeleton: tuple[int, ...]


class NodeEntry(Entry):
    """One call of the final graph, in order."""

    op: str
    """`zero.gather`, `aten.mm`, ..."""
    region: str
    module: str
    bucket: str
    nbytes: int
    """Bytes of its value; of a collective, those of its full buffer."""
    flops: int
    moved: int
    """Bytes read from and written to memory."""
    stream: Literal["compute", "communication", "copy", ""]
    """Empty for a call that takes no time."""
    start: float
    """Seconds from the start of the step, predicted."""
    seconds: float
    alive: tuple[int, ...]
    """Bytes alive while it runs, by category, in the order of MemoryEntry.categories."""


class HeldEntry(Entry):
    """Bytes alive at the peak that one module or bucket accounts for."""

    owner: str
    category: str
    bytes: int


class MemoryEntry(Entry):
    """Predicted bytes on one rank."""

    categories: tuple[str, ...]
    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    gathered: int
    saved: int
    host: int = 0
    peak: int
    padding: int
    peak_node: int
    """Index into `Document.nodes` of the call at which the peak is reached; -1 without calls."""
    at_peak: tuple[HeldEntry, ...]
    kept_at_peak: int = 0
    """Of the activations at the peak, what the forward keeps; the others are temporary."""
    host_at_peak: int = 0
    """Beside the peak, on the host."""


class TrafficEntry(Entry):
    """Collectives of one kind in a step."""

    count: int
    nbytes: int


class TimeEntry(Entry):
    """The predicted step on a described cluster, in seconds."""

    cluster: str
    step: float
    compute: float
    communication: float
    waited: float


class Document(Saved, Countable):
    """One plan as data. `Plan.document()` makes it, `save` and `load` keep it."""

    called: ClassVar[str] = "a saved plan"

    format: Literal[1] = 1
    model: str
    stage: int
    world: int
    mesh: str = ""
    """The axes of the ranks, if there are several."""
    precision: str
    config: dict[str, Any]
    """The config keys that were given."""
    buckets: tuple[BucketEntry, ...]
    traffic: dict[str, TrafficEntry]
    memory: MemoryEntry
    time: TimeEntry
    advisory: tuple[str, ...]
    signature: tuple[str, ...]
    kernels: dict[str, str]
    """Sources of the generated kernels that the plan uses, by file name: C++ (.cpp) and Triton (.py)."""
    passes: tuple[PassEntry, ...]
    nodes: tuple[NodeEntry, ...]
    lines: tuple[Line, ...]
    """Every distinct line of the texts of all passes, once."""

    @model_validator(mode="after")
    def _whole(self) -> "Document":
        used = [index for p in self.passes for index in (*p.full, *p.skeleton)]
        if not used or not 0 <= min(used) <= max(used) < len(self.lines):
            raise ValueError("its passes and its lines do not belong together")
        if not -1 <= self.memory.peak_node < len(self.nodes):
            raise ValueError("its peak and its nodes do not belong together")
        if any(len(b.params) != len(b.shapes) for b in self.buckets):
            raise ValueError("a bucket has not one shape for each parameter")
        return self

    def text(
        self,
        after: str | None = None,
        *,
        skeleton: bool = False,
        region: str | None = None,
        layer: str | None = None,
    ) -> str:
        """The canonical text after a pass (by default the last), or the lines of a region or layer.

        `layer` is a module's FQN, to which its submodules and the buckets with its parameters belong, or
        a bucket's name.
        """
        found = self.select(after, skeleton=skeleton, region=region, layer=layer)
        return "".join(f"{line.text}\n" for line in found)

    def select(
        self,
        after: str | None = None,
        *,
        skeleton: bool = False,
        region: str | None = None,
        layer: str | None = None,
    ) -> list[Line]:
        """The lines of `text`. Raises PlanError for a pass, region or layer that the plan does not have."""
        entry = self.after(after)
        found = [self.lines[i] for i in (entry.skeleton if skeleton else entry.full)]
        if region is not None:
            if region not in REGIONS:
                raise PlanError(f"no region {region!r}{suggestion(region, REGIONS)}")
            found = [line for line in found if line.region == region]
        if layer is not None:
            buckets = {layer, *(b.name for b in self.buckets if holds(b, layer))}
            if not any(_of_layer(line, layer, buckets) for line in self.lines):
                raise PlanError(f"no layer {layer!r}{suggestion(layer, self.layers())}")
            found = [line for line in found if _of_layer(line, layer, buckets)]
        return found

    def layers(self) -> list[str]:
        """Every module that a line is of, those above it, and the buckets."""
        modules = dict.fromkeys(line.module for line in self.lines if line.module)
        parts = [module.split(".") for module in modules]
        above = (".".join(p[:n]) for p in parts for n in range(1, len(p) + 1))
        return list(dict.fromkeys([*above, *(bucket.name for bucket in self.buckets)]))

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""
        return {n: shape for b in self.buckets for n, shape in zip(b.params, b.shapes, strict=True)}

    def after(self, name: str | None) -> PassEntry:
        """A pass by name; the last one for None. Raises PlanError."""
        if name is None:
            return self.passes[-1]
        for entry in self.passes:
            if entry.name == name:
                return entry
        raise PlanError(f"no pass {name!r}{suggestion(name, [p.name for p in self.passes])}")

    def _document(self) -> "Document":
        return self


def _of_layer(line: Line, layer: str, buckets: set[str]) -> bool:
    return line.bucket in buckets or within(line.module, layer)
