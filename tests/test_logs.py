"""TORCH_LOGS and TORCH_TRACE: what each pass did, in torch's own logs and traces."""

import json
import logging
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from zerograph import pipeline

CODE = """
import torch
from tests import tiny
print(tiny.planned(tiny.traced(tiny.Mlp(), tiny.batch(), 8), 3), end="")
"""
PASSES = (
    "trace",
    "normalize",
    "checkpoint",
    "specialize",
    "scale",
    "shard",
    "gather",
    "release",
    "reduce",
)
PASSES += ("in_place", "update", "schedule")


def run(**environment: str) -> tuple[str, list[str]]:
    """Output and log lines, without torch's prefix, of a process that plans."""
    made = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), **environment},
        check=True,
    )
    return made.stdout, [
        re.sub(r"^.*?pipeline\.py:\d+\] ", "", x) for x in made.stderr.splitlines()
    ]


def test_torch_logs_show_each_pass_and_its_text(tmp_path: Path) -> None:
    text, log = run(TORCH_LOGS="+zerograph.passes", TORCH_TRACE=str(tmp_path))
    told = [line for line in log if re.search(r" \(\d+\.\d{3} s, check \d+\.\d{3} s\)$", line)]
    assert [line.partition(":")[0] for line in told] == list(PASSES)
    assert any(line.startswith("gather: 1 gathers, 1 buckets kept") for line in told)
    assert [line.rpartition(" ")[2] for line in log if line.startswith("# zerograph")] == list(
        PASSES
    )
    at = log.index(text.splitlines()[0])
    assert log[at : at + len(text.splitlines())] == text.splitlines()
    (file,) = tmp_path.iterdir()
    assert artifacts(file.read_text()) == {
        f"zerograph_{i}_{name}": name for i, name in enumerate(PASSES)
    }


def artifacts(trace: str) -> dict[str, str]:
    """Of each artifact of ours, the pass that the first line of its text names."""
    found = {}
    lines = trace.splitlines()
    for line, after in pairwise(lines):
        given = re.search(r'\{"artifact": (\{[^}]*"name": "zerograph_[^}]*\})', line)
        if given:
            found[json.loads(given[1])["name"]] = after.rpartition("after ")[2]
    return found


def test_one_pass_alone_and_no_text_without_plus() -> None:
    _, log = run(TORCH_LOGS="zerograph.passes.gather")
    assert [line.partition(":")[0] for line in log] == ["gather"]


def test_nothing_is_made_when_logs_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a line nor a text."""
    handled: list[logging.LogRecord] = []
    made: list[str] = []
    monkeypatch.setattr(logging.Logger, "handle", lambda self, record: handled.append(record))
    monkeypatch.setattr(pipeline, "text", lambda graph, name: made.append(name) or "")
    monkeypatch.setattr(pipeline, "forms", lambda graph, name: made.append(name) or ((), ()))
    trace = tiny.trace_of("mlp")
    pipeline.run(trace.graph.copy(), [])
    ours = [record for record in handled if record.name.startswith("zerograph")]
    assert ours == [] and made == []


def test_texts_are_logged_when_they_are_not_read() -> None:
    seen: list[Any] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    log = logging.getLogger("zerograph.passes")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        pipeline.run(tiny.trace_of("mlp").graph.copy(), [])
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    assert [record.levelname for record in seen] == ["INFO", "DEBUG"]
    assert "after trace" in seen[1].getMessage()
