"""A plan's kernels as files: sources, and for GPUs what they compile to, with a report.

    emit(document.kernels, ["cpp", "sm_90"], Path("kernels"))

    kernels/cpp/update_adamw_f32_f32.cpp
    kernels/sm_90/update_adamw_f32_f32.py  .ptx  .cubin       of gfx942 .amdgcn  .hsaco
    kernels/report.txt                                        registers, stack, spills, shared memory, ..

The sources are the plan's own. They may come from a file, so they are compiled only if they are, comments
apart, what this zerograph generates.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from zerograph.codegen import aot
from zerograph.codegen.names import spec_of
from zerograph.codegen.of_plan import SOURCES
from zerograph.codegen.render import SUFFIX, render
from zerograph.codegen.spec import Spec
from zerograph.errors import KernelError, suggestion

TARGETS = (*SOURCES, *aot.TARGETS)
"""What kernels can be emitted for: sources alone, or a GPU."""
REPORT = "report.txt"


def emit(
    kernels: Mapping[str, str], targets: Sequence[str], folder: Path
) -> tuple[list[Path], list[aot.Figures]]:
    """Write `kernels` (sources by file name) for every target; answers the files and the report.

    Raises KernelError, before anything is written, for an unknown target, without Triton, or for kernels that
    this zerograph does not generate; and if a compiler fails.
    """
    targets = list(dict.fromkeys(targets))
    for target in targets:
        if target not in TARGETS:
            raise KernelError(f"no target {target!r}{suggestion(target, TARGETS)}")
    gpus = [target for target in targets if target in aot.TARGETS]
    by_name = _by_name(kernels, ".py")
    if gpus:
        _require_triton(gpus[0])
        _require_own(by_name)
    for target in targets:
        (folder / target).mkdir(parents=True, exist_ok=True)
        if target in SUFFIX:
            _write(_by_name(kernels, SUFFIX[target]), SUFFIX[target], folder / target)
    report = []
    if gpus:
        sources = {spec.name: source for spec, source in by_name.items()}
        report = aot.compile_all(list(by_name), gpus, folder, sources)
        (folder / REPORT).write_text(aot.table(report), encoding="utf-8")
    written = [path for target in targets for path in _files(folder / target, by_name)]
    return [*written, *([folder / REPORT] if gpus else [])], report


def _files(folder: Path, specs: Iterable[Spec]) -> list[Path]:
    """Those of these kernels, sorted; what else lies there is somebody else's."""
    names = {name for spec in specs for name in (spec.name, f"{spec.name}_total")}
    return sorted(path for path in folder.iterdir() if path.stem in names)


def _by_name(kernels: Mapping[str, str], suffix: str) -> dict[Spec, str]:
    names = {name.removesuffix(suffix): name for name in kernels if name.endswith(suffix)}
    return {spec_of(kernel): kernels[name] for kernel, name in names.items()}


def _write(sources: Mapping[Spec, str], suffix: str, folder: Path) -> None:
    for spec, source in sources.items():
        (folder / f"{spec.name}{suffix}").write_text(source, encoding="utf-8")


def _require_triton(target: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise KernelError(
            f"{target} is compiled by Triton, which is not installed: pip install triton (it needs no GPU); "
            "--target triton writes the sources without it"
        )


def _require_own(sources: Mapping[Spec, str]) -> None:
    for spec, source in sources.items():
        if _code(source) != _code(render(spec, "triton")):
            raise KernelError(
                f"the plan's {spec.name} is not what this version of zerograph generates, so it is not "
                "compiled; plan again, or give --target triton for the sources"
            )


def _code(source: str) -> list[str]:
    return [line for line in source.splitlines() if not line.startswith("#")]
