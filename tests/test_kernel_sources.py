"""Sources of kernels: goldens, what changes a library, which target runs, and what an import loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import BF16, F32, needs_triton
from zerograph.codegen import cpp, targets
from zerograph.codegen.render import render
from zerograph.codegen.spec import Copy, Finish, Norm, Spec, Update
from zerograph.errors import KernelError
from zerograph.golden import GraphGolden

SHOWN: list[Spec] = [
    Update("adamw", frozenset(), BF16, F32, BF16),
    Norm(BF16),
    Finish(True, F32, True),
    Copy("pack", F32, BF16),
]


@pytest.mark.parametrize("target", ["triton", "cpp"])
@pytest.mark.parametrize("spec", SHOWN, ids=lambda spec: spec.name)
def test_sources(spec: Spec, target: str, graph_golden: GraphGolden) -> None:
    serves = (("b0  model.embed_tokens", 4096), ("b1  model.layers.0", 5152))
    graph_golden(render(spec, target, serves), f"kernels/{spec.name}.{target}")


def test_a_comment_changes_no_library() -> None:
    spec = SHOWN[0]
    first, second = render(spec, "cpp"), render(spec, "cpp", (("b0", 64),))
    assert first != second
    assert cpp._key(first, sys.executable) == cpp._key(second, sys.executable)
    changed = first.replace("param * keep", "param")
    assert cpp._key(first, sys.executable) != cpp._key(changed, sys.executable)


def test_the_target_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROGRAPH_KERNELS", "torch")
    assert targets.target_of(torch.device("cpu")) == "torch"
    monkeypatch.setenv("ZEROGRAPH_KERNELS", "fortran")
    with pytest.raises(KernelError, match="torch, cpp or triton"):
        targets.target_of(torch.device("cpu"))


@needs_triton
def test_importing_kernels_imports_no_triton() -> None:
    code = "import sys, torch; had = 'triton' in sys.modules\n"
    code += "import zerograph.codegen.dispatch, zerograph.codegen.aot\n"
    code += "sys.exit('triton' in sys.modules and not had)"
    command, folder = [sys.executable, "-c", code], Path(__file__).parents[1]
    assert subprocess.run(command, cwd=folder, timeout=120).returncode == 0
