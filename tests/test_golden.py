"""Golden texts: the whole transformed graph of a small model, pinned to the byte.

They use zerograph's own pytest plugin: `pytest --accept-graphs` writes tests/goldens from what the
code makes now; read the diff before you commit it. The full texts hold for one minor version of torch,
whose decompositions they show; the skeletons hold for all.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zerograph
from tests import models, tiny
from zerograph.golden import GraphGolden
from zerograph.plan import Plan
from zerograph.trace import Trace

GOLDENS = Path(__file__).parent / "goldens"
FULL_TORCH = "2.13"
WORLD = 8
STAGES = range(4)


@functools.cache
def llama() -> Trace:
    return tiny.traced(models.make("llama"), models.batch_for("llama", 0), WORLD)


@functools.cache
def llama_plan(stage: int) -> Plan:
    return tiny.planned(llama(), stage)


@pytest.mark.parametrize("stage", STAGES)
def test_llama(stage: int, graph_golden: GraphGolden) -> None:
    graph_golden(llama_plan(stage), f"llama.stage{stage}", torch=FULL_TORCH)


@pytest.mark.parametrize("stage", STAGES)
def test_llama_skeleton(stage: int, graph_golden: GraphGolden) -> None:
    graph_golden(llama_plan(stage), f"llama.stage{stage}", skeleton=True)


# One option at a time, on small models


def blocks(**more: Any) -> Plan:
    return tiny.planned(tiny.trace_of("blocks", WORLD), 3, **more)


def bf16() -> Plan:
    given = {"bf16": {"enabled": True}}
    trace = tiny.traced(tiny.Blocks(), tiny.batch(), WORLD, tiny.config(3, **given))
    return tiny.planned(trace, 3, **given)


def forward_only() -> Plan:
    with torch.no_grad():
        trace = tiny.traced(tiny.Blocks().eval(), tiny.batch(), WORLD)
    return tiny.planned(trace, 3)


def of_model(name: str) -> Plan:
    return tiny.planned(tiny.traced(models.make(name), models.batch_for(name, 0), WORLD), 3)


ACCUMULATION = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
OPTIONS = {
    "blocks": blocks,
    "blocks.bf16": bf16,
    "blocks.clipping-off": lambda: blocks(gradient_clipping=0.0),
    "blocks.accumulation-4": lambda: blocks(**ACCUMULATION),
    "blocks.forward-only": forward_only,
    "lowrank.frozen": lambda: of_model("lowrank"),
    "gpt2.tied": lambda: of_model("gpt2"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_skeleton(name: str, graph_golden: GraphGolden) -> None:
    graph_golden(OPTIONS[name](), name, skeleton=True)


# The same bytes, whoever plans


def everything(model: nn.Module, inputs: Any, stage: int) -> str:
    """The text after every pass, and the finished plan's signature."""
    made = zerograph.plan(model, tiny.config(stage), example_inputs=inputs, world_size=WORLD)
    texts = made.history.texts()
    return "\n".join([*texts, *made.signature()])


@functools.cache
def reference(stage: int) -> str:
    return everything(tiny.Blocks(), tiny.batch(), stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_rank_changes_nothing(rank: int, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(stage)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", f"10.0.0.{rank}")
    assert everything(tiny.Blocks(), tiny.batch(), stage) == expected


def test_another_process_plans_the_same() -> None:
    """On another rank, with other hashes of strings and other addresses of nodes."""
    code = (
        "import sys; from tests import test_golden as t, models\n"
        "sys.stdout.write(t.everything(models.make('llama'), models.batch_for('llama', 5), 3))"
    )
    env = {**os.environ, "RANK": "7", "LOCAL_RANK": "7", "PYTHONHASHSEED": "7"}
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    texts = llama_plan(3).history.texts()
    assert ran.stdout == "\n".join([*texts, *llama_plan(3).signature()])


@pytest.mark.parametrize("stage", STAGES)
def test_planning_twice_gives_the_same(stage: int) -> None:
    again = tiny.planned(llama(), stage)
    assert again.diff(llama_plan(stage)) == ""
    assert str(again) == str(llama_plan(stage))


def test_meta_model_and_inputs_give_the_same() -> None:
    with torch.device("meta"):
        model = models.make("llama")
    inputs = {name: t.to("meta") for name, t in models.batch_for("llama", 0).items()}
    assert everything(model, inputs, 3) == "\n".join(
        [*llama_plan(3).history.texts(), *llama_plan(3).signature()]
    )


def test_planning_leaves_the_model_as_it_was() -> None:
    model = models.make("llama")
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    zerograph.plan(model, tiny.config(3), example_inputs=models.batch_for("llama", 0), world_size=4)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_every_golden_is_tested() -> None:
    stages = {f"llama.stage{s}{form}.txt" for s in STAGES for form in ("", ".skeleton")}
    expected = stages | {f"{name}.skeleton.txt" for name in OPTIONS}
    assert {path.name for path in GOLDENS.glob("*.txt")} == expected
