"""docs/cli.md and the README: their commands and code are run, and the outputs are theirs.

They hold for one minor version of torch, whose decompositions the numbers of lines show.

`pytest tests/test_docs.py --accept-graphs` writes the outputs anew; read the diff before you commit it.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

import zerograph
from tests.test_cli import ok, run
from zerograph.doctor import examine

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "cli.md"
FULL_TORCH = "2.13"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def output(command: str) -> str:
    """What a command prints, through `| head -n N` or `| tail -n N`."""
    command, _, pipe = command.partition(" | ")
    program, *args = shlex.split(command)
    assert program == "zerograph"
    result = run(*args)
    lines = (result.stdout + result.stderr).splitlines(keepends=True)
    if pipe:
        name, option, count = pipe.split()
        assert name in ("head", "tail") and option == "-n"
        lines = lines[: int(count)] if name == "head" else lines[-int(count) :]
    return "".join(lines)


def rewritten(page: str) -> str:
    """The page with what its commands print now."""

    def block(match: re.Match[str]) -> str:
        commands = [line for line in match[1].splitlines() if line.startswith("$ ")]
        shown = "\n".join(f"{command}\n{output(command[2:])}" for command in commands)
        return f"```console\n{shown}```"

    return BLOCK.sub(block, page)


@pytest.mark.skipif(
    not torch.__version__.startswith(f"{FULL_TORCH}."), reason=f"outputs are those of {FULL_TORCH}"
)
def test_commands_print_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    now = rewritten(page)
    assert len(BLOCK.findall(page)) >= 5
    if request.config.getoption("--accept-graphs"):
        PAGE.write_text(now)
    else:
        assert now == page


@pytest.mark.skipif(
    not torch.__version__.startswith(f"{FULL_TORCH}."), reason=f"the text is that of {FULL_TORCH}"
)
def test_the_readme_shows_a_plan_as_it_is() -> None:
    """The code of "What a plan looks like" makes the text that stands below it."""
    section = (
        README.read_text().split("## What a plan looks like")[1].split("### On the command")[0]
    )
    code = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[0]
    text = section.split("```\n# zerograph")[1].split("```")[0]
    difference = "-summary" + section.split("\n-summary")[1].split("```")[0]
    plans = []
    for zero in ({"stage": 3}, {"stage": 3, "stage3_prefetch_bucket_size": 0}):
        adamw = {"type": "AdamW", "params": {"lr": 1e-3}}
        config = {"zero_optimization": zero, "optimizer": adamw}
        names = {name: getattr(transformers, name) for name in ("LlamaConfig", "LlamaForCausalLM")}
        names |= {"config": config, "torch": torch, "zerograph": zerograph}
        exec(code.replace("print(plan)", ""), names)
        plans.append(names["plan"])
    known = str(plans[0]).splitlines()
    shown = [line for line in text.splitlines()[1:] if "[...]" not in line]
    assert len(shown) > 30
    assert [line for line in shown if line not in known] == []
    assert plans[0].diff(plans[1], skeleton=True).endswith(difference.rstrip("\n"))


def test_the_page_shows_every_check_of_doctor() -> None:
    shown = re.search(r"^```text\n check (.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    names = {re.split(r"  +", line.strip())[0] for line in shown[1].splitlines()[1:]}
    found = {re.sub(r" \d+$", "", finding.name) for finding in examine()}
    assert names == found


def test_the_page_names_every_command() -> None:
    commands = re.findall(r"^  (\w+)  ", ok("--help").partition("Commands:")[2], re.MULTILINE)
    assert len(commands) == 8
    for name in commands:
        assert f"`zerograph {name}" in PAGE.read_text()


def test_the_architecture_names_every_file() -> None:
    """Files of the package itself and of runtime/ by name, the other packages as such; and no other file."""
    page, package = (ROOT / "docs" / "architecture.md").read_text(), ROOT / "zerograph"
    found = [*package.glob("*.py"), *package.glob("*/__init__.py"), *package.glob("runtime/*.py")]
    names = {
        f"{path.parent.relative_to(package)}/" if path.name == "__init__.py" else path.name
        for path in found
        if path.parent != package or not path.name.startswith("__")
    }
    passes = {path.stem for path in package.glob("passes/[!_]*.py")}
    assert [name for name in sorted(names | passes) if name not in page] == []
    measured = set(re.findall(r"benchmarks/\w+\.py", page))
    assert [name for name in measured if not (ROOT / name).exists()] == []
    exist = {path.name for path in (*package.rglob("*.py"), *map(Path, measured))}
    assert set(re.findall(r"\b\w+\.py\b", page)) <= exist
