"""Facts about the canonical text that no golden says on its own."""

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny
from zerograph import ops
from zerograph.nodes import is_call
from zerograph.text import text
from zerograph.units import size

STAGES = range(4)


def plan(stage: int, name: str = "blocks", **more: Any) -> Any:
    return tiny.planned(tiny.trace_of(name, 8), stage, **more)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("skeleton", [False, True])
def test_head_comes_first_and_summary_last(stage: int, skeleton: bool) -> None:
    found = plan(stage).text(skeleton=skeleton)
    lines = found.splitlines()
    assert lines[0] == f"# zerograph 1 | Blocks | stage {stage} | world 8 | after schedule"
    assert lines[1].startswith("precision  ") and lines[2].startswith("collectives  ")
    assert lines[3] == "buckets"
    assert lines[-1].startswith("summary  ") and found.endswith("\n")
    assert sum(line.startswith("summary") for line in lines) == 1
    regions = [line.partition("(")[0] for line in lines[4:-1] if not line.startswith(" ")]
    assert regions == ["forward", "backward", "step"]


@pytest.mark.parametrize("stage", STAGES)
def test_one_line_a_node(stage: int) -> None:
    made = plan(stage)
    body = [line for line in str(made).splitlines() if line.startswith("  ")]
    body = [line for line in body if not re.match(r"  (return|save|b\d+ )", line)]
    assert len(body) == len(made.graph.nodes())


@pytest.mark.parametrize("stage", STAGES)
def test_no_paths_addresses_ids_or_torchs_names(stage: int) -> None:
    for shown in plan(stage).history.texts():
        assert not re.search(
            r"/(?!rank)|0x[0-9a-f]+|\.py|_default|primals|tangents|rank ?\d", shown
        )
        assert "device" not in shown and "cpu" not in shown


def test_trailing_blanks_and_tabs_there_are_none() -> None:
    for line in str(plan(3)).splitlines():
        assert line == line.rstrip() and "\t" not in line


def test_values_of_aten_are_numbered_in_order() -> None:
    numbers = [int(n) for n in re.findall(r"^  %(\d+): ", str(plan(3)), re.MULTILINE)]
    assert numbers == list(range(len(numbers))) and len(numbers) > 20


def test_a_gather_more_renumbers_nothing() -> None:
    aten = [
        [line for line in str(plan(stage)).splitlines() if re.match(r"  %\d+: ", line)]
        for stage in (2, 3)
    ]
    assert aten[0] == aten[1]


def test_keyword_arguments_are_sorted_and_devices_dropped() -> None:
    graph = tiny.trace_of("mlp", 1).graph.copy()
    with graph.inserting(graph.end("forward"), "forward") as insert:
        keywords = {"pin_memory": False, "layout": torch.strided, "dtype": torch.float64}
        insert(torch.ops.aten.full.default, [2], 0, device=torch.device("cpu"), **keywords)
        anchor = next(n for n in graph.nodes() if is_call(n, torch.ops.aten.addmm.default))
        insert(torch.ops.aten.addmm.default, *anchor.args, beta=2, alpha=3)
    found = text(graph, "")
    assert "= aten.full([2], 0, dtype=f64)" in found
    assert re.search(r"= aten\.addmm\(.*, alpha=3, beta=2\)", found)


def test_types_say_dtype_and_shape() -> None:
    found = str(plan(3, "batch_norm"))
    assert "%norm.num_batches_tracked: i64[]" in found
    assert "%x: f32[4,8]" in found
    assert re.search(r"%\d+: \(f32\[4,8\], f32\[8\], f32\[8\], .*\) = aten\.", found)


def test_results_updates_and_gradients_are_labelled() -> None:
    history = plan(0, "batch_norm").history
    assert re.search(r"  return output=%\d+, new norm\.num_batches_tracked=%\d+,", history["trace"])
    assert re.search(r"  return grad first\.weight=%\d+, grad first\.bias=", history["trace"])
    assert re.search(r"  return b0=%b0\.sum\n", history["schedule"])
    assert re.search(r"  return norm=%norm\n", history["schedule"])


def test_frozen_buckets_and_absent_gradients_are_said() -> None:
    assert re.search(r"^  b0   inlet  .* frozen$", str(plan(3)), re.MULTILINE)
    assert "\nwithout gradient  other.weight, other.bias\n" in str(plan(3, "partly"))


def test_the_modules_that_work_comes_from_are_said() -> None:
    line = next(line for line in str(plan(3)).splitlines() if "native_dropout(" in line)
    assert line.endswith("  # blocks.0.dropout")


def test_module_names_do_not_depend_on_what_the_forward_calls_itself() -> None:
    class Odd(nn.Module):
        def __init__(odd) -> None:
            super().__init__()
            odd.linear = nn.Linear(8, 8)

        def forward(odd, x: torch.Tensor) -> torch.Tensor:
            return odd.linear(x).square().mean()

    made = tiny.planned(tiny.traced(Odd(), {"x": torch.ones(2, 8)}, 4), 0)
    assert {line.rpartition("# ")[2] for line in str(made).splitlines() if "mm(" in line} == {
        "linear"
    }


def test_a_collective_shows_its_bytes() -> None:
    found = str(plan(3))
    gather = next(line for line in found.splitlines() if "zero.gather b1" in line)
    assert gather.split("  # ")[1] == "1.0 KiB"
    assert "gather 6 (5.0 KiB)" in found.splitlines()[-1]


# The skeleton


@pytest.mark.parametrize("stage", STAGES)
def test_skeleton_keeps_zero_lines_and_folds_the_rest(stage: int) -> None:
    made = plan(stage)
    full, short = str(made).splitlines(), made.text(skeleton=True).splitlines()
    numbered = re.compile(r"%\d+\b")
    zero = [numbered.sub("%_", line).split() for line in full if "zero." in line]
    assert [line.split() for line in short if "zero." in line] == zero
    assert not any("aten." in line for line in short)
    for one, other in pairwise(short):
        assert not one.strip() == other.strip() == "...", "a run is folded into one line"
    assert len([n for n in made.graph.nodes() if ops.is_zero(n.target)]) == len(zero)


def test_skeleton_has_no_numbers_of_aten_values() -> None:
    """They are torch's decompositions, which a skeleton is to survive."""
    assert not re.findall(r"%\d+", plan(3, "batch_norm").text(skeleton=True))


# Sizes


@pytest.mark.parametrize(
    "count, shown",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**53, "8192.0 TiB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


def test_diff_is_empty_for_the_same_and_ends_with_what_it_costs() -> None:
    one, other = plan(1), plan(3)
    assert one.diff(plan(1)) == ""
    lines = one.diff(other).splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    assert lines[-2].startswith("-summary") and lines[-1].startswith("+summary")
