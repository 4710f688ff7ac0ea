"""C++ kernels: compiled once, kept on disk, loaded without torch's headers.

    library = load(source, "norm_bf16")       None where no compiler is there
    function(library, "norm_bf16")(..)        by ctypes

A library's name holds a hash of the code without comments, the flags, the compiler and the CPU, so what a
cache has is right for this machine and a changed comment compiles nothing. Ranks may compile the same
kernel at once: each writes a file of its own and renames it. The cache is $ZEROGRAPH_CACHE, else
~/.cache/zerograph/kernels. Contraction is off, so that every target gives the same bits.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from zerograph.errors import KernelError, KernelWarning

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_COMMENT = re.compile(r"//[^\n]*")


@cache
def load(source: str, name: str) -> ctypes.CDLL | None:
    """The library of `source`, compiled at need; None, with one warning, without a compiler.

    Raises KernelError with the compiler's message and the file if it refuses the source.
    """
    compiler = _compiler()
    return None if compiler is None else _library(source, name, compiler)


def function(library: ctypes.CDLL, name: str) -> Any:
    """A function of a library, which answers nothing."""
    found = library[name]
    found.restype = None
    return found


def available() -> bool:
    """Whether there is a compiler; warns once if not."""
    return _compiler() is not None


@cache
def _compiler() -> str | None:
    named = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = next(filter(None, map(shutil.which, named)), None)
    if found is None:
        warnings.warn(
            f"no C++ compiler ({', '.join(named)}) was found, so optimizer updates on the CPU run as plain "
            "torch operations, several times slower; install g++, or set CXX",
            KernelWarning,
            stacklevel=2,
        )
    return found


def _library(source: str, name: str, compiler: str) -> ctypes.CDLL:
    path = folder() / f"{name}-{_key(source, compiler)}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut short, or of another system: made anew
            pass
    _compile(source, path, compiler)
    return ctypes.CDLL(str(path))


def _compile(source: str, path: Path, compiler: str) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as own:
        made = Path(own, path.name)
        code = path.with_suffix(".cpp")
        Path(own, code.name).write_text(source)
        os.replace(Path(own, code.name), code)
        command = [compiler, *FLAGS, "-o", str(made), str(code)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KernelError(
                f"the C++ compiler refused {code}:\n{done.stderr.strip()}\n"
                f"the command was: {' '.join(command)}\n"
                "set CXX to another compiler, or ZEROGRAPH_KERNELS=torch to do without"
            )
        os.replace(made, path)


@cache
def _fallback_cache() -> Path:
    return Path(tempfile.mkdtemp(prefix="zerograph-kernels-"))


def place() -> Path:
    """Where compiled kernels belong; it may be missing, or not ours to write."""
    given = os.environ.get("ZEROGRAPH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "zerograph" / "kernels"


def folder() -> Path:
    """The folder of compiled kernels; one of this process alone where that cannot be written."""
    path = place()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _fallback_cache()
    return path if os.access(path, os.W_OK) else _fallback_cache()


def _key(source: str, compiler: str) -> str:
    code = "\n".join(filter(None, (_COMMENT.sub("", x).rstrip() for x in source.splitlines())))
    parts = (code, " ".join(FLAGS), _version(compiler), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


@cache
def _cpu() -> str:
    """What -march=native depends on."""
    found = []
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        wanted = ("model name", "flags", "Features", "CPU part", "cpu family", "model\t")
        found = [line for line in lines if line.startswith(wanted)]
    except OSError:
        pass
    return "\n".join([platform.machine(), platform.processor(), *found])
