"""Which settings fit: the search, its order, and what it says of the rest."""

import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.test_cli import refused, run
from zerograph.config import load_config
from zerograph.cost import CLUSTERS
from zerograph.document import Document
from zerograph.errors import PlanError
from zerograph.fit import (
    Candidate,
    Fit,
    fit,
    micro_batches_of,
    parse_bytes,
    with_micro_batch,
)
from zerograph.levers import LEVERS, MOST, Lever, keep_less, least_of
from zerograph.planning import plan_of
from zerograph.trace import Trace

WORLD = 4
GIVEN = tiny.config(0, train_batch_size=32)
TRACES: dict[int | None, Trace] = {}


def trace_for(micro: int | None) -> Trace:
    if micro not in TRACES:
        model = tiny.Blocks(depth=1)
        TRACES[micro] = tiny.traced(model, tiny.batch(micro or 8), WORLD, GIVEN)
    return TRACES[micro]


def search(budget: int, micros: list[int | None], **more: Any) -> Fit:
    cluster = CLUSTERS["h100"]
    return fit(trace_for, load_config(GIVEN), budget, cluster, WORLD, micros, **more)


def peak(candidate: Candidate) -> int:
    return candidate.memory.peak


def kept_less(candidate: Candidate) -> bool:
    """Whether a lever of activations was used."""
    names = ("activation_budget", "cpu_checkpointing")
    return any(candidate.choice[name] is not None for name in names)


def test_every_candidate_is_the_plan_of_its_config() -> None:
    found = search(10**9, [None])
    assert [c.choice["stage"] for c in found.fits] and not found.exceeds and not found.refused
    for candidate in found.fits:
        made = plan_of(trace_for(None), load_config(candidate.config))
        assert candidate.memory.peak == made.memory.peak
        assert candidate.seconds == made.timeline("h100").seconds
        assert made.graph.stage == candidate.choice["stage"]
    assert {c.choice["stage"] for c in found.fits} == {0, 1, 2, 3}


def test_one_trace_serves_all_levers() -> None:
    asked: list[int | None] = []

    def counted(micro: int | None) -> Trace:
        asked.append(micro)
        return trace_for(micro)

    cluster = CLUSTERS["h100"]
    found = fit(counted, load_config(GIVEN), 10**9, cluster, WORLD, [1, 2, 4, 8])
    assert asked == [1, 2, 4, 8] and len(found.fits) == 16


def test_the_fastest_comes_first_and_the_budget_divides() -> None:
    everything = search(10**9, [2, 8])
    peaks = sorted(c.memory.peak for c in everything.fits)
    budget = peaks[3]
    found = search(budget, [2, 8])
    given = [c for c in found.fits if not kept_less(c)]
    assert [c.memory.peak for c in found.fits] == [p for p in map(peak, found.fits) if p <= budget]
    assert len(given) == 4 and all(c.memory.peak > budget for c in found.exceeds)
    assert len(given) + len([c for c in found.exceeds if not kept_less(c)]) == 8
    seconds = [c.seconds for c in everything.fits]
    assert seconds == sorted(seconds)


def test_larger_micro_batches_are_not_tried_in_vain() -> None:
    found = search(1, [1, 2])
    assert not found.fits and len(found.exceeds) == len(LEVERS[0].values)
    smallest = min(c.memory.peak for c in found.exceeds)
    assert found.exceeds[0].memory.peak == smallest
    why = found.exceeds[-1].why()
    largest = next(iter(found.exceeds[-1].alive.items()))
    assert why.startswith(f"{largest[0]} ") and found.exceeds[-1].memory.peak == sum(
        found.exceeds[-1].alive.values()
    )


def test_accumulation_follows_and_is_paid_for() -> None:
    found = {c.choice["micro-batch"]: c for c in search(10**9, [2, 8], levers=[]).fits}
    assert (found[2].choice["accumulation"], found[8].choice["accumulation"]) == (4, 1)
    once = plan_of(trace_for(2), found[2].config).timeline("h100")
    update = [span for span in once.spans if span.region == "step"]
    backward = max(span.end for span in once.spans if span.region != "step")
    assert update and found[2].seconds == pytest.approx(once.seconds + 3 * backward)


def test_a_lever_is_an_entry_of_a_table() -> None:
    lever = Lever("prefetch", "zero_optimization.stage3_prefetch_bucket_size", (0, 50_000))
    found = search(10**9, [None], levers=[*LEVERS, lever])
    choices = {(c.choice["stage"], c.choice["prefetch"]) for c in found.fits}
    assert choices == {(s, p) for s in range(4) for p in (0, 50_000)}
    peak = {c.choice["prefetch"]: c.memory.gathered for c in found.fits if c.choice["stage"] == 3}
    assert peak[0] < peak[50_000]


def test_what_cannot_be_planned_is_said() -> None:
    lever = Lever("overlap", "zero_optimization.offload_param", (None, {"device": "cpu"}))
    found = search(10**9, [None], levers=[lever])
    assert len(found.fits) == 1 and len(found.refused) == 1
    assert found.refused[0].startswith("overlap {'device': 'cpu'}: ")


def test_micro_batches_divide_the_share_of_a_rank() -> None:
    assert micro_batches_of(load_config(GIVEN), WORLD, None) == [1, 2, 4, 8]
    assert micro_batches_of(load_config(tiny.config(0, train_batch_size=12)), 1, None) == [1, 2, 4]
    assert micro_batches_of(load_config(GIVEN), WORLD, 2) == [2]
    micro = tiny.config(0, train_micro_batch_size_per_gpu=3)
    assert micro_batches_of(load_config(micro), WORLD, None) == [None]


def test_the_global_batch_stays() -> None:
    config = load_config(tiny.config(0, train_batch_size=32, gradient_accumulation_steps=1))
    batch = with_micro_batch(config, 2).batch(WORLD)
    assert (batch.train_batch_size, batch.micro_batch_size, batch.accumulation) == (32, 2, 4)


@pytest.mark.parametrize(
    "given, count",
    [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5 kb", 1500), ("512MiB", 2**29), ("7", 7)],
)
def test_amounts_of_memory(given: str, count: int) -> None:
    assert parse_bytes(given) == count


@pytest.mark.parametrize("given", ["", "GB", "80XB", "-1GB", "0", "nan", "inf", "1e99GB"])
def test_what_is_no_amount_of_memory(given: str) -> None:
    with pytest.raises(PlanError, match="no amount of memory"):
        parse_bytes(given)


# Levers of activations


class Deep(nn.Module):
    """Layers whose activations are most of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(tiny.Block(16, 0.0) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


ROWS = 512
DEEP = tiny.config(0, train_batch_size=ROWS * WORLD)


@functools.cache
def deep(micro: int | None) -> Trace:
    return tiny.traced(Deep(), {"x": torch.ones(micro or ROWS, 16)}, WORLD, DEEP)


def deep_search(
    budget: int, cluster: str = "h100", stages: tuple[int, ...] = (0, 1, 2, 3), **more: Any
) -> Fit:
    return searched([deep(None)], budget, cluster, stages, **more)


def searched(
    traces: Sequence[Trace], budget: int, cluster: str, stages: tuple[int, ...], **more: Any
) -> Fit:
    """One call after the other, as if they were micro-batches."""
    config = load_config({**DEEP, **more})
    levers = [Lever("stage", LEVERS[0].key, stages)]
    given, micro_batches = iter(traces), [None] * len(traces)
    return fit(
        lambda _: next(given), config, budget, CLUSTERS[cluster], WORLD, micro_batches, levers
    )


def test_as_many_activations_as_fit_are_kept() -> None:
    """Every stage fits with a budget; the largest that was planned is near the largest there is."""
    everything = deep_search(10**9)
    assert everything.plans == 4 and not any(map(kept_less, everything.fits))
    budget = min(map(peak, everything.fits)) * 3 // 5
    found = deep_search(budget)
    assert found.fits and all(map(kept_less, found.fits)) and found.plans <= 4 * MOST
    best = found.fits[0]
    assert 0 < best.choice["activation_budget"] < 1 and best.choice["cpu_checkpointing"] is None
    assert peak(best) > 0.9 * budget
    same = [c for c in found.fits if c.choice["stage"] == best.choice["stage"]]
    assert [c.choice["activation_budget"] for c in same][-1] == 0.0
    assert [c.repeating for c in same] == sorted(c.repeating for c in same)
    assert all(c.repeating > 0 for c in found.fits) and everything.fits[0].repeating == 0
    for candidate in same:
        made = plan_of(deep(None), candidate.config)
        assert made.memory.peak == peak(candidate)
        assert candidate.config.compile.activation_budget == candidate.choice["activation_budget"]


def test_activations_go_to_the_host_where_nothing_else_fits() -> None:
    (alone,) = deep_search(1, stages=(3,)).exceeds
    smallest = deep_search(peak(alone) // 2, stages=(3,)).fits[-1]
    assert smallest.choice["activation_budget"] == 0.0
    budget = peak(smallest) - 1
    found = deep_search(budget, stages=(3,))
    assert found.fits and all(c.choice["cpu_checkpointing"] is True for c in found.fits), found
    assert all(c.memory.host > 0 for c in found.fits)
    on_cpu = deep_search(budget, "cpu", stages=(3,))
    assert all(c.choice["cpu_checkpointing"] is None for c in (*on_cpu.fits, *on_cpu.exceeds))


def test_levers_are_tried_only_where_they_may_help() -> None:
    floor = {c.choice["stage"]: c.floor for c in deep_search(10**9).fits}
    found = deep_search(floor[0] - 1)
    assert any(
        line.startswith("stage 0, ") and line.endswith(" are left without any activations")
        for line in found.untried
    )
    assert not any(kept_less(c) for c in found.exceeds if c.choice["stage"] == 0)
    peaks = {c.choice["stage"]: peak(c) for c in deep_search(10**9).fits}
    slow = deep_search(peaks[0] - 1)
    assert slow.plans <= 4 * MOST and all(c.choice["stage"] for c in slow.fits if not kept_less(c))
    given = deep_search(peaks[3] // 2, "cpu", activation_checkpointing={"number_checkpoints": 2})
    assert not any(map(kept_less, (*given.fits, *given.exceeds)))
    assert all(line.endswith(": the config says what is kept") for line in given.untried)


def test_what_would_be_no_faster_with_all_activations_is_left_alone() -> None:
    """A smaller call fits; a larger one does not, and is slower even with everything kept."""
    (small,) = searched([deep(64)], 10**9, "h100", (0,)).fits
    found = searched([deep(64), deep(None)], peak(small), "h100", (0,))
    assert [peak(c) for c in found.fits] == [peak(small)]
    assert len(found.exceeds) == 1 and not kept_less(found.exceeds[0])
    (line,) = found.untried
    assert line.endswith("with all activations kept it is no faster than what fits")


def test_the_largest_budget_that_fits_is_found_in_few_plans() -> None:
    """For a peak that is flat at first and then rises, as the budget does."""

    def plan(settings: Any) -> int:
        asked.append(settings)
        return int(1000 + 9000 * max(0.1, settings.get("compile.activation_budget", 0.0)))

    least = least_of(free=True, hosts=True, blocks=True)
    for budget in (1900, 3000, 5000, 9000):
        asked: list[Any] = []
        keep_less(plan, 10_000, budget, least, free=True)
        peaks = [plan(settings) for settings in list(asked)]
        assert max(p for p in peaks if p <= budget) > 0.9 * budget and len(peaks) <= MOST - 1
        assert not any(len(settings) > 1 for settings in asked)
    asked = []
    keep_less(plan, 10_000, 1000, least, free=True)
    assert asked == least and [len(settings) for settings in least] == [1, 2]


# On the command line

FACTORY = """
import torch
from tests import tiny

def pair(batch):
    return tiny.Mlp(), {name: torch.empty(batch, 8) for name in ("x", "target")}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config with a global batch of 16, in a directory with a factory for any micro-batch."""
    (tmp_path / "fitted.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tiny.config(0, train_batch_size=16)))
    return path


def test_fit_command(config: Path, tmp_path: Path) -> None:
    command = ["plan", "fitted:pair", "--config", config, "--world-size", 8]
    found = json.loads(run(*command, "--fit", "1GB", "--json").stdout)
    assert len(found["fits"]) == 8 and found["budget"] == 10**9
    peaks = sorted(entry["peak"] for entry in found["fits"])
    best = tmp_path / "best.json"
    result = run(*command, "--fit", str(peaks[2]), "-o", best)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0] == f"fits in {peaks[2]}, the fastest on h100 first"
    assert lines[1].split()[0] == "stage" and lines[1].split()[-2:] == ["again", "peak"]
    fit = lines.index("does not fit") - 3
    assert fit >= sum(peak <= peaks[2] for peak in peaks) >= 3
    assert re.fullmatch(r"\d+ plans; .*", lines[-1])
    saved, first = Document.load(best), lines[2].split()
    assert saved.memory.peak <= peaks[2] and str(saved.stage) == first[0]
    micro = lines[1].split().index("micro-batch")
    assert saved.config["train_micro_batch_size_per_gpu"] == int(first[micro])
    nothing = run(*command, "--fit", "1KB")
    assert nothing.exit_code == 1 and nothing.stdout.splitlines()[1] == "  nothing"


def test_fit_needs_inputs_of_any_size(config: Path) -> None:
    inputs = ["--input", "x=f32[2,8]", "--input", "target=f32[2,8]"]
    command = ["plan", "tests.tiny:Mlp", "--config", config, "--world-size", 4, "--fit", "1GB"]
    assert "--fit tries several micro-batches" in refused(*command, *inputs)
    assert run(*command, *inputs, "--batch", 2).exit_code == 0
