"""`compile.update_in_backward`: the same bits, gradients that end in the backward, and what it excludes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerograph
from tests import tiny
from tests.oracle import differing
from tests.ranks import run_ranks
from zerograph import Engine, ops, pipeline
from zerograph.config import load_config
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.nodes import bucket_of, is_call, region_of, role_of
from zerograph.optimizer import optimizer_of
from zerograph.passes import UpdateInBackward
from zerograph.plan import Plan
from zerograph.planning import passes_for

FAR = 10**9
EARLY = {"gradient_clipping": 0.0, "compile": {"update_in_backward": True}}
LATE = {"gradient_clipping": 0.0}
STEPS = 3


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return tiny.Blocks(depth=3, dropout=0.0)


def partly() -> nn.Module:
    torch.manual_seed(0)
    return tiny.Partly()


def engine_for(model: nn.Module, stage: int, early: bool, reuse: int = 0, **more: Any) -> Engine:
    zero = {"stage": stage, "stage3_max_reuse_distance": reuse}
    given = tiny.config(stage, **(EARLY if early else LATE) | more | {"zero_optimization": zero})
    return zerograph.compile(model, given)


def batch(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return {name: torch.randn(4, 8, generator=generator) for name in ("x", "target")}


def step(engine: Engine, rank: int, index: int) -> Tensor:
    loss: Tensor = engine(**batch(rank, index))["loss"]
    engine.backward(loss)
    engine.step()
    return loss.detach()


# The same bits

CASES: dict[str, tuple[Any, int, int, dict[str, Any]]] = {
    "stage 0": (blocks, 0, 0, {}),
    "stage 1": (blocks, 1, 0, {}),
    "stage 2 in bf16": (blocks, 2, 0, {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    "stage 3 kept": (blocks, 3, FAR, {"scheduler": {"type": "WarmupLR"}}),
    "stage 3 freed": (
        blocks,
        3,
        0,
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
    ),
    "stage 1, unused parameters": (partly, 1, 0, {}),
    "stage 3, unused parameters": (partly, 3, 0, {}),
}


def _trained(rank: int, world: int) -> dict[str, list[str]]:
    """By case what differs between updates in the backward and in the step."""
    wrong = {}
    for name, (make, stage, reuse, more) in CASES.items():
        found = []
        for early in (True, False):
            engine = engine_for(make(), stage, early, reuse, **more)
            losses, norms = [], []
            for index in range(STEPS):
                losses.append(step(engine, rank, index))
                norms.append(engine.get_global_grad_norm())
            if early and not engine.plan.count("update", region="backward"):
                losses.append(torch.zeros(()))
            states = engine.optimizer.state_dict()["state"]  # type: ignore[union-attr]
            flat = {f"{i}.{k}": v for i, each in states.items() for k, v in each.items()}
            numbers = {
                "losses": torch.stack(losses),
                "norms": torch.tensor(norms, dtype=torch.float64),
            }
            found.append({**numbers, **flat, **engine.state_dict()})
            engine.destroy()
        wrong[name] = differing(*found)
    return wrong


def _whoever_reads(rank: int, world: int) -> list[str]:
    """What reads or writes parameters between steps, and between a backward and its step, finds new ones."""
    wrong = []
    for stage in (2, 3):
        early, late = (engine_for(blocks(), stage, each, FAR) for each in (True, False))
        for engine in (early, late):
            loss = engine(**batch(rank, 0))["loss"]
            engine.backward(loss)
            if engine is late:
                engine.step()
        wrong += differing(early.state_dict(), late.state_dict())
        for engine in (early, late):
            with zerograph.gathered(engine), torch.no_grad():
                next(p for p in engine.module.parameters() if p.requires_grad).mul_(0.5)
        early.step()
        for index in (1, 2):
            losses = [step(engine, rank, index) for engine in (early, late)]
            wrong += [f"loss {index} at stage {stage}"] * (not torch.equal(*losses))
        wrong += differing(early.state_dict(), late.state_dict())
    return wrong


def _both(rank: int, world: int) -> tuple[dict[str, list[str]], list[str]]:
    return _trained(rank, world), _whoever_reads(rank, world)


def test_two_ranks_train_to_the_same_bits() -> None:
    for trained, read in run_ranks(2, _both):
        assert trained == {name: [] for name in CASES}
        assert read == []


# The graph


def planned(stage: int, name: str = "blocks", reuse: int = 0, **more: Any) -> TrainGraph:
    zero = {"stage": stage, "stage3_max_reuse_distance": reuse}
    return tiny.planned(tiny.trace_of(name), stage, **EARLY | more, zero_optimization=zero).graph


@pytest.mark.parametrize("stage", range(4))
def test_no_gradient_is_kept(stage: int) -> None:
    graph = planned(stage)
    assert not graph.placeholders("kept")
    assert not any(is_call(n, ops.accumulate, ops.norm_partials) for n in graph.nodes())
    assert {g.kind for g in graph.gradients} == {"squares"}
    assert [bucket_of(n) for n in graph.nodes("backward") if is_call(n, ops.update)] == [
        "b3",
        "b2",
        "b1",
    ]
    late = tiny.planned(tiny.trace_of("blocks"), stage, **LATE).memory
    early = tiny.planned(tiny.trace_of("blocks"), stage, **EARLY).memory
    assert early.gradients == 0 < late.gradients
    assert early.peak - late.peak < 4 * 256, "one more bucket's buffer is under way"


@pytest.mark.parametrize("stage", [1, 2])
def test_refreshes_of_what_is_needed_last_start_in_the_backward(stage: int) -> None:
    graph = planned(stage)
    refreshes = [n for n in graph.nodes() if is_call(n, ops.refresh)]
    found = [(region_of(n), bucket_of(n)) for n in refreshes]
    assert found == [("backward", "b3"), ("step", "b1"), ("step", "b2")]
    (start,) = (n for n in graph.nodes("step") if is_call(n, ops.gather_partials))
    (wait,) = start.users
    assert all(start < refresh < wait for refresh in refreshes[1:]), "before the step waits"


def test_gathers_of_what_is_kept_all_start_in_the_step_before() -> None:
    trace = tiny.traced(blocks(), tiny.batch(), 8)

    def of(reuse: int, more: dict[str, Any] = EARLY) -> Plan:
        zero = {"stage": 3, "stage3_max_reuse_distance": reuse}
        return tiny.planned(trace, 3, **more, zero_optimization=zero)

    def starts(plan: Plan) -> list[tuple[str, str]]:
        found = [n for n in plan.graph.nodes() if is_call(n, ops.gather_ahead)]
        return [(region_of(n), bucket_of(n)) for n in found]

    freed, kept, late = of(0), of(FAR), of(FAR, LATE)
    assert starts(freed) == [("backward", "b2"), ("step", "b0"), ("step", "b1")]
    assert starts(kept) == [("backward", "b4"), *(("step", f"b{i}") for i in range(4))]
    assert "backward gather_ahead b4 512 bytes f32" in kept.signature()
    frozen = kept.memory.gathered_elements - late.memory.gathered_elements
    assert frozen == 128, "b0 is alive beside the others, until it is read"
    assert kept.peak - late.peak < 4 * frozen


def test_an_update_stands_behind_the_last_read_of_its_bucket() -> None:
    graph = tiny.trace_of("blocks").graph.copy()
    config = load_config(tiny.config(2, **EARLY))
    passes = passes_for(config, graph, ("loss",), optimizer_of(config, graph.layout))
    pipeline.run(graph, passes[:-2])
    views = [n for n in graph.nodes("backward") if is_call(n, ops.param) and bucket_of(n) == "b3"]
    with graph.inserting(graph.end("backward"), "backward") as insert:
        late = insert(ops.param, *views[0].args)
    assert isinstance(passes[-2], UpdateInBackward)
    passes[-2].apply(graph)
    (update,) = (n for n in graph.nodes("backward") if is_call(n, ops.update) and late < n)
    assert bucket_of(update) == "b3"


def test_ranks_ask_each_other_at_the_start_of_the_backward() -> None:
    nodes = planned(2, "partly").nodes("backward")
    assert is_call(nodes[0], ops.any_rank)
    (update,) = (n for n in nodes if is_call(n, ops.update))
    assert is_call(update.args[5], ops.wait) and update.args[5].args[0] is nodes[0]


def test_a_gradient_lives_until_its_update() -> None:
    graph = planned(2)
    for update in (n for n in graph.nodes("backward") if is_call(n, ops.update)):
        grad = update.args[1]
        assert all(user is update or is_call(user, ops.squares) for user in grad.users)
        assert role_of(update.args[0]).kind == "shard"


# What it excludes


@pytest.fixture
def alone() -> Engine:
    return engine_for(blocks(), 2, True)


def test_nothing_comes_between_a_backward_and_its_step(alone: Engine) -> None:
    with pytest.raises(PlanError, match="before any forward"):
        alone.step()
    first, second = (alone(**batch(0, index))["loss"] for index in range(2))
    alone.backward(first, retain_graph=True)
    for call, says in (
        (lambda: alone.backward(second), "a second backward"),
        (lambda: alone.backward(first), "a second backward"),
        (lambda: alone(**batch(0, 2)), "a call of the engine"),
        (alone.zero_grad, r"engine.zero_grad\(\)"),
    ):
        with pytest.raises(PlanError, match=f"{says} between a backward and engine.step"):
            call()
    alone.step()
    alone.zero_grad()
    with pytest.raises(PlanError, match=r"parameters were changed .* between this forward"):
        alone.backward(second)
    with pytest.raises(PlanError, match="before any backward since the last update"):
        alone.step()
    step(alone, 0, 3)
    assert alone.global_steps == 2 and alone.was_step_applied()


def test_gradients_cannot_be_read(alone: Engine) -> None:
    with pytest.raises(PlanError, match=r"gradients\(\): with compile.update_in_backward"):
        alone.gradients()


def test_a_backward_within_gathered_is_refused(alone: Engine) -> None:
    loss = alone(**batch(0, 0))["loss"]
    with zerograph.gathered(alone), pytest.raises(PlanError, match="update_in_backward"):
        alone.backward(loss)


class Own(torch.optim.Optimizer):
    """A user's class: plain descent."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])


def test_what_it_needs_to_know_at_compile() -> None:
    micro = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(PlanError, match=r"gradient_accumulation_steps is 2.*set it to 1"):
        engine_for(blocks(), 2, True, **micro)
    given = tiny.config(2, **EARLY)
    del given["optimizer"]
    with pytest.raises(PlanError, match="there is no optimizer to apply"):
        zerograph.compile(blocks(), given)
    with pytest.raises(PlanError, match="Own is no rule"):
        zerograph.compile(blocks(), {**given, "zero_allow_untested_optimizer": True}, optimizer=Own)
