"""Generated files: a kernel as complete, readable source, from a template of its kind.

    render(Update("adamw", frozenset(), bf16, fp32, bf16), "cpp")

begins with what the kernel is, whom it serves and the bytes that it moves, then the code:

    // update_adamw_bf16_f32_bf16
    //   decoupled weight decay, arXiv:1711.05101 algorithm 2
    //   one pass over a slice, storing its bf16 copy
    // serves   elements  bucket
    //             4,096  b0 model.embed_tokens
    //             5,152  b1 model.layers.0
    // moves    28 bytes an element

The text depends on the arguments alone, to the byte. Targets are "triton" and "cpp", and of an update
also "torch" (where no compiler is there) and "numpy" (float64, for tests). Templates lay code out;
what a rule does is in rules/, how an operation is written in expr.py.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2
import torch

from zerograph.codegen.expr import printer
from zerograph.codegen.spec import CHUNK, LANES, RUN_ALIGN, SHORT, Copy, Finish, Norm, Spec, Update

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("zerograph.codegen"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)

SUFFIX = {"triton": ".py", "cpp": ".cpp", "torch": ".py", "numpy": ".py"}

_LOCALS = {
    *("threads", "tiles", "tile", "start", "stop", "size", "row", "lane", "inside", "factor", "i"),
    *("real", "tl", "torch", "np", "run", "of_param", "of_change"),
}
"""What templates name themselves."""


@cache
def render(spec: Spec, target: str, serves: tuple[tuple[str, int], ...] = ()) -> str:
    """The source of `spec` for `target`; `serves` names buckets with their elements on a rank."""
    kind = "copy" if isinstance(spec, Copy) else spec.kind
    layout = "array" if target in ("torch", "numpy") else target
    template = _templates.get_template(f"{kind}.{layout}.jinja")
    return template.render(
        name=spec.name, header=_header(spec, target, serves), target=target, **_values(spec, target)
    )


def _header(spec: Spec, target: str, serves: Sequence[tuple[str, int]]) -> list[str]:
    lines = [spec.name, *(f"  {line}" for line in _what(spec))]
    if serves:
        lines.append("serves   elements  bucket")
        lines += [f"  {count:15,}  {bucket}" for bucket, count in serves]
    unit = "a rank" if isinstance(spec, Finish) else "an element"
    lines.append(f"moves    {spec.nbytes} bytes {unit}")
    if target in ("triton", "cpp"):
        lines.append("compile  without contracting a * b + c: each operation rounds once")
    return lines


def _what(spec: Spec) -> list[str]:
    if isinstance(spec, Update):
        flags = f"with {', '.join(sorted(spec.flags))}; " if spec.flags else ""
        low = f", storing its {SHORT[spec.low]} copy" if spec.low else ""
        what = {
            "whole": f"one pass over a slice{low}",
            "measure": "the first of two passes: states, and the norms of parameters and changes",
            "apply": f"the second of two passes: parameters{low}",
        }
        return [spec.described.source, flags + what[spec.phase]]
    if isinstance(spec, Norm):
        return [
            "sums of squares of the equal slices of a gradient, without atomics:",
            f"float64 sums, in order, of fp32 sums of {CHUNK // LANES}",
        ]
    if isinstance(spec, Finish):
        return ["the global norm, the factor of gradients, and whether the update applies"]
    where = "into its place in a bucket" if spec.kind == "pack" else "out of a bucket"
    how = "cast, then scaled" if spec.rounds_first else "cast and scaled"
    return [f"a contiguous tensor {where}, {how}"]


def _values(spec: Spec, target: str) -> dict[str, Any]:
    if isinstance(spec, Update):
        return _update(spec, target)
    if isinstance(spec, Norm):
        return {"grad": SHORT[spec.grad], "chunk": CHUNK, "lanes": LANES}
    if isinstance(spec, Finish):
        return {"clips": spec.clips, "divided": _short(spec.divided), "skips": spec.skips}
    return {
        "taken": SHORT[spec.source],
        "given": SHORT[spec.target],
        "rounds_first": spec.rounds_first,
        "real": "f64" if spec.double else "f32",
    }


def _update(spec: Update, target: str) -> dict[str, Any]:
    write = printer(target, spec.double)
    used = {*spec.described.scalars, *spec.states, *(name for name, _ in spec.assignments())}
    taken = _LOCALS & used
    assert not taken, f"{spec.rule} has names that templates use: {taken}"
    known = {"param", "grad", *spec.states}
    lines: list[dict[str, Any]] = []
    for name, expr in spec.assignments():
        lines.append({"name": name, "text": write(expr), "first": name not in known})
        known.add(name)
    return {
        "states": spec.states,
        "stored": spec.stored,
        "phase": spec.phase,
        "width": 3 if spec.phase == "whole" else 4,
        "scalars": spec.scalars(),
        "all_scalars": spec.described.scalars,
        "columns": len(spec.described.scalars),
        "grad": SHORT[spec.grad],
        "master": SHORT[spec.master],
        "low": _short(spec.low) if "param" in spec.stored else "",
        "controlled": spec.controlled,
        "lines": lines,
        "uses_maximum": any("larger(" in x["text"] or "smaller(" in x["text"] for x in lines),
        "align": RUN_ALIGN,
    }


def _short(dtype: torch.dtype | None) -> str:
    return SHORT[dtype] if dtype else ""
