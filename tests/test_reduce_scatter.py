"""`zero_optimization.reduce_scatter`: all-reduced buckets, of which ranks keep slices, have the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

import zerograph
from tests import tiny
from tests.oracle import differing
from tests.ranks import run_ranks
from tests.traces import captured_once
from zerograph import ops
from zerograph.cost import CLUSTERS
from zerograph.nodes import is_call, region_of
from zerograph.passes.lower import starts_collective
from zerograph.plan import Plan

STEPS = 2
TWICE = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
EARLY = {"gradient_clipping": 0.0, "compile": {"update_in_backward": True}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 1, in the step": (1, TWICE | {"communication_data_type": "bf16"}),
    "stage 2, divided": (2, {"gradient_predivide_factor": 3.0}),
    "stage 3, updated in the backward": (3, EARLY),
}
"""By name the stage, and other keys."""


def config(case: str, scatters: bool) -> dict[str, Any]:
    stage, more = CASES[case]
    made = tiny.config(stage, **more)
    made["zero_optimization"]["reduce_scatter"] = scatters
    return made


def _trained(rank: int, case: str, scatters: bool) -> dict[str, Tensor]:
    """Mean gradients, norms, and after some steps parameters and states."""
    torch.manual_seed(0)
    engine = zerograph.compile(tiny.Blocks(dropout=0.0), config(case, scatters))
    generator, found, index = torch.Generator().manual_seed(rank), {}, 0
    while index < STEPS:
        inputs = {n: torch.randn(4, tiny.WIDTH, generator=generator) for n in ("x", "target")}
        engine.backward(engine(**inputs)["loss"])
        if not engine.plan.config.compile.update_in_backward:
            means = {n: g for n, g in engine.gradients().items() if g is not None}
            found |= {f"gradient of {n} {index}": g for n, g in means.items()}
        index += engine.is_gradient_accumulation_boundary()
        engine.step()
    found["norm"] = torch.tensor(engine.get_global_grad_norm(), dtype=torch.float64)
    states = engine.optimizer.state_dict()["state"]  # type: ignore[union-attr]
    found |= {f"{i}.{k}": v for i, each in states.items() for k, v in each.items()}
    found |= engine.state_dict()
    summed = {n.args[1] for n in engine.plan.graph.nodes() if is_call(n, ops.all_reduce)}
    assert scatters or len(summed) == 3, "each bucket is all-reduced"
    engine.destroy()
    return found


@captured_once()
def _all_differing(rank: int, world: int) -> dict[str, list[str]]:
    return {
        case: differing(*(_trained(rank, case, scatters) for scatters in (False, True)))
        for case in CASES
    }


def test_two_ranks_get_the_same_bits() -> None:
    """Groups of ranks are in test_mesh.py."""
    assert run_ranks(2, _all_differing) == [{case: [] for case in CASES}] * 2


def test_one_rank_has_nothing_to_cut() -> None:
    case = "stage 2, divided"
    with captured_once():
        assert not differing(*(_trained(0, case, scatters) for scatters in (False, True)))


# The plan


def planned(stage: int, scatters: bool = False, **more: Any) -> Plan:
    zero = {"stage": stage, "stage3_max_reuse_distance": 0, "reduce_scatter": scatters}
    algorithm = more.pop("algorithm", "point-to-point")
    return tiny.planned(tiny.trace_of("blocks"), stage, algorithm, **more, zero_optimization=zero)


REDUCED = [
    "%b3.whole: f32[128] = zero.all_reduce %b3.grad",
    "zero.wait %b3.whole",
    "%b3.mean: f32[16] = zero.partition %b3.whole",
    "%b3.sum: f32[16] = zero.accumulate %b3.kept, %b3.mean",
]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_keeps_its_slice_of_what_is_summed(stage: int) -> None:
    plan = planned(stage)
    shown = [line.partition("#")[0].strip() for line in str(plan).splitlines()]
    assert [line for line in shown if line in REDUCED] == REDUCED
    assert plan.count("all_reduce", region="backward") == 3 and not plan.count("reduce_scatter")
    assert not plan.advisory


def test_in_the_step_where_that_reduces() -> None:
    plan = planned(1, **TWICE)
    assert plan.count("all_reduce", region="step") == plan.count("all_reduce") == 3
    slices = [n for n in plan.graph.nodes() if is_call(n, ops.partition)]
    assert {region_of(node) for node in slices} == {"step"}
    assert plan.traffic["all_reduce"] == planned(1, True, **TWICE).traffic["reduce_scatter"]


def test_stage_0_keeps_all_in_any_case() -> None:
    assert str(planned(0)) == str(planned(0, True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_moves_twice_the_bytes(stage: int) -> None:
    """A bucket is as many bytes; each goes over a link twice."""
    whole, slices = planned(stage, algorithm="native"), planned(stage, True, algorithm="native")
    assert whole.bytes("all_reduce") == slices.bytes("reduce_scatter") > 0
    assert whole.memory.states == slices.memory.states
    h100 = CLUSTERS["h100"]
    sent = [h100.bytes_per_link(kind, 2**20, 8) for kind in ("all_reduce", "reduce_scatter")]
    assert sent[0] == 2 * sent[1]
    busy = [plan.timeline(h100).busy["communication"] for plan in (whole, slices)]
    assert busy[0] > busy[1]


@pytest.mark.parametrize("algorithm, start", [("native", "all_reduce_"), ("", "all_reduce")])
def test_what_runs(algorithm: Any, start: str) -> None:
    """The slice is a copy, so that the bucket can go."""
    program = planned(2, algorithm=algorithm or "point-to-point").program("backward")
    nodes = program.module.graph.nodes
    starts = [str(n.target).rpartition("functional.")[2] for n in nodes if starts_collective(n)]
    assert [each.partition(".")[0] for each in starts] == [start] * 3
    parts = [n for n in nodes if n.target == "part"]
    assert len(parts) == 3 and {n.args[2] for n in parts} == {""}
