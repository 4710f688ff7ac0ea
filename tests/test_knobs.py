"""Every key of the config: what it changes in the graph is pinned, or why it changes nothing is said.

A golden diff shows what a key of tests/knobs.py does. All other keys have a reason in the table of what is
built, and planning with other values of them gives the same graph. A key with neither is a defect.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests import knobs, tiny
from tests.keys import all_leaves
from tests.knobs import KNOBS, SILENT, Config, Knob, base, optimizer
from zerograph.config import load_config
from zerograph.config.check import given, row_for
from zerograph.config.optimizer import OPTIMIZER_TAGS
from zerograph.config.scheduler import SCHEDULER_TAGS
from zerograph.errors import ConfigError
from zerograph.golden import GraphGolden
from zerograph.optimizer import optimizer_of
from zerograph.planning import default_arriving, passes_for
from zerograph.precision import precision_of

# What changes


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_what_a_key_changes(knob: Knob, graph_golden: GraphGolden) -> None:
    diff = knob.diff()
    assert [line for line in diff.splitlines()[2:] if line.startswith(("+", "-"))], "no difference"
    graph_golden(diff, f"knobs/{knob.name}", suffix=".diff")


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_a_knob_changes_one_key(knob: Knob) -> None:
    assert list(knobs.values(knob)) == [knob.key]


def test_every_golden_diff_is_tested() -> None:
    assert {path.name for path in knobs.GOLDENS.iterdir()} == {f"{k.name}.diff" for k in KNOBS}
    assert len({k.name for k in KNOBS}) == len(KNOBS)


# Every key is somewhere


@pytest.mark.parametrize("path", all_leaves())
def test_a_key_has_a_golden_diff_or_a_reason(path: str) -> None:
    row, shown = row_for(path), path in knobs.shown_keys()
    reasons = [each.title for each in SILENT if each.holds(row)]
    assert shown == (not reasons), "it has a golden diff, or a reason for needing none"
    assert len(reasons) <= 1


def test_knobs_are_keys() -> None:
    assert knobs.shown_keys() <= set(all_leaves())


# Keys that change nothing

TRIED = (
    *(True, False, 0, 1, 2, 7, 64, 0.5, "x", "fp32", "bf16", "linear", "IGNORE"),
    *(["a"], [2, 4], [0.5, 0.75], {}, {"a": 1}),
)
ONE_VALUE = {"torch_autocast.dtype"}
TRAINED = {
    "adam": optimizer("Adam"),
    "sgd": optimizer("SGD", momentum=0.9),
    "adagrad": optimizer("Adagrad"),
    "lion": optimizer("Lion"),
    "lamb": optimizer("Lamb"),
}
SWITCHES = ("fp16", "bf16", "torch_autocast")
"""Sections whose other keys only matter when they are enabled."""


def scheduled(kind: str) -> Config:
    params = {"total_num_steps": 100} if kind != "WarmupLR" else {}
    return base(scheduler={"type": kind, "params": params})


def bases(path: str) -> dict[str, Config]:
    """Configs in which the key would act, if it did."""
    section, _, rest = path.partition(".")
    key = rest.removeprefix("params.")
    if section == "optimizer":
        having = {n: cls for n, cls in OPTIMIZER_TAGS.items() if _has(cls, rest, key)}
        return {name: TRAINED[name] for name in having}
    if path == "scheduler.type":
        return {"unscheduled": base()}
    if section == "scheduler":
        return {n: scheduled(n) for n, cls in SCHEDULER_TAGS.items() if _has(cls, rest, key)}
    if section in SWITCHES:
        return {section: base(**{section: {"enabled": True}})}
    stages = (1, 3) if section == "zero_optimization" else (3,)
    return {f"stage {stage}": base(stage) for stage in stages}


def _has(section: Any, rest: str, key: str) -> bool:
    inner = section.model_fields["params"].annotation.model_fields
    return key in inner if rest.startswith("params.") else rest in section.model_fields


def with_key(config: Config, path: str, value: object) -> dict[str, Any]:
    head, dot, rest = path.partition(".")
    if not dot:
        return {**config, head: value}
    return {**config, head: with_key(config.get(head) or {}, rest, value)}


def others(path: str, config: Config) -> Iterator[dict[str, Any]]:
    """`config` with each other value of the key that is accepted."""
    if path == "scheduler.type":
        yield from map(scheduled, SCHEDULER_TAGS)
        return
    row, before = row_for(path), dict(given(load_config(config)))
    for value in row.accepts if row.kind == "refused" else TRIED:
        made = with_key(config, path, value)
        after = _given(made)
        if after and after[path] != before.get(path, all_leaves()[path]):
            yield made


def _given(config: Config) -> dict[str, object]:
    """The keys of a config with their values; empty for one that is refused."""
    try:
        return dict(given(load_config(config)))
    except ConfigError:
        return {}


def program(config: Config) -> object:
    """All that planning reads of a config: its precision and its passes."""
    loaded = load_config(config)
    precision = precision_of(tiny.Blocks(), loaded)
    graph = replace(knobs.trace_of("blocks", precision).graph, notes={})
    spec = optimizer_of(loaded, graph.layout)
    return precision, passes_for(loaded, graph, default_arriving(graph), spec), graph.notes


CASES = [(path, name) for path in knobs.silent() for name in bases(path)]


@pytest.mark.parametrize(("path", "name"), CASES, ids=map("-".join, CASES))
def test_other_values_plan_the_same(path: str, name: str) -> None:
    config = bases(path)[name]
    tried = list(others(path, config))
    assert tried or row_for(path).kind == "refused" or path in ONE_VALUE
    for made in tried:
        assert program(made) == program(config), made


@pytest.mark.parametrize("name", sorted({name for _, name in CASES} - {"unscheduled"}))
@pytest.mark.parametrize("nth", [0, -1])
def test_the_graph_is_the_same_with_all_of_them(name: str, nth: int) -> None:
    """The keys at once, each with another value, as far as they may be given together."""
    paths = [path for path, of in CASES if of == name]
    config = made = bases(paths[0])[name]
    for path in paths:
        tried = list(others(path, made))[nth:][:1]
        made = tried[0] if tried else made
    assert len(dict(given(load_config(made)))) > len(dict(given(load_config(config))))
    assert str(knobs.planned(made)) == str(knobs.planned(config))


# The page


def test_the_page_is_made_from_the_tables() -> None:
    assert knobs.PAGE.read_text() == knobs.page(), "run python -m tests.knobs"
