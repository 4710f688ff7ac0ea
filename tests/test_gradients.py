"""`engine.gradients()` beside the gradients that the step's norm and updates get, bit for bit."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import zerograph
from tests import tiny
from tests.ranks import run_ranks
from zerograph.codegen import dispatch
from zerograph.passes.lower import Program
from zerograph.runtime.run import execute

COMPUTED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64.0}},
    "fp32 reduced in bf16": {"communication_data_type": "bf16"},
    "bf16 reduced in fp32": {"bf16": {"enabled": True}, "communication_data_type": "fp32"},
}
AVERAGED: dict[str, dict[str, Any]] = {
    "mean": {},
    "prescaled": {"prescale_gradients": True},
    "divided": {"gradient_predivide_factor": 3.0},
    "sum": {"gradient_allreduce_op": "sum"},
}


class Caught(fx.Interpreter):
    """A step program that keeps the gradients that its norm is taken of."""

    grads: tuple[Tensor, ...] = ()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is dispatch.norm_partials:
            self.grads = tuple(grad.clone() for grad in args[0])
        return super().call_function(target, args, kwargs)


def step(engine: zerograph.Engine) -> list[Tensor]:
    """A step; answers its gradients, bucket by bucket in the order of the reductions."""
    found: list[Tensor] = []

    def caught(program: Program, inputs: list[Any]) -> tuple[Any, ...]:
        running = Caught(program.module)
        answer = running.boxed_run(inputs)
        found.extend(running.grads)
        return answer  # type: ignore[no-any-return]

    engine.execute_with(caught)
    engine.step()
    engine.execute_with(execute)
    return found


def _differing(rank: int, world: int, stage: int) -> list[str]:
    wrong = []
    every = list(product(COMPUTED.items(), AVERAGED.items()))
    for (kind, computed), (how, averaged) in every[stage % 3 :: 3]:  # together all of them
        torch.manual_seed(0)
        accumulated = {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 1}
        config = tiny.config(stage, **computed, **averaged, **accumulated)
        engine = zerograph.compile(tiny.Blocks(dropout=0.0), config)
        for micro in range(2):
            engine.backward(engine(**tiny.batch(4 + 3 * rank + micro))["loss"])
            early = engine.gradients()
            again = engine.gradients()
            wrong += [f"{kind} {how} again {n}" for n in again if _differ(again[n], early[n])]
            if micro == 0:
                engine.step()
        for name, grad in early.items():
            assert grad is not None and grad.dtype == torch.float32, name
        wrong += [f"{kind} {how} {name}" for name in _compared(engine, early, step(engine))]
    return wrong


def _differ(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or not torch.equal(one, other)


def _compared(
    engine: zerograph.Engine, early: dict[str, Tensor | None], given: list[Tensor]
) -> list[str]:
    """Parameters of which this rank's part of `given` and of `early` are not the same bits."""
    state, wrong = engine.state, []
    scale = 64.0 if state.precision.scaled else 1.0
    buckets = list(reversed(state.layout.trainable_buckets()))
    for bucket, grad in zip(buckets, given, strict=True):
        for param in state.layout.bucket_params(bucket.name):
            low, high = state.piece(param)
            size = state.storages[bucket.name].shard.numel()
            begin = (size * state.world.rank if state.stage else 0) + low - param.offset
            whole = early[param.name]
            assert whole is not None
            ours = (
                whole.flatten()[begin : begin + high - low] if low < high else whole[:0].flatten()
            )
            if not torch.equal(ours * scale, grad[low:high].float()):
                wrong.append(param.name)
    return wrong


@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_those_of_the_step(stage: int) -> None:
    """In every dtype and way to reduce, over two micro-batches; asking changes nothing."""
    assert run_ranks(2, _differing, stage) == [[], []]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_rank_rounds_as_its_step_does(stage: int) -> None:
    assert _differing(0, 1, stage) == []


def test_before_a_backward_there_are_none() -> None:
    engine = zerograph.compile(tiny.Blocks(), tiny.config(1))
    found = engine.gradients()
    assert found and set(found.values()) == {None}
