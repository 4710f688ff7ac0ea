"""Optimizers: the rules beside torch's, a user's own instance or class, and the engine's as torch's."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

import zerograph
from tests.oracle import differing
from tests.ranks import run_ranks
from tests.tiny import Mlp, Partly, batch
from tests.traces import captured_once
from zerograph.codegen.dispatch import update
from zerograph.codegen.rules import LION, RULES, Run
from zerograph.errors import PlanError
from zerograph.plan import Plan

O = torch.optim  # noqa: E741
Make = Callable[[Any], Optimizer]
OPT_IN = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}


pytestmark = pytest.mark.usefixtures("torchs_bits")


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Norms and biases apart, with options of their own."""
    named = list(model.named_parameters())
    plain = [p for n, p in named if "norm" in n or "bias" in n]
    decayed = [p for n, p in named if not ("norm" in n or "bias" in n)]
    return [{"params": decayed, **options}, {"params": plain, "lr": 3e-3, "weight_decay": 0.0}]


def train(engine: zerograph.Engine, steps: int = 1, seed: int = 0) -> None:
    for step in range(steps):
        engine.backward(engine(**batch(4 + step + seed)))
        engine.step()


def train_eagerly(model: nn.Module, optimizer: Optimizer, steps: int = 1, seed: int = 0) -> None:
    for step in range(steps):
        model(**batch(4 + step + seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


def refusal(optimizer: Any, model: nn.Module | None = None, **config: Any) -> str:
    with pytest.raises(PlanError) as caught:
        zerograph.compile(model or mlp(), config, optimizer=optimizer)
    return str(caught.value)


# Rules


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adagrad", {}),
        ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2}),
        ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
        ("AdamW", {"maximize": True}),
        ("SGD", {"lr": 1e-5, "maximize": True, "momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_config_optimizers_have_torchs_bits(name: str, options: dict[str, Any]) -> None:
    """A hundred steps of the engine and of torch's unfused loop."""
    params = {"lr": 1e-2, **options}
    config = {"optimizer": {"type": name, "params": params}, "gradient_clipping": 0.0}
    engine, model = zerograph.compile(mlp(), config), mlp()
    decay = {"weight_decay": 0.0} if name == "AdamW" else {}
    reference = getattr(O, name)(model.parameters(), foreach=False, **{**decay, **params})
    for _ in range(25):
        train(engine, 4)
        train_eagerly(model, reference, 4)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not differing(engine.state_dict(), model.state_dict())


def test_adagrads_defaults_are_torchs() -> None:
    config = {"optimizer": {"type": "adagrad"}, "gradient_clipping": 0.0}
    engine, model = zerograph.compile(mlp(), config), mlp()
    train(engine, 2)
    train_eagerly(model, O.Adagrad(model.parameters(), foreach=False), 2)
    assert not differing(engine.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize(("corrects", "moves"), [(True, 1e-2), (False, 5e-3)])
def test_adams_bias_may_be_left_in(kind: str, corrects: bool, moves: float) -> None:
    """A first step is lr times the gradient's sign; uncorrected, times (1 - 0.9) / sqrt(1 - 0.96) too."""
    params = {"lr": 1e-2, "eps": 1e-15, "betas": [0.9, 0.96], "bias_correction": corrects}
    engine = zerograph.compile(mlp(), {"optimizer": {"type": kind, "params": params}})
    train(engine)
    moved = engine.state_dict()["second.weight"] - mlp().second.weight
    assert torch.allclose(moved.abs(), torch.full_like(moved, moves), atol=1e-6)


def test_lion_follows_algorithm_2() -> None:
    """arXiv:2302.06675: the direction from beta1, the momentum from beta2, decay on the parameter."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(50, generator=generator)
    state = torch.zeros(50)
    theta, m = master.double(), torch.zeros(50, dtype=torch.float64)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    for step in range(1, 101):
        grad = torch.randn(50, generator=generator)
        g = grad.double()
        direction = torch.sign(0.9 * m + 0.1 * g)
        theta = theta - 1e-2 * (direction + 0.1 * theta)
        m = 0.99 * m + 0.01 * g
        update(LION, [options], [Run(0, 50, 0, step)], master, grad, {"exp_avg": state}, None, None)
    assert ((master - theta).abs() <= 1e-5 * (1 + theta.abs())).all()
    assert torch.allclose(state.double(), m, atol=1e-6)


def test_lion_from_the_config() -> None:
    engine = zerograph.compile(mlp(), {"optimizer": {"type": "lion"}})
    train(engine, 2)
    assert "zero.update.lion" in engine.plan.text()
    assert engine.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert engine.get_lr() == [1e-3]


# A user's own


RULED: dict[str, Make] = {
    "adamw": lambda p: O.AdamW(p, lr=1e-2, amsgrad=True, foreach=False),
    "adam": lambda p: O.Adam(p, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), foreach=False),
    "sgd": lambda p: O.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=False),
    "adagrad": lambda p: O.Adagrad(p, initial_accumulator_value=0.1, foreach=False),
}
FLAT: dict[str, Make] = {
    "RMSprop": lambda p: O.RMSprop(p, momentum=0.5, centered=True, weight_decay=0.1, foreach=False),
    "NAdam": lambda p: O.NAdam(p, foreach=False),
    "RAdam": lambda p: O.RAdam(p, foreach=False),
    "Adamax": lambda p: O.Adamax(p, foreach=False),
    "Adadelta": lambda p: O.Adadelta(p, lr=0.1, foreach=False),
    "ASGD": lambda p: O.ASGD(p, t0=2, foreach=False),
    "Rprop": lambda p: O.Rprop(p, foreach=False),
}


@pytest.mark.parametrize("name", [*RULED, *FLAT])
def test_an_instance_trains_as_under_torch(name: str) -> None:
    make = (RULED | FLAT)[name]
    ours, model = mlp(), mlp()
    engine = zerograph.compile(ours, OPT_IN, optimizer=make(groups(ours)))
    reference = make(groups(model))
    train(engine, 8)
    train_eagerly(model, reference, 8)
    assert not differing(engine.state_dict(), model.state_dict())
    assert f"zero.update.{name}" in engine.plan.text()
    assert engine.plan.memory.optimizer == engine.state.nbytes()["optimizer"]
    for own, theirs in zip(engine.module.parameters(), model.parameters()):
        mine = engine.optimizer.state[own]
        assert mine.keys() >= {k for k, v in reference.state[theirs].items() if v is not None}
        for key, value in reference.state[theirs].items():
            if value is not None:
                assert torch.equal(mine[key], value.flatten() if value.dim() else value), key


def test_the_plan_of_an_optimizer_is_the_engines() -> None:
    make = FLAT["RMSprop"]
    engine = zerograph.compile(mlp(), OPT_IN, optimizer=make)
    train(engine)
    plan: Plan = zerograph.plan(mlp(), OPT_IN, example_inputs=batch(4), optimizer=make)
    assert str(plan) == str(engine.plan)


def test_a_class_a_factory_and_groups() -> None:
    for given in (O.Adagrad, lambda params: O.Adagrad(params)):
        engine = zerograph.compile(mlp(), {}, optimizer=given)
        assert engine.get_lr() == [1e-2]
    model = mlp()
    engine = zerograph.compile(model, {}, param_groups=groups(model), optimizer=O.AdamW)
    assert engine.get_lr() == [1e-3, 3e-3]
    model = mlp()
    taken = zerograph.initialize(
        model=model, config={}, optimizer=O.AdamW, model_parameters=groups(model)
    )
    assert taken[0].get_lr() == [1e-3, 3e-3]


@pytest.mark.parametrize("kind", [O.AdamW, O.RMSprop])
def test_groups_are_shared_and_changes_are_seen(kind: type[Optimizer]) -> None:
    ours, model = mlp(), mlp()
    own = kind(groups(ours, weight_decay=0.1), foreach=False)
    reference = kind(groups(model, weight_decay=0.1), foreach=False)
    before = LambdaLR(own, lambda step: 1 / (1 + step))
    beside = LambdaLR(reference, lambda step: 1 / (1 + step))
    engine = zerograph.compile(ours, OPT_IN, optimizer=own)
    assert all(a is b for a, b in zip(own.param_groups, engine.optimizer.param_groups))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = LambdaLR(own, lambda step: 1.0)
        also = LambdaLR(reference, lambda step: 1.0)
        for step in range(3):
            train(engine, seed=step)
            train_eagerly(model, reference, seed=step)
            for schedule in (before, beside):
                schedule.step()
            if step == 2:
                after.step(), also.step()
            engine.optimizer.param_groups[1]["weight_decay"] = 0.2 * step
            reference.param_groups[1]["weight_decay"] = 0.2 * step
    train(engine)
    train_eagerly(model, reference)
    assert not differing(engine.state_dict(), model.state_dict())


def test_a_client_scheduler_is_stepped_by_the_engine() -> None:
    model = mlp()
    own = O.SGD(model.parameters(), lr=1.0)
    schedule = LambdaLR(own, lambda step: 0.5**step)
    engine, optimizer, _, scheduler = zerograph.initialize(
        model=model, config={}, optimizer=own, lr_scheduler=schedule
    )
    train(engine, 2)
    assert scheduler is schedule and engine.get_lr() == [0.25] == [own.param_groups[0]["lr"]]
    assert optimizer is engine.optimizer


def test_a_stepped_instance_keeps_its_state() -> None:
    for make in (*RULED.values(), *FLAT.values()):
        ours, model = mlp(), mlp()
        own, reference = make(groups(ours)), make(groups(model))
        train_eagerly(ours, own, 3)
        train_eagerly(model, reference, 3)
        engine = zerograph.compile(ours, OPT_IN, optimizer=own)
        train(engine, 3)
        train_eagerly(model, reference, 3)
        assert not differing(engine.state_dict(), model.state_dict())


def test_the_instance_belongs_to_the_engine_until_destroy() -> None:
    model = mlp()
    own = O.AdamW(model.parameters())
    engine = zerograph.compile(model, {}, optimizer=own)
    with pytest.raises(PlanError, match=r"call engine\.step\(\)"):
        own.step()
    with pytest.raises(PlanError, match="all parameter groups before"):
        own.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(PlanError, match="cannot be added after"):
        engine.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(PlanError, match=r"AdamW\.state_dict: .*engine\.optimizer\.state_dict\(\)"):
        own.state_dict()
    engine.destroy()
    train_eagerly(model, own)


def test_after_destroy_the_instance_has_its_state() -> None:
    """Train in eager, in an engine, in eager and in a second engine: torch's numbers throughout."""
    for make in (*RULED.values(), *FLAT.values()):
        ours, model = mlp(), mlp()
        own, reference = make(groups(ours)), make(groups(model))
        for _ in range(2):
            train_eagerly(ours, own, 2)
            engine = zerograph.compile(ours, OPT_IN, optimizer=own)
            train(engine, 2)
            engine.destroy()
            for _ in range(2):
                train_eagerly(model, reference, 2)
        for left, right in zip(ours.parameters(), model.parameters(), strict=True):
            assert torch.equal(left, right), type(own).__name__
            held, expected = own.state[left], reference.state[right]
            assert set(expected) <= {*held, "step"} and set(held) <= {*expected, "step"}
            for name, value in expected.items():
                assert not isinstance(value, Tensor) or torch.equal(held[name], value), name


def test_the_client_optimizer_wins_over_the_config() -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    with pytest.warns(UserWarning, match="`optimizer` section"):
        engine = zerograph.compile(mlp(), config, optimizer=lambda p: O.SGD(p, lr=0.25))
    assert engine.get_lr() == [0.25]


def test_what_is_refused() -> None:
    own, other = mlp(), nn.Linear(3, 2)
    message = refusal(O.AdamW([{"params": own.parameters()}, {"params": [other.weight]}]), own)
    assert "group 1" in message and "[2, 3]" in message and "Mlp" in message
    assert "in no parameter group" in refusal(O.AdamW(own.first.parameters()), own)
    assert "leave param_groups out" in _both(own)
    assert "not a torch.optim.Optimizer" in refusal(lambda params: 3)
    assert "lambda params: Fresh(params" in refusal(Fresh)
    assert '"zero_allow_untested_optimizer": true' in refusal(O.RMSprop)
    hooked = O.AdamW(own.parameters())
    hooked.register_step_post_hook(lambda *args: None)
    assert "step hooks" in refusal(hooked, own)
    assert "differentiable" in refusal(lambda p: O.Adam(p, differentiable=True))


def _both(model: nn.Module) -> str:
    with pytest.raises(PlanError) as caught:
        optimizer = O.AdamW(model.parameters())
        zerograph.compile(model, {}, optimizer=optimizer, param_groups=groups(model))
    return str(caught.value)


class Fresh(Optimizer):
    """Sign descent with a required rate, and a count in its group."""

    def __init__(self, params: Any, lr: float, *, whole: bool = False) -> None:
        self.whole = whole
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    size = p.grad.norm() if self.whole else 1.0
                    p.add_(p.grad.sign() * size, alpha=-group["lr"] / group["count"])


class Closed(Fresh):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


def test_a_class_of_the_users_own() -> None:
    model = mlp()
    engine = zerograph.compile(mlp(), OPT_IN, optimizer=lambda p: Fresh(p, lr=0.1))
    train(engine, 3)
    train_eagerly(model, Fresh(model.parameters(), lr=0.1), 3)
    assert not differing(engine.state_dict(), model.state_dict())


def test_what_is_not_elementwise_is_refused_with_the_reason() -> None:
    message = refusal(lambda p: Fresh(p, lr=1e-9, whole=True), **OPT_IN)
    assert "12x8 parameter differently whole and in flat parts" in message
    for config in ({}, OPT_IN):
        assert "whole matrices" in refusal(O.Adafactor, **config)
        assert "whole matrices" in refusal(O.LBFGS, **config)
        flat = nn.Linear(4, 4, bias=False)
        assert "whole matrices" in refusal(O.Muon(flat.parameters()), flat, **config)
    assert "closure" in refusal(lambda p: Closed(p, lr=0.1), **OPT_IN)


def test_a_classs_states_lie_in_the_engines_slices() -> None:
    """What is written into a view is what the class reads at its next step."""
    model = mlp()
    engine = zerograph.compile(mlp(), OPT_IN, optimizer=O.RMSprop)
    reference = O.RMSprop(model.parameters(), foreach=False)
    train(engine)
    train_eagerly(model, reference)
    engine.optimizer.state[engine.module.first.weight]["square_avg"].fill_(9.0)
    reference.state[model.first.weight]["square_avg"].fill_(9.0)
    train(engine)
    train_eagerly(model, reference)
    assert not differing(engine.state_dict(), model.state_dict())


# The engine's optimizer


@pytest.mark.parametrize("name", ["adamw", "sgd", "RMSprop"])
def test_state_dict_round_trip(name: str) -> None:
    make = (RULED | FLAT)[name]
    engine = zerograph.compile(mlp(), OPT_IN, optimizer=make)
    train(engine, 3)
    weights, saved = engine.state_dict(), copy.deepcopy(engine.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.03
    other = zerograph.compile(mlp(), OPT_IN, optimizer=make)
    other.load_state_dict(weights)
    other.optimizer.load_state_dict(saved)
    engine.optimizer.param_groups[0]["lr"] = 0.03
    train(engine, 2)
    train(other, 2)
    assert not differing(other.state_dict(), engine.state_dict())
    small = zerograph.compile(nn.Linear(3, 2), OPT_IN, optimizer=make)
    with pytest.raises(PlanError, match="other parameter groups"):
        small.optimizer.load_state_dict(saved)


def test_it_is_a_torch_optimizer() -> None:
    engine = zerograph.compile(mlp(), {}, optimizer=RULED["adamw"])
    optimizer = engine.optimizer
    assert isinstance(optimizer, Optimizer) and "lr: 0.01" in repr(optimizer)
    assert optimizer.param_groups[0]["params"] == list(engine.parameters())
    optimizer.zero_grad()
    train(engine)
    entry = optimizer.state[engine.module.first.weight]
    assert entry["step"] == 1 and entry["exp_avg"].shape == (64,)
    entry["exp_avg"].zero_()
    storage = engine.state.storages["b0"].states["exp_avg"]
    assert not storage[:64].any(), "a state is a view of the slice"


def _schedules(optimizer: Optimizer) -> list[Any]:
    first = LambdaLR(optimizer, lambda step: 0.1 * (step + 1))
    second = LambdaLR(optimizer, lambda step: 0.5**step)
    return [
        OneCycleLR(optimizer, max_lr=0.05, total_steps=10),
        ReduceLROnPlateau(optimizer, patience=0),
        SequentialLR(optimizer, [first, second], [2]),
    ]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", ["adam", "sgd", "RMSprop"])
def test_torchs_schedulers(name: str, index: int) -> None:
    make = (RULED | FLAT)[name]
    model = mlp()
    engine, reference = zerograph.compile(mlp(), OPT_IN, optimizer=make), make(model.parameters())
    mine, theirs = _schedules(engine.optimizer)[index], _schedules(reference)[index]
    for step in range(6):
        train(engine, seed=step)
        train_eagerly(model, reference, seed=step)
        for each in (mine, theirs):
            each.step(1.0) if index == 1 else each.step()
    assert not differing(engine.state_dict(), model.state_dict())


def test_an_option_that_needs_a_new_state_is_refused() -> None:
    engine = zerograph.compile(mlp(), {}, optimizer=O.SGD)
    engine.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(PlanError, match="momentum_buffer"):
        train(engine)


# Ranks


@captured_once()
def _ranks(rank: int, world: int) -> list[str]:
    """Every optimizer with groups at every stage beside torch on the full mean gradients."""
    wrong = []
    for stage in range(4):
        for name, make in (RULED | FLAT).items():
            ours, model = mlp(), mlp()
            config = {**OPT_IN, "zero_optimization": {"stage": stage}}
            own = make(groups(ours, weight_decay=0.1))
            reference = make(groups(model, weight_decay=0.1))
            for each in (own, reference):
                if "betas" in each.param_groups[1]:
                    each.param_groups[1]["betas"] = (0.7, 0.95)
            engine = zerograph.compile(ours, config, optimizer=own)
            for step in range(3):
                engine.backward(engine(**batch(4 + rank + step)))
                for key, gradient in engine.gradients().items():
                    model.get_parameter(key).grad = gradient
                engine.step()
                reference.step()
                if step == 1:  # a round trip of this rank's part
                    saved = copy.deepcopy(engine.optimizer.state_dict())
                    engine.optimizer.load_state_dict(saved)
            if differing(engine.state_dict(), model.state_dict()):
                wrong.append(f"{name} at stage {stage}")
            wrong += _pieces(engine, reference, model, rank, f"{name} at stage {stage}")
        wrong += _unused(rank, stage)
    return wrong


def _pieces(
    engine: zerograph.Engine, reference: Optimizer, model: nn.Module, rank: int, what: str
) -> list[str]:
    """Whether this rank's views are parts of torch's states."""
    for param in engine.state.layout.params.values():
        whole = reference.state[model.get_parameter(param.name)]
        entry = engine.optimizer.state[engine.module.get_parameter(param.name)]
        low, high = engine.state.piece(param)
        size = engine.state.layout.buckets[param.bucket].shard_numel
        begin = (size * rank if engine.state.stage else 0) - param.offset + low
        for key, view in entry.items():
            value = whole.get(key)
            compared = isinstance(value, Tensor) and value.dim() and high > low
            if compared and not torch.equal(view, value.flatten()[begin : begin + high - low]):
                return [f"{key} of {param.name} of {what}"]
    return []


def _unused(rank: int, stage: int) -> list[str]:
    """A parameter without a gradient anywhere is left alone, state and decay included."""
    torch.manual_seed(0)
    model = Partly()
    before = model.other.weight.detach().clone()
    config = {**OPT_IN, "zero_optimization": {"stage": stage}}
    own = O.RMSprop(model.parameters(), weight_decay=0.1)
    engine = zerograph.compile(model, config, optimizer=own)
    engine.backward(engine(**batch(4))["loss"])
    engine.step()
    same = torch.equal(engine.state_dict()["other.weight"], before)
    moved = not torch.equal(engine.state_dict()["head.weight"], before)
    return [] if same and moved else [f"unused parameter at stage {stage}"]


def test_groups_and_states_on_two_ranks() -> None:
    assert run_ranks(2, _ranks) == [[], []]


def _taken(rank: int, world: int) -> Any:
    """Rank 0's states are taken, as its values are; bf16 has fp32 states."""
    ours, model = mlp(), mlp()
    own, reference = FLAT["RMSprop"](ours.parameters()), FLAT["RMSprop"](model.parameters())
    train_eagerly(ours, own, 2, seed=rank)  # rank 1 differs
    train_eagerly(model, reference, 2)
    config = {**OPT_IN, "zero_optimization": {"stage": 3}}
    engine = zerograph.compile(ours, config, optimizer=own)
    engine.backward(engine(**batch(4)))
    engine.step()
    train_eagerly(model, reference)
    low = zerograph.compile(mlp(), {**config, "bf16": {"enabled": True}}, optimizer=O.NAdam)
    low.backward(low(**batch(4)))
    low.step()
    dtypes = {v.dtype for s in low.optimizer.state.values() for k, v in s.items() if v.dim()}
    storage = next(iter(low.state.storages.values()))
    kept = torch.equal(storage.shard, storage.master.bfloat16())
    return differing(engine.state_dict(), model.state_dict()), dtypes, kept


def _given_back(rank: int, world: int) -> list[str]:
    """After destroy() every rank's instance has the full states."""
    wrong = []
    for name in ("adamw", "RMSprop", "NAdam"):
        make = (RULED | FLAT)[name]
        ours, model = mlp(), mlp()
        own, reference = make(groups(ours)), make(groups(model))
        config = {**OPT_IN, "zero_optimization": {"stage": 3}}
        engine = zerograph.compile(ours, config, optimizer=own)
        train(engine, 2)
        engine.destroy()
        train_eagerly(ours, own, 2)
        train_eagerly(model, reference, 2)
        train_eagerly(model, reference, 2)
        wrong += [f"{name}: {d}" for d in differing(ours.state_dict(), model.state_dict())]
    return wrong


def test_every_rank_gets_the_full_states_back() -> None:
    assert run_ranks(2, _given_back) == [[], []]


def test_states_are_taken_over_from_rank_0() -> None:
    assert run_ranks(2, _taken) == [([], {torch.float32}, True)] * 2


def test_every_rule_is_in_the_config() -> None:
    for name in RULES:
        kind = {"adamw": "AdamW", "sgd": "SGD"}.get(name, name.title())
        params = {"adam_w_mode": False} if name == "adam" else {}
        engine = zerograph.compile(mlp(), {"optimizer": {"type": kind, "params": params}})
        train(engine)
        assert f"zero.update.{name} " in engine.plan.text()
