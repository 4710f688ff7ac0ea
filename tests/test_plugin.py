"""The pytest plugin, run as its users run it: in pytest runs of their own, each in an empty folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from zerograph.document import Document
from zerograph.golden import SHOWN, GraphGolden

ROOT = Path(__file__).parent.parent
ENTRY_POINT = "[pytest11]\nzerograph = zerograph.pytest_plugin\n"
TEXT = "# zerograph 1\nforward()\n  %b0 = zero.gather b0\nsummary  gather {count} ({size})  peak {peak}\n"
ONE = TEXT.format(count=1, size="64 B", peak="1.0 KiB")
TWO = TEXT.format(count=2, size="128 B", peak="1.0 KiB")


@pytest.fixture(autouse=True)
def _alone(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plugin but those that a run names, and no setting of this repository."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\n")


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "zerograph.pytest_plugin", *args)


def golden_test(pytester: pytest.Pytester, text: str, name: str = "plan", more: str = "") -> None:
    pytester.makepyfile(
        test_it=f"def test_plan(graph_golden):\n    graph_golden({text!r}, {name!r}{more})\n"
    )


def pin(pytester: pytest.Pytester, text: str, name: str = "plan.txt") -> Path:
    path = pytester.path / "goldens" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Comparing


def test_the_same_text_passes_and_nothing_is_written(pytester: pytest.Pytester) -> None:
    golden_test(pytester, ONE)
    path = pin(pytester, ONE)
    before = path.stat().st_mtime_ns
    result = run(pytester)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*golden graphs*")
    assert path.stat().st_mtime_ns == before


def test_another_text_fails_with_a_diff_and_what_changed(pytester: pytest.Pytester) -> None:
    golden_test(pytester, TWO)
    path = pin(pytester, ONE)
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "--- goldens/plan.txt",
            "+++ now",
            "-summary  gather 1 (64 B)  peak 1.0 KiB",
            "+summary  gather 2 (128 B)  peak 1.0 KiB",
            "",
            "gather  1 (64 B) -> 2 (128 B)",
            "if this is meant: pytest --accept-graphs test_it.py::test_plan, then read git diff",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*peak *->*")
    result.stdout.no_fnmatch_line("*golden.py*")
    assert path.read_text() == ONE


def test_a_long_diff_is_cut_and_vv_shows_all(pytester: pytest.Pytester) -> None:
    lines = 2 * SHOWN
    golden_test(pytester, "".join(f"new {i}\n" for i in range(lines)))
    pin(pytester, "old\n")
    cut = run(pytester)
    cut.stdout.fnmatch_lines([f"... {lines + 4 - SHOWN} more lines; -vv shows all"])
    cut.stdout.no_fnmatch_line(f"+new {lines - 1}")
    run(pytester, "-vv").stdout.fnmatch_lines([f"+new {lines - 1}"])


def test_a_missing_golden_says_how_to_make_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest
        @pytest.mark.parametrize("stage", [3])
        def test_plan(graph_golden, stage):
            graph_golden("a", f"plan.{stage}")
        """
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "there is no golden goldens/plan.3.txt; to make it: "
            "pytest --accept-graphs 'test_it.py::test_plan[[]3[]]'"
        ]
    )
    assert not (pytester.path / "goldens").exists()


def test_carriage_returns_of_a_checkout_are_no_difference(pytester: pytest.Pytester) -> None:
    golden_test(pytester, ONE)
    pin(pytester, "").write_bytes(ONE.replace("\n", "\r\n").encode())
    run(pytester).assert_outcomes(passed=1)


# Accepting


def test_accept_writes_what_differs_and_says_so(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        def test_same(graph_golden):
            graph_golden("same", "same")
        def test_new(graph_golden):
            graph_golden("new", "deeper/new", suffix=".diff")
        def test_other(graph_golden):
            graph_golden("other", "other")
        """
    )
    pin(pytester, "same\n", "same.txt")
    other = pin(pytester, "before\n", "other.txt")
    result = run(pytester, "--accept-graphs")
    result.assert_outcomes(passed=3)
    wrote = [line for line in result.outlines if line.startswith("wrote ")]
    assert wrote == ["wrote goldens/deeper/new.diff", "wrote goldens/other.txt"]
    assert other.read_bytes() == b"other\n"
    assert (pytester.path / "goldens/deeper/new.diff").read_bytes() == b"new\n"
    run(pytester).assert_outcomes(passed=3)


def test_accept_under_xdist(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest
        @pytest.mark.parametrize("i", range(6))
        def test_plan(graph_golden, i):
            graph_golden(f"text {i}", f"plan.{i}")
        """
    )
    xdist = ("-p", "xdist", "-n", "2")
    result = run(pytester, *xdist, "--accept-graphs")
    result.assert_outcomes(passed=6)
    assert sum(line.startswith("wrote goldens/plan.") for line in result.outlines) == 6
    run(pytester, *xdist, "--strict-goldens").assert_outcomes(passed=6)
    pin(pytester, "other\n", "plan.3.txt")
    pin(pytester, "stale\n", "stale.txt")
    result = run(pytester, *xdist)
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["-other", "+text 3"])


# Names


@pytest.mark.parametrize(
    "name",
    ["", "../out", "a/../../out", "/out", ".hidden", "a//b", "a/", "a b", "a\\b", "a/.b", "é"],
)
def test_a_name_stays_in_the_folder(pytester: pytest.Pytester, name: str) -> None:
    golden_test(pytester, "a", name)
    result = run(pytester, "--accept-graphs")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*cannot name a golden*"])
    assert not (pytester.path / "goldens").exists() and not (pytester.path / "out.txt").exists()


def test_a_suffix_is_checked_too(pytester: pytest.Pytester) -> None:
    golden_test(pytester, "a", "a", ", suffix='/../../b.txt'")
    run(pytester, "--accept-graphs").stdout.fnmatch_lines(["*cannot name a golden*"])


TWICE = """
import pytest
@pytest.mark.parametrize("i", [1, 2])
def test_plan(graph_golden, i):
    graph_golden({text}, "plan")
"""


@pytest.mark.parametrize("accept", [[], ["--accept-graphs"]])
def test_one_name_with_two_texts_fails(pytester: pytest.Pytester, accept: list[str]) -> None:
    pytester.makepyfile(test_it=TWICE.format(text="f'text {i}'"))
    path = pin(pytester, "text 1\n")
    result = run(pytester, *accept)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*plan.txt is given two texts, by test_it.py::test_plan?1? and by *; give each its own*"]
    )
    assert path.read_text() == "text 1\n"


def test_one_name_with_two_texts_fails_across_processes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TWICE.format(text="f'text {i}'"))
    result = run(pytester, "-p", "xdist", "-n", "2", "--accept-graphs")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*plan.txt is given two texts*"])


def test_one_name_with_one_text_twice_passes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TWICE.format(text="'text'"))
    pin(pytester, "text\n")
    run(pytester).assert_outcomes(passed=2)


# The folder


def test_the_folder_is_beside_the_test_wherever_pytest_runs(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngraph_goldens = pinned/graphs\n")
    deep = pytester.mkdir("deep")
    (deep / "test_it.py").write_text("def test(graph_golden): graph_golden('a', 'a')\n")
    elsewhere = pytester.mkdir("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        run(pytester, str(deep), "--accept-graphs").assert_outcomes(passed=1)
        run(pytester, str(deep)).assert_outcomes(passed=1)
    assert (deep / "pinned/graphs/a.txt").read_text() == "a\n"
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("folder", ["..", "a/../../b", "/abroad", "."])
def test_a_folder_elsewhere_is_refused(pytester: pytest.Pytester, folder: str) -> None:
    pytester.makeini(f"[pytest]\ngraph_goldens = {folder}\n")
    golden_test(pytester, "a")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*graph_goldens = *: give the name of a folder*"])


# Goldens that no test uses


def test_strict_reports_unused_goldens(pytester: pytest.Pytester) -> None:
    golden_test(pytester, "a")
    pin(pytester, "a\n")
    pin(pytester, "no golden\n", "README.md")
    assert run(pytester, "--strict-goldens").ret == pytest.ExitCode.OK
    pin(pytester, "a\n", "deeper/stale.txt")
    assert run(pytester).ret == pytest.ExitCode.OK
    result = run(pytester, "--strict-goldens")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["no test used goldens/deeper/stale.txt; delete it or test it"])
    result.stdout.no_fnmatch_line("*no test used goldens/plan.txt*")
    result = run(pytester, "--strict-goldens", "-p", "xdist", "-n", "2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["no test used goldens/deeper/stale.txt; delete it or test it"])


def test_strict_finds_goldens_of_a_folder_whose_tests_use_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="def test(): pass")
    pin(pytester, "a\n")
    assert run(pytester, "--strict-goldens").ret == pytest.ExitCode.TESTS_FAILED


def test_strict_says_when_it_cannot_tell(pytester: pytest.Pytester) -> None:
    golden_test(pytester, "a")
    pytester.makepyfile(test_other="def test_more(): pass")
    pin(pytester, "a\n")
    result = run(pytester, "--strict-goldens", "-k", "test_more")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["not checked for unused goldens: 1 tests were deselected"])


# What is compared


def test_plans_documents_and_torchs_version(pytester: pytest.Pytester) -> None:
    plan = tiny.planned(tiny.trace_of("mlp"), 3)
    plan.save(pytester.path / "plan.json")
    pin(pytester, str(plan))
    pin(pytester, plan.text(skeleton=True), "plan.skeleton.txt")
    pytester.makepyfile(
        test_it="""
        import torch
        from zerograph.document import Document
        def test_forms(graph_golden):
            plan = Document.load("plan.json")
            graph_golden(plan, "plan", skeleton=True, torch="1.0")
            graph_golden(plan, "plan", torch=".".join(torch.__version__.split(".")[:2]))
        def test_other_torch(graph_golden):
            graph_golden("another text", "other", torch="1.0")
        def test_no_minor(graph_golden):
            graph_golden("a", "b", torch="1")
        """
    )
    pin(pytester, "a text\n", "other.txt")
    result = run(pytester, "-rs", "--accept-graphs")
    result.assert_outcomes(passed=1, skipped=1, failed=1)
    result.stdout.fnmatch_lines(["*this golden shows the decompositions of torch 1.0*"])
    result.stdout.fnmatch_lines(["*ValueError: torch='1': give a minor version*"])
    assert (pytester.path / "goldens/other.txt").read_text() == "a text\n"
    assert not any(line.startswith("wrote ") for line in result.outlines)


def test_a_plan_and_its_document_are_one_golden(
    graph_golden: GraphGolden, pytester: pytest.Pytester
) -> None:
    plan = tiny.planned(tiny.trace_of("blocks"), 3)
    plan.save(pytester.path / "plan.json")
    graph_golden(plan, "blocks", skeleton=True)
    graph_golden(Document.load(pytester.path / "plan.json"), "blocks", skeleton=True)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("graph_golden(3, 'a')", "got int"),
        ("graph_golden('a', 'a', skeleton=True)", "a str has no skeleton"),
    ],
)
def test_what_has_no_text_is_refused(pytester: pytest.Pytester, call: str, says: str) -> None:
    pytester.makepyfile(test_it=f"def test(graph_golden): {call}")
    result = run(pytester, "--accept-graphs")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*TypeError: *{says}*"])


# Loading


def test_a_run_without_plans_imports_no_torch(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import sys
        def test(graph_golden):
            graph_golden("a", "plan")
            assert not {"torch", "numpy", "pydantic"} & set(sys.modules)
        """
    )
    pin(pytester, "a\n")
    run(pytester).assert_outcomes(passed=1)


GUARD = "".join((ROOT / "tests/conftest.py").read_text().partition("def pytest_addoption")[1:])
GUARD = GUARD.partition("\n\n\n@pytest.fixture")[0] + "\n"


@pytest.mark.parametrize(("installed", "guarded"), [(True, False), (False, True), (True, True)])
def test_the_entry_point_and_our_conftest_register_it_once(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: bool, guarded: bool
) -> None:
    """The package may have been installed before it had the entry point, or after."""
    path = pytester.mkdir("site")
    info = path / "zerograph_entry-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zerograph-entry\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    if installed:
        monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{path}")
    if guarded:
        head = "import pytest\nfrom zerograph import pytest_plugin\n"
        pytester.makeconftest(head + GUARD)
    golden_test(pytester, "a")
    pin(pytester, "a\n")
    pytester.runpytest_subprocess("--strict-goldens").assert_outcomes(passed=1)


def test_the_project_has_the_entry_point() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (
        f"[pytest11]\nzerograph = {project['entry-points']['pytest11']['zerograph']}\n"
        == ENTRY_POINT
    )


def test_names_are_imported_when_used_and_plan_stays_a_function() -> None:
    code = (
        "import sys, zerograph; assert 'torch' not in sys.modules; "
        "assert not hasattr(zerograph, 'plam') and 'plan' in dir(zerograph); "
        "import zerograph.plan; from zerograph.plan import Plan; "
        "assert callable(zerograph.plan) and zerograph.Plan is Plan; "
        "assert all(getattr(zerograph, name) for name in zerograph.__all__); "
        "assert zerograph.errors.ConfigError"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
