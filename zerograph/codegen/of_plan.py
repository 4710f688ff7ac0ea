"""Which kernels a planned graph launches, and what each of them serves.

    zero.put %b0.grad, %8 "w"                            pack_f32_f32 (packing.py)  b0
    %part = zero.norm_partials [%b0.mean, %b1.mean]      norm_f32                   b0, b1
    %finish = zero.finish %part, max_norm=1.0            finish_clip
    zero.update %b0.shard, %b0.mean, ..                  update_adamw_f32_f32       b0
    zero.update %b1.shard, %b1.mean, ..                  update_adamw_f32_f32       b1

Dtypes come from the nodes, flags from the optimizer's parameter groups. Nothing here knows a rank: where the
groups of a bucket need several kernels, a rank whose slice holds parameters of one alone launches one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import fx

from zerograph import ops
from zerograph.codegen.packing import kernel_of
from zerograph.codegen.render import SUFFIX, render
from zerograph.codegen.rules import Described, Flags, Kind
from zerograph.codegen.spec import Finish, Norm, Spec, Update
from zerograph.ir import TrainGraph
from zerograph.nodes import bucket_of, is_call

Source = Literal["cpp", "triton"]
SOURCES: tuple[Source, ...] = ("cpp", "triton")
"""Targets of which a plan shows the sources."""

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Used:
    """A kernel that a plan uses."""

    spec: Spec
    serves: tuple[tuple[str, int], ...]
    """(bucket and block, elements on a rank), in the order of launches; empty for the finish."""

    def source(self, target: Source) -> str:
        """The complete file, with what it serves in its header."""
        return render(self.spec, target, self.serves)


def kernels_of(graph: TrainGraph, rule: Kind | None, groups: Groups) -> tuple[Used, ...]:
    """Every kernel of the graph, in the order of its first launch."""
    served: dict[Spec, list[tuple[str, int]]] = {}
    for spec, serves in _launches(graph, rule, groups):
        served.setdefault(spec, []).extend(serves)
    return tuple(Used(spec, tuple(serves)) for spec, serves in served.items())


def target_for(graph: TrainGraph) -> Source:
    """The target whose kernels run on the device that the graph is planned for."""
    return "triton" if graph.device.type == "cuda" else "cpp"


def files(kernels: Sequence[Used]) -> dict[str, str]:
    """The sources for all targets by file name: update_adamw_f32_f32.cpp, update_adamw_f32_f32.py."""
    return {f"{k.spec.name}{SUFFIX[t]}": k.source(t) for k in kernels for t in SOURCES}


Launch = tuple[Spec, list[tuple[str, int]]]


def _packs(graph: TrainGraph) -> Iterator[Launch]:
    """Of the backward: gradients that are scaled on their way into a buffer, summed by bucket."""
    found: dict[tuple[Spec, str], int] = {}
    for node in graph.nodes("backward"):
        spec = kernel_of(node) if is_call(node, ops.put) else None
        if spec is not None:
            key, numel = (spec, bucket_of(node)), node.args[1].meta["val"].numel()  # type: ignore[union-attr]
            found[key] = found.get(key, 0) + numel
    for (kernel, bucket), numel in found.items():
        yield kernel, [(_called(graph, bucket), numel)]


def _launches(graph: TrainGraph, rule: Kind | None, groups: Groups) -> Iterator[Launch]:
    yield from _packs(graph)
    updates = [node for node in graph.nodes() if is_call(node, ops.update)]
    gradient_of = {node.args[1]: cast(str, node.args[7]) for node in updates}
    for node in graph.nodes():
        if is_call(node, ops.norm_partials, ops.squares):
            given = node.args[0] if is_call(node, ops.norm_partials) else [node.args[0]]
            for grad in cast(list[fx.Node], given):
                value = grad.meta["val"]
                serves = [(_called(graph, gradient_of[grad]), value.numel())]
                yield Norm(value.dtype), serves
        elif is_call(node, ops.finish):
            _, divided, max_norm, skips = cast(tuple[Any, ...], node.args)
            dtype = divided.meta["val"].dtype if divided is not None else None
            yield Finish(max_norm > 0, dtype, skips), []
        elif is_call(node, ops.update) and isinstance(rule, Described):
            yield from _updates(graph, node, rule, groups)


def _updates(graph: TrainGraph, node: fx.Node, rule: Described, groups: Groups) -> Iterator[Launch]:
    """The launches of one `zero.update`: one for each set of flags of its bucket's groups, or two."""
    args = cast(tuple[Any, ...], node.args)
    (master, grad, _, low), control, bucket = args[:4], args[6], cast(str, args[7])
    master, grad = master.meta["val"], grad.meta["val"]
    last = low.meta["val"].dtype if low is not None else None
    for flags, part in _variants(graph, bucket, lambda index: rule.flags(groups[index])):
        serves = [(_called(graph, bucket), -(-part * master.numel() // _numel(graph, bucket)))]
        free = control is not None
        if rule.apply is None:
            yield Update(rule.name, flags, grad.dtype, master.dtype, last, free), serves
            continue
        yield Update(rule.name, flags, grad.dtype, master.dtype, None, free, "measure"), serves
        yield Update(rule.name, flags, master.dtype, master.dtype, last, free, "apply"), serves


def _variants(
    graph: TrainGraph, bucket: str, flags_of: Callable[[int], Flags]
) -> Iterator[tuple[Flags, int]]:
    """Each set of flags, with the elements of the whole bucket that have it."""
    numels: dict[Flags, int] = {}
    for param, start, stop in graph.layout.extents(bucket):
        flags = flags_of(param.group)
        numels[flags] = numels.get(flags, 0) + stop - start
    yield from numels.items()


def _numel(graph: TrainGraph, bucket: str) -> int:
    return graph.layout.buckets[bucket].numel


def _called(graph: TrainGraph, bucket: str) -> str:
    """ "b1 model.layers.0"; a bucket of the root has no block."""
    return f"{bucket} {graph.layout.buckets[bucket].block}".rstrip()
