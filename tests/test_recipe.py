"""The recipe for GitHub Actions: its form, its rights, and its scripts, run by bash as a runner would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "ci" / "graph-diff.yml"
RECIPE: dict[Any, Any] = yaml.safe_load(FILE.read_text())
JOBS: dict[str, Any] = RECIPE["jobs"]
MARK = "<!-- zerograph graph diff -->"

TRAIN = """
import torch
from torch import nn

def make_model():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
        return model, (torch.empty(4, 8),)
"""


def script(job: str, name: str) -> str:
    (found,) = (step["run"] for step in JOBS[job]["steps"] if step.get("name") == name)
    return str(found)


def bash(text: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **env}
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=given, capture_output=True, text=True, timeout=200
    )


def program(folder: Path, name: str, text: str) -> None:
    """A program that the script finds first."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_it_runs_on_pull_requests_of_untrusted_code_only_without_rights() -> None:
    assert set(RECIPE[True]) == {"pull_request"}, "YAML 1.1 reads the key `on` as true"
    assert RECIPE["permissions"] == {}
    assert JOBS["plan"]["permissions"] == {"contents": "read"}
    assert JOBS["comment"]["permissions"] == {"pull-requests": "write"}
    assert JOBS["comment"]["if"] == (
        "github.event.pull_request.head.repo.full_name == github.repository"
    )
    checkouts = [s for s in JOBS["plan"]["steps"] if "checkout" in s.get("uses", "")]
    assert [step["with"]["persist-credentials"] for step in checkouts] == [False, False]
    assert not any("checkout" in step.get("uses", "") for step in JOBS["comment"]["steps"])


def test_scripts_are_bash_and_take_values_from_the_environment() -> None:
    scripts = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    assert len(scripts) == 3
    for text in scripts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert "${{" not in text, "an expression in a script runs what a title contains"


def test_every_action_has_a_version() -> None:
    used = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in used)


def test_docs_name_it() -> None:
    assert "examples/ci/graph-diff.yml" in (ROOT / "docs/testing.md").read_text()


# Commenting

GH = """
printf '%s\\n' "$*" >> calls
case "$*" in *--jq*) cat comments | python -c '
import json, sys
for each in json.load(sys.stdin):
    if each["user"] == "github-actions[bot]" and each["body"].startswith("MARK"): print(each["id"])
' ;; esac
"""


@pytest.mark.parametrize(
    ("there", "called"),
    [
        ([], "--method POST repos/me/it/issues/5/comments --field body=@comment.md --silent"),
        (
            [("someone", MARK, 1), ("github-actions[bot]", "other", 2)],
            "--method POST repos/me/it/issues/5/comments --field body=@comment.md --silent",
        ),
        (
            [("github-actions[bot]", MARK, 7), ("github-actions[bot]", MARK, 8)],
            "--method PATCH repos/me/it/issues/comments/7 --field body=@comment.md --silent",
        ),
    ],
)
def test_one_comment_is_kept_up_to_date(
    tmp_path: Path, there: list[tuple[str, str, int]], called: str
) -> None:
    """`gh` is a program of the runner; this one answers with the comments that are there."""
    comments = [{"user": user, "body": body, "id": number} for user, body, number in there]
    (tmp_path / "comments").write_text(json.dumps(comments))
    program(tmp_path, "gh", GH.replace("MARK", MARK))
    ran = bash(script("comment", "Comment"), tmp_path, GITHUB_REPOSITORY="me/it", NUMBER="5")
    assert ran.returncode == 0, ran.stderr
    first, last = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("api --paginate repos/me/it/issues/5/comments --jq")
    assert last == f"api {called}"


# Comparing

WHAT = "The training plan of `train:make_model` with `ds_config.json` on 64 ranks"
STANDING_IN = """
case "$1" in
  plan) test -e ds_config.json ;;
  diff) if [ "$DIFFERS" = 1 ]; then echo "+ line"; echo "gather 5 -> 7"; fi; exit "$DIFFERS" ;;
  show) echo "the plan" ;;
esac
"""
"""Answers as the command line does, without its seconds of imports."""


def compare(folder: Path, stages: dict[str, int | None], **env: str) -> tuple[int, str]:
    """The step's exit code and comment for checkouts of these stages; None for one without a config."""
    for side, stage in stages.items():
        (folder / side).mkdir()
        if stage is not None:
            config = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW"}}
            (folder / side / "ds_config.json").write_text(json.dumps(config))
            (folder / side / "train.py").write_text(TRAIN)
    env = {**JOBS["plan"]["env"], "GITHUB_STEP_SUMMARY": str(folder / "summary.md"), **env}
    ran = bash(script("plan", "Plan and compare"), folder, PYTHONPATH=str(ROOT), **env)
    comment = folder / "comment.md"
    if comment.exists():
        assert (folder / "summary.md").read_text() == comment.read_text()
    return ran.returncode, comment.read_text() if comment.exists() else ""


def test_a_change_is_shown_by_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("zerograph.cli")
    program(tmp_path, "zerograph", f'exec "{sys.executable}" -m zerograph "$@"')
    code, comment = compare(tmp_path, {"base": 2, "head": 3})
    mark, title, *rest = comment.splitlines()
    assert code == 0 and mark == MARK
    assert title.startswith(f"{WHAT} changes: ") and "gather" in title
    assert rest.count("````diff") == rest.count("````") == 1
    assert any(line.startswith("+  %b0 = zero.gather b0") for line in rest)


@pytest.mark.parametrize(
    ("stages", "differs", "code", "title"),
    [
        ((3, 3), "0", 0, f"{WHAT} is the same."),
        ((2, 3), "1", 0, f"{WHAT} changes: gather 5 -> 7"),
        ((2, 3), "2", 1, ""),
        ((None, 3), "0", 0, f"{WHAT} is new."),
        ((3, None), "0", 1, ""),
    ],
)
def test_each_outcome_of_comparing(
    tmp_path: Path, stages: tuple[int | None, int | None], differs: str, code: int, title: str
) -> None:
    program(tmp_path, "zerograph", STANDING_IN)
    ran, comment = compare(tmp_path, dict(zip(("base", "head"), stages)), DIFFERS=differs)
    assert ran == code
    lines = comment.splitlines()
    assert lines[:2] == ([MARK, title] if title else [])
    assert ("````diff" in lines) == (title != "" and "same" not in title)
