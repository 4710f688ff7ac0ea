"""LAMB from the config to the step: numbers beside float64 on whole parameters, graph, skips, states."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerograph
from tests import tiny
from tests.ranks import run_ranks
from tests.test_cost import TWICE
from tests.traces import captured_once
from zerograph import ops
from zerograph.codegen.rules import RULES, TINY, rule_of
from zerograph.cost import work_of
from zerograph.errors import PlanError
from zerograph.nodes import is_call
from zerograph.runtime.norms import by_parameter, by_run

WIDTH = 16
"""Of models: a matrix then lies on both ranks in fp32 and in bf16."""
LAMB = {"type": "Lamb", "params": {"lr": 1e-2, "weight_decay": 0.1, "max_coeff": 0.5}}
TRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clipping": 0.05},
    "bf16": {"bf16": {"enabled": True}},
}
SKIPPING: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64.0}},
}


class Eager:
    """LAMB, arXiv:1904.00962 algorithm 2, in float64 on whole parameters and whole gradients."""

    def __init__(self, values: dict[str, Tensor], options: dict[str, dict[str, Any]]) -> None:
        self.values = {name: value.detach().double() for name, value in values.items()}
        self.options = options
        self.moments = {
            name: [torch.zeros_like(value), torch.zeros_like(value)]
            for name, value in self.values.items()
        }
        self.counts = dict.fromkeys(self.values, 0)
        self.ratios: list[float] = []

    def step(self, gradients: dict[str, Tensor | None], max_norm: float = 0.0) -> None:
        given = {n: g.double() for n, g in gradients.items() if g is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in given.values()))
        factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        for name, gradient in given.items():
            self._update(name, factor * gradient, self.options[name])

    def _update(self, name: str, gradient: Tensor, options: dict[str, Any]) -> None:
        self.counts[name] += 1
        (first, second), (beta1, beta2) = self.moments[name], options["betas"]
        first.mul_(beta1).add_((1 - beta1) * gradient)
        second.mul_(beta2).add_((1 - beta2) * gradient * gradient)
        one = two = 1.0
        if options["bias_correction"]:
            one, two = 1 - beta1 ** self.counts[name], 1 - beta2 ** self.counts[name]
        value = self.values[name]
        change = first / one / ((second / two).sqrt() + options["eps"])
        change = change + options["weight_decay"] * value
        sizes = float(value.norm()), float(change.norm())
        ratio = 1.0
        if all(sizes):
            ratio = min(max(sizes[0] / sizes[1], options["min_coeff"]), options["max_coeff"])
        self.ratios.append(ratio)
        self.values[name] = value - options["lr"] * ratio * change


def blocks() -> tiny.Blocks:
    torch.manual_seed(0)
    return tiny.Blocks(width=WIDTH)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Norms and biases apart, with options of their own."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = {n for n, _ in named if "norm" in n or "bias" in n}
    own = {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.95), "max_coeff": 10.0}
    return [
        {"params": [p for n, p in named if n not in plain]},
        {"params": [p for n, p in named if n in plain], **own, "bias_correction": False},
    ]


def eager_of(model: nn.Module, engine: zerograph.Engine) -> Eager:
    """The loop with the options of the engine's groups."""
    group_of = {id(p): group for group in engine.optimizer.param_groups for p in group["params"]}
    options = {n: group_of[id(engine.module.get_parameter(n))] for n in trained(model)}
    return Eager(trained(model), options)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def compiled(model: nn.Module, stage: int, **more: Any) -> zerograph.Engine:
    given = {"params": groups(model)} if isinstance(model, tiny.Blocks) else {}
    config = {"optimizer": LAMB, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    return zerograph.compile(model, {**config, **more}, param_groups=given.get("params"))


def pieces(engine: zerograph.Engine) -> dict[str, dict[str, tuple[Tensor, int]]]:
    """By parameter, this rank's part of the master and of each state, and where it begins."""
    found = {}
    for param in engine.state.layout.params.values():
        storage = engine.state.storages[param.bucket]
        if storage.master is not None:
            low, high = engine.state.piece(param)
            size = storage.shard.numel()
            begin = (size * engine.state.world.rank if engine.state.stage else 0) + low
            flats = {"master": storage.master, **storage.states}
            first = max(begin - param.offset, 0)
            found[param.name] = {k: (flat[low:high], first) for k, flat in flats.items()}
    return found


def error(engine: zerograph.Engine, eager: Eager) -> float:
    """The largest |a - b| / (1 + |b|) of this rank's masters and moments."""
    worst = 0.0
    for name, parts in pieces(engine).items():
        first, second = eager.moments[name]
        wholes = {"master": eager.values[name], "exp_avg": first, "exp_avg_sq": second}
        for key, (part, begin) in parts.items():
            if part.numel():
                right = wholes[key].flatten()[begin : begin + part.numel()]
                worst = max(worst, float(((part - right).abs() / (1 + right.abs())).max()))
    return worst


def step(engine: zerograph.Engine, seed: int) -> dict[str, Tensor | None]:
    """One step; answers the whole mean gradients before clipping."""
    engine.backward(engine(**tiny.batch(4 + seed, WIDTH))["loss"])
    gradients = {n: None if g is None else g.clone() for n, g in engine.gradients().items()}
    engine.step()
    return gradients


# Numbers


@captured_once()
def _hundreds(rank: int, world: int, stage: int) -> dict[str, dict[str, Any]]:
    return {name: _hundred(rank, stage, given) for name, given in TRAINED.items()}


def _hundred(rank: int, stage: int, given: dict[str, Any]) -> dict[str, Any]:
    model = blocks()
    engine = compiled(model, stage, **given)
    eager = eager_of(blocks(), engine)
    errors = []
    for index in range(100):
        gradients = step(engine, (index + rank) % 7)
        eager.step(gradients, given.get("gradient_clipping", 0.0))
        errors.append(error(engine, eager))
    cut = [n for n, parts in pieces(engine).items() if _is_cut(engine, n, parts["master"][0])]
    return {"error": max(errors), "cut": cut, "ratios": eager.ratios, "copies": _copies(engine)}


def _is_cut(engine: zerograph.Engine, name: str, part: Tensor) -> bool:
    return 0 < part.numel() < engine.state.layout.params[name].numel


def _copies(engine: zerograph.Engine) -> bool:
    """Whether what is gathered are the masters, rounded."""
    storages = [s for s in engine.state.storages.values() if s.master is not None]
    return all(torch.equal(s.shard, s.master.to(s.shard.dtype)) for s in storages)


@pytest.mark.parametrize("stage", range(4))
def test_a_hundred_steps_beside_float64(stage: int) -> None:
    """With groups, parameters cut between ranks, and trust ratios within and at their bounds."""
    for rank in run_ranks(2, _hundreds, stage):
        for name, found in rank.items():
            assert found["error"] < 2e-5 and found["copies"], name
            assert bool(found["cut"]) == (stage > 0), name
            ratios = set(found["ratios"])
            assert {0.01, 0.5, 1.0} <= ratios and len(ratios) > 99, name


@pytest.mark.parametrize("target", ["torch", "cpp"])
def test_one_rank(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROGRAPH_KERNELS", target)
    for stage in (0, 1, 3):
        engine = compiled(blocks(), stage)
        eager = eager_of(blocks(), engine)
        for index in range(10):
            eager.step(step(engine, index))
        assert error(engine, eager) < 2e-6


def _unused(rank: int, world: int, stage: int) -> list[Any]:
    """Four steps; only the third uses all parameters."""
    torch.manual_seed(0)
    model = tiny.Partly()
    engine = compiled(model, stage)
    torch.manual_seed(0)
    eager = eager_of(tiny.Partly(), engine)
    found: list[Any] = []
    for index in range(4):
        output = engine(**tiny.batch(4 + index + rank))
        engine.backward(output["loss"] + output["aside"] if index == 2 else output["loss"])
        gradients = dict(engine.gradients())
        engine.step()
        eager.step(gradients)
        found.append(error(engine, eager))
    return [max(found), dict(eager.counts)]


@pytest.mark.parametrize("stage", range(4))
def test_unused_parameters_are_left_alone(stage: int) -> None:
    for worst, counts in run_ranks(2, _unused, stage):
        assert worst < 2e-6
        assert counts["other.weight"] == 1 and counts["head.weight"] == 4


# Skips and states


def _everything(engine: zerograph.Engine) -> list[Tensor]:
    engine.state.ahead.settle()
    storages = engine.state.storages.values()
    flats = [(s.full, s.shard, s.master, *s.states.values()) for s in storages]
    steps = [entry["step"] for entry in engine.optimizer.state.values()]
    return [t.clone() for t in (*itertools.chain(*flats), *steps) if t is not None]


@captured_once()
def _skips(rank: int, world: int) -> dict[Any, list[bool]]:
    return {
        (name, stage): _skipped(rank, stage, given)
        for name, given in SKIPPING.items()
        for stage in range(4)
    }


def _skipped(rank: int, stage: int, given: dict[str, Any]) -> list[bool]:
    """The third of five steps has an infinity in the batch of rank 1."""
    engine, other = compiled(blocks(), stage, **given), compiled(blocks(), stage, **given)
    found = []
    for index in range(5):
        batch = tiny.batch(4 + index, WIDTH)
        if index == 2 and rank == 1:
            batch["x"] = batch["x"] * math.inf
        before = _everything(engine)
        torch.manual_seed(index)
        engine.backward(engine(**batch)["loss"])
        engine.step()
        same = all(map(torch.equal, before, _everything(engine)))
        found.append(same == (index == 2) and engine.was_step_applied() == (index != 2))
        if index != 2:
            torch.manual_seed(index)
            other.backward(other(**batch)["loss"])
            other.step()
    return [*found, all(map(torch.equal, _everything(engine), _everything(other)))]


def test_a_skipped_step_leaves_everything_as_it_was() -> None:
    for report in run_ranks(2, _skips):
        assert len(report) == 4 * len(SKIPPING)
        for key, found in report.items():
            assert found == [True] * 6, key


@captured_once()
def _all_resumed(rank: int, world: int) -> list[bool]:
    return [_resumed(rank, stage) for stage in (0, 2, 3)]


def _resumed(rank: int, stage: int) -> bool:
    engine = compiled(blocks(), stage)
    for index in range(3):
        step(engine, index + rank)
    other = compiled(blocks(), stage)
    other.load_state_dict(engine.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(engine.optimizer.state_dict()))
    for each in (engine, other):
        torch.manual_seed(1)
        step(each, rank)
    return all(map(torch.equal, _everything(engine), _everything(other)))


def test_states_are_saved_and_loaded() -> None:
    assert run_ranks(2, _all_resumed) == [[True] * 3] * 2


# Refused


def test_eps_0_of_a_group_is_refused() -> None:
    """Also what is 0 in fp32, in the config as well, and a change while training."""
    for eps in (0.0, 1e-50, math.nan):
        model = blocks()
        given = groups(model)
        given[1]["eps"] = eps
        config = {"optimizer": LAMB}
        with pytest.raises(PlanError, match=r"parameter group 1 has eps=.*lamb needs .*1e-08"):
            zerograph.compile(model, config, param_groups=given)
    with pytest.raises(PlanError, match="parameter group 0 has eps=1e-50"):
        compiled(blocks(), 3, optimizer={"type": "Lamb", "params": {"eps": 1e-50}})
    engine = compiled(blocks(), 3)
    engine.optimizer.param_groups[1]["eps"] = 0.0
    with pytest.raises(PlanError, match=r"parameter group 1 now has eps=0\.0"):
        step(engine, 0)


def test_the_smallest_eps_trains() -> None:
    """Gradients of zero, padding among them, with the least eps that is not refused."""
    model = blocks()
    given = [{**group, "eps": TINY} for group in groups(model)]
    engine = zerograph.compile(model, {"optimizer": LAMB}, param_groups=given)
    engine.backward(engine(**tiny.batch(4, WIDTH))["loss"] * 0)
    engine.step()
    assert all(value.isfinite().all() for value in engine.destroy().state_dict().values())


# The graph


def region(stage: int, **more: Any) -> list[str]:
    plan = tiny.planned(tiny.trace_of("blocks"), stage, optimizer=LAMB, **more)
    text = plan.text().partition("step(")[2]
    return [line.partition("  # ")[0].strip() for line in text.splitlines()[1:-1]]


def test_the_step_measures_exchanges_once_and_applies() -> None:
    lines = [line for line in region(3) if not line.startswith("zero.gather_ahead")]
    assert lines[lines.index("%control: f32[2] = %finish[1]") + 1 :] == [
        *(
            f"%b{i}.norms: f64[{n},2] = zero.measure.lamb %b{i}.shard, %b{i}.sum, "
            f"[%b{i}.exp_avg, %b{i}.exp_avg_sq], %hyper, %used, control=%control"
            for i, n in ((3, 2), (2, 4), (1, 4))
        ),
        "%norms: f64[8,10,2] = zero.gather_norms [%b3.norms, %b2.norms, %b1.norms]",
        "zero.wait %norms",
        "%b3.totals: f64[2,2] = zero.sum_norms %norms, 0, 2",
        "%b2.totals: f64[4,2] = zero.sum_norms %norms, 2, 4",
        "%b1.totals: f64[4,2] = zero.sum_norms %norms, 6, 4",
        *(
            f"zero.update.lamb %b{i}.shard, %b{i}.sum, [%b{i}.exp_avg, %b{i}.exp_avg_sq], "
            f"%hyper, %used, control=%control, norms=%b{i}.totals"
            for i in (1, 2, 3)
        ),
        "return norm=%norm",
    ]


def test_at_stage_0_nothing_is_exchanged() -> None:
    lines = region(0, gradient_clipping=0.0)
    assert not any("gather_norms" in line or "sum_norms" in line for line in lines)
    assert lines[-2].endswith("%hyper, %used, norms=%b3.norms")


@pytest.mark.parametrize("stage", [1, 2])
def test_masters_are_measured_before_copies_are_refreshed(stage: int) -> None:
    plan = tiny.planned(tiny.trace_of("half"), stage, optimizer=LAMB, fp16={"enabled": True})
    kinds = [line.split()[1] for line in plan.signature() if line.startswith("step")]
    assert kinds.count("gather_norms") == 1
    assert kinds.index("gather_norms") < kinds.index("refresh")
    assert "zero.measure.lamb %b3.master, %b3." in plan.text()
    assert plan.bytes("gather_norms") == 8 * 10 * 2 * 8


def test_both_halves_move_what_they_read_and_write() -> None:
    graph = tiny.planned(
        tiny.trace_of("half"), 3, optimizer=LAMB, **TWICE, **tiny.GIVEN["half"]
    ).graph
    for node in graph.nodes():
        numel = node.args[0].meta["val"].numel() if is_call(node, ops.measure, ops.update) else 0
        if is_call(node, ops.measure):  # master, gradient, two states there and back
            assert work_of(node).nbytes == numel * (4 + 4 + 2 * 8)
        if is_call(node, ops.update):  # master there and back, two states, the copy
            assert work_of(node).nbytes == numel * (8 + 2 * 4 + 2)


# Parts


def test_sums_go_from_runs_to_parameters_and_back() -> None:
    sums = torch.arange(4.0).double().view(2, 2)
    spread = by_parameter(sums, (1, 3), 5)
    assert spread.tolist() == [[0, 0], [0, 1], [0, 0], [2, 3], [0, 0]]
    assert torch.equal(by_run(spread, (1, 3)), sums)
    assert by_parameter(sums, (0, 1), 2) is sums and by_run(sums, (0, 1)) is sums
    assert by_parameter(sums[:0], (), 2).tolist() == [[0, 0], [0, 0]]


def test_a_rule_is_known_by_its_label() -> None:
    assert rule_of("lamb") is RULES["lamb"] and rule_of("sgd|sgd.momentum") is RULES["sgd"]
    assert rule_of("adamw.amsgrad") is RULES["adamw"] and rule_of("NAdam") is None
