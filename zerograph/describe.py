"""Describe: a planned graph as a Document."""

from collections.abc import Iterator, Mapping, Sequence

from zerograph import cost
from zerograph.config import ZeroConfig
from zerograph.cost import CATEGORIES, Cluster
from zerograph.document import (
    BucketEntry,
    Document,
    HeldEntry,
    MemoryEntry,
    NodeEntry,
    PassEntry,
    TimeEntry,
    TrafficEntry,
)
from zerograph.ir import TrainGraph
from zerograph.nodes import bucket_of, module_of, region_of
from zerograph.pipeline import History
from zerograph.precision import short
from zerograph.text import Line


def describe(
    graph: TrainGraph,
    history: History,
    config: ZeroConfig,
    memory: cost.Memory,
    signature: Sequence[str],
    cluster: Cluster,
    kernels: Mapping[str, str],
) -> Document:
    """The document of a planned graph, with times on `cluster`; `kernels` are sources by file name."""
    table = _Lines()
    passes = tuple(
        PassEntry(name=r.name, did=r.did, full=table(full), skeleton=table(skeleton))
        for r, (full, skeleton) in zip(history.records, history.forms, strict=True)
    )
    timeline = cost.timeline_of(graph, cluster)
    return Document(
        model=graph.model,
        stage=graph.stage,
        world=graph.world,
        mesh="".join(graph.mesh.lines()),
        precision=graph.precision.describe(),
        config=config.model_dump(mode="json", exclude_unset=True),
        buckets=tuple(
            BucketEntry(
                name=b.name,
                block=b.block,
                dtype=short(b.dtype),
                trainable=b.trainable,
                params=b.params,
                shapes=tuple(graph.layout.params[name].shape for name in b.params),
                numel=b.numel,
                shard_numel=b.shard_numel,
            )
            for b in graph.layout.buckets.values()
        ),
        traffic={
            name: TrafficEntry(count=t.count, nbytes=t.nbytes)
            for name, t in cost.traffic_of(graph).items()
        },
        memory=_memory(memory),
        time=TimeEntry(
            cluster=cluster.name,
            step=timeline.seconds,
            compute=timeline.busy["compute"],
            communication=timeline.busy["communication"],
            waited=timeline.waited,
        ),
        advisory=config.advisory(graph.mesh.model),
        signature=tuple(signature),
        kernels=dict(kernels),
        passes=passes,
        nodes=tuple(_nodes(graph, memory, timeline)),
        lines=tuple(table.found),
    )


def _memory(memory: cost.Memory) -> MemoryEntry:
    moment = memory.peak_moment
    return MemoryEntry(
        categories=CATEGORIES,
        parameters=memory.parameters,
        gradients=memory.gradients,
        optimizer=memory.optimizer,
        buffers=memory.buffers,
        gathered=memory.gathered,
        saved=memory.saved,
        host=memory.host,
        peak=memory.peak,
        padding=memory.padding,
        peak_node=-1 if moment is None else moment.node,
        at_peak=tuple(
            HeldEntry(owner=h.owner, category=h.category, bytes=h.bytes) for h in memory.at_peak
        ),
        kept_at_peak=memory.kept_at_peak,
        host_at_peak=memory.host_at_peak,
    )


def _nodes(graph: TrainGraph, memory: cost.Memory, timeline: cost.Timeline) -> Iterator[NodeEntry]:
    spans = {span.node: span for span in timeline.spans}
    alive = {moment.node: moment.bytes for moment in memory.series}
    for index, node in enumerate(graph.nodes()):
        span, work = spans.get(index), cost.work_of(node)
        yield NodeEntry(
            op=cost.op_of(node),
            region=region_of(node),
            module=module_of(node),
            bucket=bucket_of(node),
            nbytes=cost.moved_bytes(node),
            flops=work.flops,
            moved=work.nbytes,
            stream=span.stream if span else "",
            start=span.start if span else 0.0,
            seconds=span.seconds if span else 0.0,
            alive=alive[index],
        )


class _Lines:
    """Distinct lines in the order in which they first appear."""

    def __init__(self) -> None:
        self.found: dict[Line, int] = {}

    def __call__(self, lines: tuple[Line, ...]) -> tuple[int, ...]:
        return tuple(self.found.setdefault(line, len(self.found)) for line in lines)
