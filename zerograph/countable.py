"""What a test asks of a plan: how many calls, how many bytes, what peak, and that there is none.

    plan.count("gather", region="backward", layer="model.layers.0")
    plan.bytes("reduce_scatter")
    plan.peak
    plan.assert_no("gather", region="step")

`Plan` and `Document` answer alike. A name that the plan cannot know is an error, never a zero, so that
a typo passes no test.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch._ops import OpOverload

from zerograph import ops
from zerograph.config.problems import nearest
from zerograph.errors import PlanError
from zerograph.nodes import REGIONS
from zerograph.text import Line
from zerograph.units import size

if TYPE_CHECKING:
    from zerograph.document import BucketEntry, Document, NodeEntry

OPERATORS = tuple(
    value._schema.name.partition("::")[2]
    for value in vars(ops).values()
    if isinstance(value, OpOverload)
)
"""Names of the zero.* operators, without `zero.`."""


class Countable:
    """Questions about the final graph of a plan.

    `op` is a zero.* operator ("gather", or "zero.gather"), or another with its namespace ("aten.mm").
    `region` is "forward", "backward" or "step", `bucket` a bucket's name, `layer` the FQN of a module: to it
    belong the calls of the module and of its submodules, and those on a bucket that holds one of their
    parameters. All raise PlanError for a name that does not exist.
    """

    def _document(self) -> "Document":
        raise NotImplementedError

    def count(
        self,
        op: str,
        *,
        region: str | None = None,
        bucket: str | None = None,
        layer: str | None = None,
    ) -> int:
        """The number of calls of `op`."""
        return sum(1 for _ in _found(self._document(), op, region, bucket, layer))

    def bytes(
        self,
        op: str,
        *,
        region: str | None = None,
        bucket: str | None = None,
        layer: str | None = None,
    ) -> int:
        """Bytes of the values of all calls of `op` on one rank; of a collective, of its full buffer."""
        found = _found(self._document(), op, region, bucket, layer)
        return sum(node.nbytes for node, _ in found)

    @property
    def peak(self) -> int:
        """Predicted peak of memory on one rank, in bytes."""
        return self._document().memory.peak

    def assert_no(
        self,
        op: str,
        *,
        region: str | None = None,
        bucket: str | None = None,
        layer: str | None = None,
    ) -> None:
        """Raise AssertionError, with the lines of the text, if there is a call of `op`."""
        found = list(_found(self._document(), op, region, bucket, layer))
        if not found:
            return
        where = {"region": region, "bucket": bucket, "layer": layer}
        given = "".join(f", {key} {value}" for key, value in where.items() if value is not None)
        total = size(sum(node.nbytes for node, _ in found))
        head = f"there is to be no {op}{given}; found {len(found)} ({total}):"
        raise AssertionError("\n".join([head, *(line for _, line in found)]))


def _found(
    document: "Document", op: str, region: str | None, bucket: str | None, layer: str | None
) -> "Iterator[tuple[NodeEntry, str]]":
    """The calls that are asked for, each with its numbered line."""
    name = _operator(document, op)
    _check("region", region, REGIONS)
    _check("bucket", bucket, [b.name for b in document.buckets])
    _check("layer", layer, _layers(document))
    of_layer = {b.name for b in document.buckets if layer is not None and holds(b, layer)}
    for node, line in _calls(document):
        if (
            node.op == name
            and region in (None, node.region)
            and bucket in (None, node.bucket)
            and (layer is None or within(node.module, layer) or node.bucket in of_layer)
        ):
            yield node, line


def _calls(document: "Document") -> "Iterator[tuple[NodeEntry, str]]":
    """Each call with its line of the full text, `  12  zero.wait %b0`."""
    numbered = enumerate(document.select(), start=1)
    lines = [f"{number:>6}{line.text}" for number, line in numbered if _is_call(line)]
    nodes = sorted(document.nodes, key=lambda node: REGIONS.index(node.region))
    return zip(nodes, lines, strict=True)


def _is_call(line: Line) -> bool:
    return bool(line.region) and line.text.startswith(("  %", "  zero."))


def _operator(document: "Document", op: str) -> str:
    """The full name of an operator. Raises PlanError for one that does not exist."""
    if op in OPERATORS:
        return f"zero.{op}"
    present = {node.op for node in document.nodes}
    if op not in present and op.removeprefix("zero.") not in OPERATORS and not _in_torch(op):
        if _in_torch(f"aten.{op}"):
            raise PlanError(f"no operator {op!r}; did you mean 'aten.{op}'?")
        _check("operator", op, [*OPERATORS, *present])
    return op


def _in_torch(op: str) -> bool:
    namespace, _, name = op.partition(".")
    return hasattr(getattr(torch.ops, namespace), name) if name else False


def _layers(document: "Document") -> set[str]:
    """Every module that a call or a parameter is of, and the modules around them."""
    params = (name.rpartition(".")[0] for bucket in document.buckets for name in bucket.params)
    found = {*params, *(node.module for node in document.nodes)}
    parts = [name.split(".") for name in found if name and " " not in name]
    return {".".join(names[:end]) for names in parts for end in range(1, len(names) + 1)}


def holds(bucket: "BucketEntry", layer: str) -> bool:
    """Whether a parameter of the module named `layer` lies in `bucket`."""
    return any(within(name, layer) for name in bucket.params)


def within(name: str, layer: str) -> bool:
    """Whether `name` is the module `layer` or something in it."""
    return name == layer or name.startswith(f"{layer}.")


def _check(what: str, given: str | None, known: Iterable[str]) -> None:
    names = sorted(known)
    if given is None or given in names:
        return
    near = nearest(given, names)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    hint = f"did you mean {near!r}?" if near else f"there are {listed or 'none'}"
    raise PlanError(f"no {what} {given!r}; {hint}")
