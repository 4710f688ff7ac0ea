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


# Comparing, with the command line of this repository


def compare(
    folder: Path, stages: dict[str, int | None]
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the step on checkouts with these stages; None for a base without the model."""
    pytest.importorskip("zerograph.cli")
    program(folder, "zerograph", f'exec "{sys.executable}" -m zerograph "$@"')
    for side, stage in stages.items():
        (folder / side).mkdir()
        if stage is not None:
            config = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW"}}
            (folder / side / "ds_config.json").write_text(json.dumps(config))
            (folder / side / "train.py").write_text(TRAIN)
    env = {**JOBS["plan"]["env"], "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    ran = bash(script("plan", "Plan and compare"), folder, PYTHONPATH=str(ROOT), **env)
    comment = folder / "comment.md"
    return ran, comment.read_text() if comment.exists() else ""


WHAT = "The training plan of `train:make_model` with `ds_config.json` on 64 ranks"


def test_a_change_is_shown(tmp_path: Path) -> None:
    ran, comment = compare(tmp_path, {"base": 2, "head": 3})
    assert ran.returncode == 0, ran.stderr
    mark, title, *rest = comment.splitlines()
    assert mark == MARK and title.startswith(f"{WHAT} changes: ") and "gather" in title
    assert rest.count("````diff") == rest.count("````") == 1
    assert any(line.startswith("+  %b0 = zero.gather b0") for line in rest)
    assert (tmp_path / "summary.md").read_text() == comment


def test_no_change_is_said(tmp_path: Path) -> None:
    ran, comment = compare(tmp_path, {"base": 3, "head": 3})
    assert ran.returncode == 0, ran.stderr
    assert comment == f"{MARK}\n{WHAT} is the same.\n"


def test_a_base_without_the_model_is_no_failure(tmp_path: Path) -> None:
    ran, comment = compare(tmp_path, {"base": None, "head": 3})
    assert ran.returncode == 0, ran.stderr
    assert comment.splitlines()[1] == f"{WHAT} is new."
    assert "zero.gather b0" in comment


def test_a_head_without_a_plan_fails(tmp_path: Path) -> None:
    ran, comment = compare(tmp_path, {"base": 3, "head": None})
    assert ran.returncode != 0 and not comment
