"""Launch settings: the table, the one that `zerograph tune` writes, and what it chooses."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.test_cli import ok, refused
from zerograph.cli import tune as command
from zerograph.codegen import gpu, launch
from zerograph.codegen.launch import Settings, read, settings, trying, write
from zerograph.codegen.tune import MARGIN, Tuned, Work, best
from zerograph.errors import KernelError

PACKAGE = Path(launch.__file__).with_name("launch.json")
SMALL, MIDDLE, LARGE = Settings(512, 4), Settings(1024, 8), Settings(2048, 8)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a machine that has no table yet."""
    monkeypatch.delenv("ZEROGRAPH_LAUNCH")
    monkeypatch.setenv("ZEROGRAPH_CACHE", str(tmp_path / "cache"))
    found = launch.place()
    assert found == tmp_path / "cache" / "launch.json" and not found.exists()
    return found


# The table


def test_a_row_that_was_written_comes_first(place: Path) -> None:
    before = {family: settings(family, "sm_90") for family in launch.shipped()}
    other = Settings(4096, 16)
    assert other not in before.values()
    write(place, "sm_90", {"update": other})
    assert settings("update", "sm_90") == other
    assert settings("update", "sm_80") == settings("update", "") == before["update"]
    assert {f: settings(f, "sm_90") for f in before if f != "update"} == {
        f: own for f, own in before.items() if f != "update"
    }


def test_writing_leaves_other_rows(place: Path) -> None:
    write(place, "sm_90", {"update": LARGE, "norm": MIDDLE})
    write(place, "gfx942", {"update": SMALL})
    write(place, "sm_90", {"update": MIDDLE})
    assert read(place) == {"update": {"sm_90": MIDDLE, "gfx942": SMALL}, "norm": {"sm_90": MIDDLE}}
    assert [path.name for path in place.parent.iterdir()] == ["launch.json"]


def test_the_packages_table_is_written_as_it_is(tmp_path: Path) -> None:
    """So that a measured row changes one line of it."""
    copy = tmp_path / "launch.json"
    copy.write_text(PACKAGE.read_text())
    write(copy, "default", {"total": settings("total", "")})
    assert copy.read_text() == PACKAGE.read_text()


def test_a_variable_names_the_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = place.parent / "own.json"
    write(place, "sm_90", {"update": LARGE})
    write(own, "sm_90", {"update": SMALL})
    assert settings("update", "sm_90") == LARGE
    monkeypatch.setenv("ZEROGRAPH_LAUNCH", str(own))
    assert settings("update", "sm_90") == SMALL and launch.place() == own
    monkeypatch.setenv("ZEROGRAPH_LAUNCH", "")
    assert settings("update", "sm_90") == read(PACKAGE)["update"]["default"]
    assert launch.place() is None
    monkeypatch.setenv("ZEROGRAPH_LAUNCH", str(place.parent / "missing.json"))
    with pytest.raises(KernelError, match=r"missing\.json: No such file"):
        settings("update", "sm_90")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"update": 3}',
        '{"update": {"sm_90": {"block": 1000, "warps": 8}}}',
        '{"update": {"sm_90": {"block": 1024, "warps": true}}}',
        '{"update": {"sm_90": {"block": 1024}}}',
    ],
)
def test_a_file_that_is_no_table_is_named(place: Path, text: str) -> None:
    place.parent.mkdir()
    place.write_text(text)
    with pytest.raises(KernelError, match=r"launch\.json is no table .* remove it"):
        settings("update", "sm_90")


def test_an_unknown_family_is_not_written(place: Path) -> None:
    with pytest.raises(KernelError, match="did you mean 'update'"):
        write(place, "sm_90", {"updates": SMALL})
    assert not place.exists()


def test_what_is_tried_is_for_its_family_alone() -> None:
    before = settings("norm", "sm_90")
    with trying("update", LARGE):
        assert settings("update", "sm_90") == settings("update", "") == LARGE
        assert settings("norm", "sm_90") == before
    assert settings("update", "sm_90") != LARGE


# The choice


def test_the_fastest_is_chosen_and_noise_changes_nothing() -> None:
    assert best({SMALL: 3.0, MIDDLE: 2.0, LARGE: 1.0}, MIDDLE) == LARGE
    assert best({SMALL: 2.0, MIDDLE: 2.0 * (1 + MARGIN / 2), LARGE: 2.5}, MIDDLE) == MIDDLE
    assert best({SMALL: 2.0, MIDDLE: 2.0 * (1 + 2 * MARGIN), LARGE: 2.5}, MIDDLE) == SMALL
    assert best({LARGE: 1.0, SMALL: 1.0, MIDDLE: 2.0}, MIDDLE) == SMALL


def test_candidates_have_the_current_one_and_no_idle_threads() -> None:
    current = Settings(64, 16)
    found = Work("update", (512, 1024), (4, 16), lambda: None).candidates(current)
    assert found == [
        current,
        Settings(512, 4),
        Settings(512, 16),
        Settings(1024, 4),
        Settings(1024, 16),
    ]
    found = Work("update", (256,), (4, 16), lambda: None).candidates(Settings(256, 4))
    assert found == [Settings(256, 4)]


_EVERY = """
import json
import torch
from zerograph.codegen import gpu, launch
from zerograph.codegen.tune import rows, tune

device, largest, results = torch.device("cpu"), {}, {}
def measure(launched):
    launched()
    family, own = launch._tried.get()
    results.setdefault(family, []).append([own.block, own.warps])
    return 1.0 / (own.block * own.warps)
found = tune(device, 4096, measure)
launch.write(launch.place(), "sm_90", rows(found))
print(json.dumps(results))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_every_family_runs_with_every_setting(place: Path) -> None:
    """In Triton's interpreter; a made-up clock has the largest setting of each family chosen and written."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _EVERY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert list(measured) == list(launch.shipped())
    for family, tried in measured.items():
        assert len(tried) >= 3
        chosen = settings(family, "sm_90")
        assert chosen.block * chosen.warps == max(block * warps for block, warps in tried), family


# The command


def test_tune_writes_and_shows_what_it_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With figures that are made up; how they are measured needs a GPU."""
    found = [Tuned("update", MIDDLE, LARGE, {MIDDLE: 2e-3, LARGE: 1e-3})]
    for name, value in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_name", "GPU X"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(command, "measured", lambda device, elements: found)
    shown = ok("tune").splitlines()
    assert shown[1].split() == ["update", "2,048", "8", "1.00", "ms", "2.00", "ms"]
    assert shown[-1] == f"sm_90 (GPU X) is in {place}"
    assert read(place) == {"update": {"sm_90": LARGE}} and settings("update", "sm_90") == LARGE
    other = place.with_name("other.json")
    assert ok("tune", "-o", other).splitlines()[-1].startswith(f"ZEROGRAPH_LAUNCH={other} ")
    assert read(other) == read(place)


# Without a GPU


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda there: monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


def test_tune_needs_a_gpu_and_triton(
    place: Path, no_gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "tune measures on a GPU" in refused("tune")
    assert "tune measures on a GPU" in refused("tune", "--output", place)
    no_gpu(True)
    monkeypatch.setattr(gpu, "available", lambda: False)
    assert "Triton is not installed" in refused("tune")
    monkeypatch.setattr(gpu, "available", lambda: True)
    assert "multiple of 16, got 17" in refused("tune", "--elements", "17")
    monkeypatch.setenv("ZEROGRAPH_LAUNCH", "")
    assert "give --output" in refused("tune")
    assert not place.exists()
