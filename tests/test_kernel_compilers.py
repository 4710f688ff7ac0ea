"""C++ kernels: what is compiled once and kept, threads, sources that are refused, no compiler at all."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels import BF16, F64, Targets, needs_cpp, values
from tests.updates import CASES, Problem, differences
from zerograph.codegen import cpp, dispatch, targets, updates
from zerograph.codegen.rules import Run
from zerograph.codegen.spec import CHUNK
from zerograph.errors import KernelError, KernelWarning


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("ZEROGRAPH_CACHE", str(tmp_path / "cache"))
    cpp.load.cache_clear()
    cpp._compiler.cache_clear()
    yield tmp_path / "cache"
    cpp.load.cache_clear()
    cpp._compiler.cache_clear()


SMALL = 'extern "C" void small(double* x) { *x = 4.0; }\n'


@needs_cpp
def test_a_library_is_kept_and_mended(fresh: Path) -> None:
    assert cpp.load(SMALL, "small") is not None
    (library,) = fresh.glob("*.so")
    (source,) = fresh.glob("*.cpp")
    assert source.read_text() == SMALL and not list(fresh.glob(".making*"))
    made = library.stat().st_mtime_ns
    cpp.load.cache_clear()
    assert cpp.load(SMALL, "small") is not None and library.stat().st_mtime_ns == made
    other = SMALL.replace("4.0", "5.0")
    cut = fresh / f"small-{cpp._key(other, cpp._compiler() or '')}.so"
    cut.write_bytes(library.read_bytes()[:100])
    loaded = cpp.load(other, "small")
    value = torch.zeros(1, dtype=F64)
    assert loaded is not None
    targets.call(cpp.function(loaded, "small"), value)
    assert value == 5


@needs_cpp
def test_ranks_may_compile_the_same_kernel_at_once(fresh: Path) -> None:
    code = f"from zerograph.codegen import cpp; assert cpp.load({SMALL!r}, 'small') is not None"
    command, folder = [sys.executable, "-c", code], Path(__file__).parents[1]
    ranks = [subprocess.Popen(command, cwd=folder) for _ in range(3)]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    assert len(list(fresh.iterdir())) == 2


@needs_cpp
def test_threads_change_no_bit(call: Targets) -> None:
    problem = Problem(CASES[0], 5 * updates.CPU_TILE + 16, 2, BF16, BF16)
    grad, out = values(9 * CHUNK + 16, BF16), torch.empty(9 * CHUNK + 16)
    own, total = problem.run(call, "cpp"), call("cpp", "norm_partials", [grad], 2)
    torch.set_num_threads(3)
    try:
        assert not differences(own, problem.run(call, "cpp"))
        assert torch.equal(total, call("cpp", "norm_partials", [grad], 2))
        call("cpp", "unpack", grad, 0, out)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(out, grad.float())


@needs_cpp
def test_a_refused_source_is_an_error(fresh: Path) -> None:
    with pytest.raises(KernelError, match=r"refused .*small-\w+\.cpp[\s\S]*error"):
        cpp.load(SMALL.replace("4.0", "four"), "small")
    assert not list(fresh.glob("*.so"))


def test_without_a_compiler_torch_runs_with_one_warning(
    fresh: Path, call: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    problem = Problem(CASES[0], 100, 2)
    own = problem.slice()
    args = ([problem.case.full], [Run(0, 100, 0, 1)], own.master, problem.grads[0], own.states)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            dispatch.update(problem.case.described, *args, None, None)
    assert [w.category for w in said] == [KernelWarning]
    assert "install g++" in str(said[0].message)
    assert not torch.equal(own.master, problem.first)
