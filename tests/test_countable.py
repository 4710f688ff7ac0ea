"""What tests ask of a plan: counts, bytes, peak, and that there is none; and that typos are errors."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from zerograph import ops
from zerograph.changes import changes, unified
from zerograph.countable import OPERATORS, Countable
from zerograph.document import Document
from zerograph.errors import PlanError
from zerograph.nodes import REGIONS
from zerograph.plan import Plan

STAGES = range(4)
FORMS = ("plan", "document")


@functools.cache
def plan(stage: int = 3) -> Plan:
    """Just in time, so that each collective is in the region that needs it."""
    zero = {"stage": stage, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    return tiny.planned(tiny.trace_of("blocks"), stage, zero_optimization=zero)


@functools.cache
def asked(form: str, stage: int = 3) -> Countable:
    return plan(stage) if form == "plan" else plan(stage).document()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", STAGES)
def test_collectives_are_those_of_the_traffic(stage: int, form: str) -> None:
    found = asked(form, stage)
    traffic = plan(stage).traffic
    for op in ops.COLLECTIVES:
        name = op._schema.name.partition("::")[2]
        count, nbytes = (traffic[name].count, traffic[name].nbytes) if name in traffic else (0, 0)
        assert (found.count(name), found.bytes(name)) == (count, nbytes), name
        assert found.count(f"zero.{name}") == count
    assert found.peak == plan(stage).memory.peak > 0


@pytest.mark.parametrize("form", FORMS)
def test_regions_buckets_and_layers_select(form: str) -> None:
    found = asked(form)
    assert [found.count("gather", region=region) for region in REGIONS] == [4, 2, 0]
    assert [found.count("gather", bucket=f"b{i}") for i in range(4)] == [1, 2, 2, 1]
    assert found.count("gather", region="backward", bucket="b1") == 1
    assert found.bytes("gather", bucket="b1") == 2 * 256 * 4
    assert found.count("gather", layer="blocks.0") == found.count("gather", bucket="b1")
    assert found.count("gather", layer="blocks") == 4
    assert found.count("update") == 3 and found.count("update", layer="head") == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_has_its_own_calls_and_those_of_its_bucket(form: str) -> None:
    found = asked(form)
    inner = found.count("aten.addmm", layer="blocks.0.linear")
    assert inner == 1 == found.count("aten.addmm", layer="blocks.0")
    assert found.count("aten.addmm", layer="blocks.0.norm") == 0
    assert found.count("gather", layer="blocks.0.linear") == 2, "b1 holds its parameters"


def test_a_merged_bucket_belongs_to_each_of_its_modules() -> None:
    made = tiny.planned(tiny.trace_of("mlp"), 3)
    assert len(made.graph.layout.buckets) == 1
    assert made.count("gather", layer="first") == made.count("gather", layer="second") == 1


@pytest.mark.parametrize("form", FORMS)
def test_assert_no_shows_the_lines(form: str) -> None:
    found = asked(form)
    found.assert_no("gather", region="step")
    found.assert_no("all_reduce")
    with pytest.raises(AssertionError) as caught:
        found.assert_no("gather", region="backward", layer="blocks.0")
    head, *lines = str(caught.value).splitlines()
    assert head == "there is to be no gather, region backward, layer blocks.0; found 1 (1.0 KiB):"
    (line,) = lines
    text = str(plan()).splitlines()
    number, _, shown = line.strip().partition(" ")
    assert text[int(number) - 1].strip() == shown.strip()
    assert shown.strip().startswith("%b1 = zero.gather b1")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["blocks", "half", "partly", "batch_norm"])
def test_every_call_has_its_line(stage: int, name: str) -> None:
    made = tiny.planned(tiny.trace_of(name), stage)
    for op in {node.op for node in made.document().nodes}:
        with pytest.raises(AssertionError) as caught:
            made.assert_no(op)
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == made.count(op) > 0
        shown = op if op != "getitem" else "["
        own = all(shown in line or f"zero.{op}" in line for line in lines)
        assert own, f"{op}: {lines}"


TYPOS: dict[str, tuple[dict[str, Any], str]] = {
    "operator": ({"op": "gathr"}, "no operator 'gathr'; did you mean 'gather'?"),
    "full": ({"op": "zero.gathr"}, "no operator 'zero.gathr'; did you mean 'zero.gather'?"),
    "aten": ({"op": "aten.addm"}, "no operator 'aten.addm'; did you mean 'aten.addmm'?"),
    "no namespace": ({"op": "conv2d"}, "no operator 'conv2d'; did you mean 'aten.conv2d'?"),
    "region": ({"region": "backwards"}, "no region 'backwards'; did you mean 'backward'?"),
    "bucket": ({"bucket": "b7"}, "no bucket 'b7'; there are b0, b1, b2, b3"),
    "layer": ({"layer": "block.0"}, "no layer 'block.0'; did you mean 'blocks.0'?"),
    "empty layer": ({"layer": ""}, "no layer ''; there are blocks, blocks.0"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", TYPOS)
def test_a_name_that_does_not_exist_is_an_error(kind: str, form: str) -> None:
    given, says = TYPOS[kind]
    given = {"op": "gather", **given}
    for ask in (asked(form).count, asked(form).bytes, asked(form).assert_no):
        with pytest.raises(PlanError) as caught:
            ask(**given)
        assert str(caught.value).startswith(says)


def test_an_operator_of_torch_that_the_plan_lacks_is_none() -> None:
    assert plan().count("aten.conv2d") == 0
    plan().assert_no("aten.conv2d")


def test_operators_are_all_of_ops() -> None:
    assert {"gather", "wait", "update", "refresh"} <= set(OPERATORS)
    assert all(f"    {name} " in (ops.__doc__ or "") for name in OPERATORS)


def test_a_saved_plan_answers_alike(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    saved = Document.load(tmp_path / "plan.json")
    assert saved.count("gather", layer="head") == plan().count("gather", layer="head") == 1
    assert saved.bytes("reduce_scatter") == plan().bytes("reduce_scatter")
    assert saved.peak == plan().peak


# What changed between two texts


def test_changes_names_what_differs_and_nothing_else() -> None:
    before, after = str(plan(2)), str(plan(3))
    found = {line.split()[0]: line for line in changes(before, after)}
    assert found["gather"] == "gather    none -> 6 (5.0 KiB)"
    assert "refresh" in found and found["refresh"].endswith("-> none")
    assert {"states", "gathered", "peak"} <= set(found)
    assert not {"reduce_scatter", "saved", "gather_partials"} & set(found)


def test_changes_of_equal_summaries_and_of_other_texts() -> None:
    text = str(plan())
    assert changes(text, text) == ["collectives, bytes and peak are the same"]
    assert changes("a\n", text) == [] == changes(text, "a\n")


def test_unified_is_empty_for_equal_texts() -> None:
    assert unified("a\n", "a\n") == []
    assert unified("a\nb\nc\n", "a\nx\nc\n", context=0)[2:] == ["@@ -2 +2 @@", "-b", "+x"]
