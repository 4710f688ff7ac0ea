"""Ranks that would run other kernels, or launch them otherwise, are refused when they compile."""

import json
import os
from pathlib import Path

import pytest
import torch

import zerograph
from tests import tiny
from tests.ranks import run_ranks
from zerograph.codegen.targets import choices
from zerograph.errors import AgreementError, KernelError


def _compiled(rank: int, world: int, variables: list[dict[str, str]]) -> str:
    """The error of an engine, with each rank's own variables; empty without one."""
    os.environ.update(variables[rank])
    try:
        zerograph.compile(tiny.Blocks(), tiny.config(0))
    except (AgreementError, KernelError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def table(folder: Path, block: int) -> dict[str, str]:
    """Variables with which kernels are Triton's, and norms are totalled by `block`."""
    path = folder / f"{block}.json"
    path.write_text(json.dumps({"total": {"default": {"block": block, "warps": 4}}}))
    return {"ZEROGRAPH_KERNELS": "triton", "ZEROGRAPH_LAUNCH": str(path)}


def test_ranks_with_other_targets_are_refused() -> None:
    given = [{"ZEROGRAPH_KERNELS": "cpp"}, {"ZEROGRAPH_KERNELS": "torch"}]
    for message in run_ranks(2, _compiled, given):
        assert message.startswith("AgreementError: ranks 0 and 1 differ in entry 1 of how kernels")
        assert "\n  rank 0: cpu kernels run by cpp\n  rank 1: cpu kernels run by torch\n" in message
        assert "ZEROGRAPH_KERNELS" in message


def test_ranks_with_other_launch_settings_are_refused(tmp_path: Path) -> None:
    given = [table(tmp_path, 256), table(tmp_path, 512)]
    for message in run_ranks(2, _compiled, given):
        assert "\n  rank 0: total is launched with block 256, warps 4\n" in message
        assert "\n  rank 1: total is launched with block 512, warps 4\n" in message
        assert "ZEROGRAPH_LAUNCH" in message


def test_the_same_settings_from_other_files_agree(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    given = [table(tmp_path, 256), table(tmp_path / "other", 256)]
    assert run_ranks(2, _compiled, given) == ["", ""]


def test_one_rank_with_a_wrong_variable_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    for wrong in (
        {"ZEROGRAPH_KERNELS": "rust"},
        {**table(tmp_path, 256), "ZEROGRAPH_LAUNCH": "no"},
    ):
        right = {"ZEROGRAPH_KERNELS": wrong["ZEROGRAPH_KERNELS"].replace("rust", "cpp")}
        messages = run_ranks(2, _compiled, [right, wrong])
        assert all(m.startswith("AgreementError: ranks 0 and 1 differ") for m in messages)
        same = run_ranks(2, _compiled, [wrong, wrong])
        assert all(m.startswith("KernelError: ") for m in same)


def test_tables_are_no_matter_where_triton_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROGRAPH_LAUNCH", table(tmp_path, 256)["ZEROGRAPH_LAUNCH"])
    monkeypatch.setenv("ZEROGRAPH_KERNELS", "torch")
    assert choices(torch.device("cpu")) == ["cpu kernels run by torch"]
