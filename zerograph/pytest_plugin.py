"""The pytest plugin: golden graphs. A test pins what a plan looks like; a change shows as a diff.

    def test_plan(graph_golden):
        graph_golden(zerograph.plan(...), "llama.stage3")

compares with `goldens/llama.stage3.txt` beside the test's file; `pytest --accept-graphs` writes it. No ranks,
GPU or weights are needed. docs/testing.md says how to use it.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from zerograph.golden import LEDGER, GraphGolden, Ledger, shown

_SENT = "zerograph_goldens"


@pytest.fixture
def graph_golden(request: pytest.FixtureRequest) -> GraphGolden:
    """Compare the text of a plan with a golden file: `graph_golden(plan, "llama.stage3")`."""
    return GraphGolden(request.config, _folder(request.config, request.path), request.node.nodeid)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zerograph", "golden graphs (zerograph)")
    group.addoption(
        "--accept-graphs",
        action="store_true",
        help="write the golden files of graph_golden from what the tests give now",
    )
    group.addoption(
        "--strict-goldens",
        action="store_true",
        help="fail if a golden was used by no test; for runs of all tests beside it",
    )
    parser.addini(
        "graph_goldens", "folder of the golden files, beside each test file", default="goldens"
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = PurePosixPath(config.getini("graph_goldens"))
    if folder.is_absolute() or ".." in folder.parts or not folder.parts:
        raise pytest.UsageError(
            f"graph_goldens = {folder}: give the name of a folder below that of the test file"
        )
    config.stash[LEDGER] = Ledger()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        items[0].config.stash[LEDGER].deselected += len(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    folders = {str(_folder(session.config, item.path)) for item in session.items}
    session.config.stash[LEDGER].folders |= folders


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended: take in what its tests did."""
    sent = getattr(node, "workeroutput", {}).get(_SENT)
    if sent is not None:
        node.config.stash[LEDGER].merge(sent)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config, ledger = session.config, session.config.stash[LEDGER]
    if hasattr(config, "workeroutput"):
        config.workeroutput[_SENT] = ledger.data()
    elif session.exitstatus == pytest.ExitCode.OK:
        if config.getoption("strict_goldens") and not ledger.deselected:
            ledger.stale = ledger.unused()
        if ledger.clashes or ledger.stale:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    ledger = config.stash[LEDGER]
    lines = [f"wrote {shown(config, Path(path))}" for path in sorted(ledger.written)]
    lines += ledger.clashes
    lines += [f"no test used {shown(config, path)}; delete it or test it" for path in ledger.stale]
    if config.getoption("strict_goldens") and ledger.deselected:
        lines.append(f"not checked for unused goldens: {ledger.deselected} tests were deselected")
    if lines:
        terminalreporter.section("golden graphs")
        terminalreporter.write("".join(f"{line}\n" for line in lines))


def _folder(config: pytest.Config, test: Path) -> Path:
    """The folder of goldens of a test file, wherever pytest runs from."""
    return test.parent / str(config.getini("graph_goldens"))
