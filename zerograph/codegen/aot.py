"""Ahead-of-time compilation of Triton kernels for GPUs that are not there.

    report = compile_all(specs, ["sm_90", "gfx942"])
    print(table(report))

    kernel                        target   registers  stack  spills  shared  accesses
    update_adamw_bf16_f32_bf16    sm_90           38      0       0       0  ld128 x3, ld64 x1, ...

One process a target (compile_triton.py). Kernels are compiled for aligned shards: pointers and sizes are
multiples of 16, as the layout makes them.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zerograph.codegen.launch import Settings, settings
from zerograph.codegen.render import render
from zerograph.codegen.spec import CHUNK, LANES, SHORT, Finish, Norm, Spec, Update
from zerograph.errors import KernelError, suggestion

TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""By name, Triton's backend, architecture and lanes of a warp."""


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel uses."""

    kernel: str
    target: str
    registers: int
    stack: int
    """Bytes a thread."""
    spills: int
    shared: int
    """Bytes a block."""
    widths: tuple[tuple[str, int], ...]
    """Global accesses in the code by direction and bits, "ld128" or "st64", with their number."""
    triton: str
    """Triton's version."""

    def accesses(self, width: str) -> int:
        return dict(self.widths).get(width, 0)


def compile_all(
    specs: Sequence[Spec],
    targets: Sequence[str] = tuple(TARGETS),
    folder: Path | None = None,
    sources: Mapping[str, str] | None = None,
) -> list[Figures]:
    """Compile every kernel of `specs` for every target; with `folder`, write what they became to it.

    `sources` by name say what the kernels serve, else they are rendered here. Raises KernelError where a
    compiler fails.
    """
    sources = sources or {spec.name: render(spec, "triton") for spec in specs}
    found = []
    for target in targets:
        if target not in TARGETS:
            raise KernelError(f"no target {target!r}{suggestion(target, TARGETS)}")
        jobs = [job for spec in specs for job in jobs_of(spec, target, sources[spec.name])]
        own = str(folder / target) if folder else None
        found += [_figures(target, made) for made in _run(target, jobs, own)]
    return found


def _figures(target: str, made: dict[str, Any]) -> Figures:
    return Figures(
        kernel=made["function"],
        target=target,
        registers=made["registers"],
        stack=made["stack"],
        spills=made["spills"],
        shared=made["shared"],
        widths=tuple(sorted(made["widths"].items())),
        triton=made["triton"],
    )


def _run(target: str, jobs: list[dict[str, Any]], folder: str | None) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_triton.py")
    order = json.dumps({"target": TARGETS[target], "jobs": jobs, "folder": folder})
    command = [sys.executable, str(script)]
    done = subprocess.run(command, input=order, capture_output=True, text=True)
    if done.returncode:
        names = ", ".join(job["function"] for job in jobs)
        raise KernelError(
            f"Triton could not compile for {target} (one of {names}):\n{done.stderr[-4000:]}"
        )
    made: list[dict[str, Any]] = json.loads(done.stdout)
    return made


_POINTERS = {"f64": "*fp64", "f32": "*fp32", "bf16": "*bf16", "f16": "*fp16"}


def _pointer(dtype: torch.dtype) -> str:
    return _POINTERS[SHORT[dtype]]


def jobs_of(spec: Spec, target: str, source: str) -> list[dict[str, Any]]:
    """The kernels of one file, as compile_triton.py takes them."""
    shared = {"file": spec.name, "source": source}
    own = settings(spec.kind, target)
    made = [_job(spec, "", _signature(spec), _constants(spec, own), own)]
    total = settings("total", target)
    if isinstance(spec, Norm):
        signature = {"partials_ptr": "*fp64", "totals_ptr": "*fp64", "blocks": "i32"}
        made.append(_job(spec, "_total", signature, {"LANES": total.block}, total))
    if isinstance(spec, Update) and spec.phase == "measure":
        signature = {"bounds_ptr": "*i64", "sums_ptr": "*fp64", "totals_ptr": "*fp64"}
        made.append(_job(spec, "_total", signature, {"LANES": total.block}, total))
    return [job | shared for job in made]


def _job(
    spec: Spec, suffix: str, signature: dict[str, str], constants: dict[str, int], own: Settings
) -> dict[str, Any]:
    whole = [name for name, kind in signature.items() if kind.startswith("*") or name == "size"]
    return {
        "function": spec.name + suffix,
        "signature": signature,
        "constants": constants,
        "divisible": whole,
        "warps": own.warps,
    }


def _constants(spec: Spec, own: Settings) -> dict[str, int]:
    if isinstance(spec, Finish):
        return {}
    return {"CHUNK": CHUNK, "LANES": LANES} if isinstance(spec, Norm) else {"BLOCK": own.block}


def _signature(spec: Spec) -> dict[str, str]:
    """Types by parameter, in order, without constants."""
    if isinstance(spec, Update):
        return _update(spec)
    if isinstance(spec, Norm):
        sizes = {"size": "i32", "blocks": "i32", "first": "i32"}
        return {"grad_ptr": _pointer(spec.grad), "partials_ptr": "*fp64", **sizes}
    if isinstance(spec, Finish):
        divided = {"divided_ptr": _pointer(spec.divided)} if spec.divided else {}
        limit = {"limit_ptr": "*fp64"} if spec.clips else {}
        given = {"norm_ptr": "*fp64", "control_ptr": "*fp32", "world": "i32"}
        return {"partials_ptr": "*fp64", **divided, **limit, **given}
    ends = {"source_ptr": _pointer(spec.source), "scale_ptr": "*fp32"}
    return {**ends, "target_ptr": _pointer(spec.target), "size": "i32"}


def _update(spec: Update) -> dict[str, str]:
    master = _pointer(spec.master)
    control = {"control_ptr": "*fp32"} if spec.controlled else {}
    states = {f"{state}_ptr": master for state in spec.states}
    low = {"low_ptr": _pointer(spec.low)} if spec.low else {}
    grad = {"grad_ptr": _pointer(spec.grad)} if spec.phase != "apply" else {}
    between = {"measure": {"sums_ptr": "*fp64"}, "apply": {"norms_ptr": "*fp64"}}
    head = {"tiles_ptr": "*i64", "scalars_ptr": master, **control, **between.get(spec.phase, {})}
    return {**head, **grad, **states, **low, "param_ptr": master}


def table(report: Sequence[Figures]) -> str:
    """The report as aligned text, one kernel and target a line."""
    titles = ("kernel", "target", "registers", "stack", "spills", "shared", "accesses")
    rows: list[tuple[str, ...]] = [titles]
    for each in report:
        widths = ", ".join(f"{key} x{count}" for key, count in each.widths)
        numbers = (each.registers, each.stack, each.spills, each.shared)
        rows.append((each.kernel, each.target, *map(str, numbers), widths))
    wide = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        names = [row[i].ljust(wide[i]) for i in range(2)]
        numbers_ = [row[i].rjust(wide[i]) for i in range(2, 6)]
        lines.append("  ".join([*names, *numbers_, row[6]]).rstrip())
    return "\n".join(lines) + "\n"
