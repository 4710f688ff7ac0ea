"""Kernels compiled ahead of time, for GPUs that are not here: registers, spills, widths of accesses."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kernels import BF16, F16, F32, F64, PAIRS, needs_triton
from tests.updates import CASES
from zerograph.codegen import aot
from zerograph.codegen.rules import RULES
from zerograph.codegen.spec import Copy, Finish, Norm, Spec, Update
from zerograph.errors import KernelError

ADAMW = Update("adamw", frozenset(), BF16, F32, BF16)
COMPILED: Sequence[Spec] = [
    *(
        Update(c.rule, RULES[c.rule].flags(c.full), grad, F32, low)
        for c in CASES
        for grad, low in ((BF16, BF16), (F32, None))
    ),
    Update("adamw", frozenset(), F16, F32, F16),
    Update("adamw", frozenset(), F32, F32, None, False),
    Update("adamw", frozenset(), F64, F64),
    Update("lamb", frozenset(), BF16, F32, None, True, "measure"),
    Update("lamb", frozenset(), F32, F32, BF16, True, "apply"),
    *(Norm(dtype) for dtype in (F32, BF16, F16, F64)),
    *(Finish(c, d, s) for c in (False, True) for d in (None, F32, F64) for s in (False, True)),
    *(Copy("pack", *pair) for pair in PAIRS),
    *(Copy("unpack", *pair) for pair in PAIRS),
]


@needs_triton
@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_for_gpus_that_are_not_here(
    target: str, request: pytest.FixtureRequest
) -> None:
    """No spills, 128-bit accesses of fp32; registers and widths as figures/triton-<version> says."""
    report = aot.compile_all(COMPILED, [target])
    assert len(report) == len(COMPILED) + 5
    assert not [each for each in report if each.spills or each.stack]
    found = {each.kernel: each for each in report}
    for spec in COMPILED:
        if isinstance(spec, Update) and spec.master == F32:
            own, grad = found[spec.name], spec.grad == F32 and spec.phase != "apply"
            assert own.accesses("st128") == len(spec.stored), own
            assert own.accesses("ld128") == 1 + len(spec.states) + grad, own
    minor = ".".join(report[0].triton.split(".")[:2])
    path = Path(__file__).parent / "figures" / f"triton-{minor}.{target}.txt"
    if request.config.getoption("accept_graphs"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(aot.table(report))
    if not path.exists():
        pytest.skip(f"no figures of triton {minor}; --accept-graphs writes them")
    assert aot.table(report) == path.read_text()


@needs_triton
def test_emitting_writes_what_a_gpu_loads(tmp_path: Path) -> None:
    aot.compile_all([ADAMW], ["sm_90"], tmp_path)
    names = {path.suffix for path in (tmp_path / "sm_90").iterdir()}
    assert names == {".py", ".ptx", ".cubin"}


def test_unknown_targets_are_named() -> None:
    with pytest.raises(KernelError, match="did you mean 'sm_90'"):
        aot.compile_all([ADAMW], ["sm_9"])
