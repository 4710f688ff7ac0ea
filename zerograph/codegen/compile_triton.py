"""Compile Triton kernels for one target, in a process of its own: jobs as JSON in, figures as JSON out.

Run by aot.py as a script, so it imports neither zerograph nor torch. The AMD compiler may end the process
that it runs in, and a target's state must not meet another's.
"""

import json
import linecache
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    # This file's folder is first in the path of modules; none of its files may shadow one.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    os.environ.pop("TRITON_INTERPRET", None)
    order = json.load(sys.stdin)
    made = [_compiled(job, order["target"], order["folder"]) for job in order["jobs"]]
    json.dump(made, sys.stdout)


def _compiled(job: dict[str, Any], target: list[Any], folder: str | None) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file = f"<zerograph kernel {job['function']}>"
    linecache.cache[file] = (
        len(job["source"]),
        None,
        job["source"].splitlines(keepends=True),
        file,
    )
    names: dict[str, Any] = {"__name__": "zerograph.generated"}
    exec(compile(job["source"], file, "exec"), names)
    function = names[job["function"]]
    places = {name: index for index, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature={**job["signature"], **dict.fromkeys(job["constants"], "constexpr")},
        constexprs={(places[name],): value for name, value in job["constants"].items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in job["divisible"]},
    )
    options = {"num_warps": job["warps"], "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget(*target), options=options)
    figures = _cuda(made) if target[0] == "cuda" else _hip(made)
    if folder:
        _write(made, Path(folder), job)
    shared = {"function": job["function"], "shared": made.metadata.shared}
    return {**shared, **figures, "triton": triton.__version__}


def _write(made: Any, folder: Path, job: dict[str, Any]) -> None:
    """The source, and what is loaded on the GPU with its assembly."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job['file']}.py").write_text(job["source"])
    for kind in ("ptx", "cubin", "amdgcn", "hsaco"):
        if kind in made.asm:
            text = made.asm[kind]
            data = text if isinstance(text, bytes) else text.encode()
            (folder / f"{job['function']}.{kind}").write_bytes(data)


def _cuda(made: Any) -> dict[str, Any]:
    """From cuobjdump, which comes with Triton, and the PTX."""
    import tempfile

    import triton.backends.nvidia as backend

    tool = Path(backend.__file__ or backend.__path__[0]).parent / "bin" / "cuobjdump"
    if not tool.exists():
        tool = Path(next(iter(backend.__path__))) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    widths: dict[str, int] = {}
    access = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\b")
    for kind, count, bits in access.findall(made.asm["ptx"]):
        key = f"{kind}{int(count or 1) * int(bits)}"
        widths[key] = widths.get(key, 0) + 1
    stack = usage["STACK"] + usage["LOCAL"]
    return {"registers": usage["REG"], "stack": stack, "spills": stack, "widths": widths}


def _hip(made: Any) -> dict[str, Any]:
    """From the assembly's metadata and instructions."""
    text = made.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s", text)}
    widths: dict[str, int] = {}
    access = re.compile(r"\b(?:global|buffer)_(load|store)_(dwordx?\d?|ushort|short|b\d+)\b")
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "ushort": 16, "short": 16}
    for kind, size in access.findall(text):
        key = f"{'ld' if kind == 'load' else 'st'}{bits.get(size) or int(size[1:])}"
        widths[key] = widths.get(key, 0) + 1
    return {
        "registers": found["vgpr_count"],
        "stack": found["private_segment_fixed_size"],
        "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"],
        "widths": widths,
    }


if __name__ == "__main__":
    main()
