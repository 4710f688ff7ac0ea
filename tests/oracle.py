"""What each rank computes for the parity tests: DDP, fully_shard, and zerograph at each stage."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import zerograph
from tests.models import batch_for, loss_of, make
from tests.storages import Storages, held_by
from tests.traces import captured_once
from zerograph.layout import repeated_blocks

STEPS = 5
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01},
}
BESIDE: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"activation_checkpointing": {"number_checkpoints": 2}},
}
"""What the engines of an optimizer have beside it: those of SGD compute their activations again."""


def config_for(stage: int, optimizer: str = "AdamW", **extra: Any) -> dict[str, Any]:
    """A config in which sharding is really exercised, with no clipping unless asked for.

    Buckets are the same at all stages: the order of a norm's sums follows them.
    """
    config: dict[str, Any] = {
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 20000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 20000,
        },
        "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
        "gradient_clipping": 0.0,
    }
    zero = extra.pop("zero_optimization", {})
    config["zero_optimization"].update(zero)
    return {**config, **extra}


def torch_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    options = dict(OPTIMIZERS[name])
    options.pop("eps", None)
    return getattr(torch.optim, name)(parameters, **options)


def ddp(name: str, rank: int, optimizer: str) -> dict[str, Any]:
    """Loss and gradients of the first step, parameters after STEPS."""
    model = make(name)
    wrapped = DistributedDataParallel(model)
    optim = torch_optimizer(optimizer, [p for p in model.parameters() if p.requires_grad])
    first: dict[str, Any] = {}
    for step in range(STEPS):
        loss = loss_of(wrapped(**batch_for(name, rank + 10 * step)))
        loss.backward()
        if step == 0:
            first = {"loss": loss.detach(), "gradients": _gradients(model)}
        optim.step()
        optim.zero_grad()
    for buffer in model.buffers():  # rank 0's are the ones that are saved
        dist.broadcast(buffer, 0)
    return {**first, "state": _cpu(model.state_dict())}


def fsdp(name: str, rank: int) -> dict[str, Any]:
    """Loss and gradients of the first step under fully_shard, layer by layer."""
    model = make(name)
    for block in repeated_blocks(model):
        fully_shard(model.get_submodule(block))
    fully_shard(model)
    loss = loss_of(model(**batch_for(name, rank)))
    loss.backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


def ours(name: str, rank: int, stage: int, optimizer: str, **extra: Any) -> dict[str, Any]:
    engine = zerograph.compile(make(name), config_for(stage, optimizer, **extra))
    first: dict[str, Any] = {}
    norms = []
    for step in range(STEPS):
        engine.backward(loss := loss_of(engine(**batch_for(name, rank + 10 * step))))
        if step == 0:
            first = {"loss": loss.detach(), "gradients": engine.gradients()}
        engine.step()
        norms.append(engine.get_global_grad_norm())
    state = engine.state_dict()
    os.environ.pop("ZEROGRAPH_KERNELS", None)  # a peak is that of generated kernels
    peaks = _peaks(engine, batch_for(name, rank + 10 * STEPS))
    os.environ["ZEROGRAPH_KERNELS"] = "torch"
    return {**first, "state": state, "norms": norms, "peaks": peaks}


def _peaks(engine: zerograph.Engine, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes alive at most in a step, and as planned."""
    with Storages([*held_by(engine), *batch.values()]) as seen:
        output = engine(**batch)  # held by the caller until after the step
        engine.backward(loss_of(output))
        engine.step()
    return seen.peak, engine.plan.memory.peak


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().clone() for n, t in state.items()}


@captured_once()
def compare(rank: int, world: int, name: str) -> dict[str, Any]:
    """Everything that the parity test asserts about one model, as (difference) numbers."""
    report: dict[str, Any] = {}
    reference = {o: ddp(name, rank, o) for o in OPTIMIZERS}
    sharded = fsdp(name, rank)
    report["fsdp loss"] = torch.equal(sharded["loss"], reference["AdamW"]["loss"])
    report["fsdp differs"] = differing(sharded["gradients"], reference["AdamW"]["gradients"])
    report["fsdp error"] = gradient_error(sharded["gradients"], reference["AdamW"]["gradients"])
    for optimizer, expected in reference.items():
        stages = {}
        for stage in range(4):
            torch.manual_seed(0)
            found = stages[stage] = ours(name, rank, stage, optimizer, **BESIDE[optimizer])
            key = f"{optimizer} stage {stage}"
            report[f"{key} loss"] = torch.equal(found["loss"], expected["loss"])
            report[f"{key} gradients"] = differing(found["gradients"], expected["gradients"])
            report[f"{key} gradient error"] = gradient_error(
                found["gradients"], expected["gradients"]
            )
            report[f"{key} state error"] = state_error(found["state"], expected["state"])
            report[f"{key} stages"] = differing(found["state"], stages[0]["state"])
            report[f"{key} peaks"] = found["peaks"]
            report[f"{key} norms"] = found["norms"] == stages[0]["norms"]
    return report


def differing(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not bitwise equal; absent and None are the same."""
    names = {n for n, t in found.items() if t is not None} | set(expected)
    return sorted(
        n
        for n in names
        if found.get(n) is None or n not in expected or not torch.equal(found[n], expected[n])
    )


def gradient_error(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> float:
    """Largest max|a-b| / (1e-6 max|b| + 1e-9) over the tensors; at most 1 is within the bound."""
    worst = 0.0
    for name, tensor in expected.items():
        bound = 1e-6 * tensor.abs().max().item() + 1e-9
        worst = max(worst, (found[name] - tensor).abs().max().item() / bound)
    return worst


def state_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest max|a-b| / (1 + max|b|) over the tensors, in units of 1e-6."""
    assert set(found) == set(expected)
    worst = 0.0
    for name, tensor in expected.items():
        if tensor.is_floating_point() and tensor.numel():
            difference = (found[name] - tensor).abs().max().item()
            worst = max(worst, difference / (1e-6 * (1 + tensor.abs().max().item())))
    return worst


@captured_once()
def compare_gradients(rank: int, world: int, name: str) -> dict[int, Any]:
    """Per stage: the gradient error against DDP, and the norm of the first update."""
    model = make(name)
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped(**batch_for(name, rank))).backward()
    expected = _gradients(model)
    report = {}
    for stage in range(4):
        engine = zerograph.compile(make(name), config_for(stage))
        engine.backward(loss_of(engine(**batch_for(name, rank))))
        error = gradient_error(engine.gradients(), expected)
        engine.step()
        report[stage] = (error, engine.get_global_grad_norm())
    return report


@captured_once()
def compare_accumulation(rank: int, world: int) -> dict[str, Any]:
    """Four micro-batches of 2 beside one batch of 8, and the stages beside each other."""
    name = "llama"
    batches = [batch_for(name, rank * 4 + i) for i in range(4)]
    whole = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    gradients, states = {}, {}
    report: dict[str, Any] = {}
    for stage in range(4):
        config = config_for(stage, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=4)
        engine = zerograph.compile(make(name), config)
        before = engine.state_dict()
        for index, batch in enumerate(batches):
            engine.backward(loss_of(engine(**batch)))
            if index == 3:
                gradients[stage] = engine.gradients()
            engine.step()
            if index < 3:
                report["off the boundary nothing changes"] = not differing(
                    engine.state_dict(), before
                )
        states[stage] = engine.state_dict()
        assert engine.global_steps == 1
    reference = zerograph.compile(make(name), config_for(3))
    loss_of(reference(**whole)).backward()
    expected = {n: g for n, g in reference.gradients().items() if g is not None}
    for stage in range(4):
        error = max(
            (gradients[stage][n] - g).abs().max().item() / (1e-6 * g.abs().max().item())
            for n, g in expected.items()
        )
        report[f"stage {stage} error"] = error
    report["0 and 1"] = differing(gradients[0], gradients[1]) + differing(states[0], states[1])
    report["2 and 3"] = differing(gradients[2], gradients[3]) + differing(states[2], states[3])
    return report


@captured_once()
def compare_bf16(rank: int, world: int) -> dict[Any, list[float]]:
    """Losses of twenty steps in bf16 under fully_shard's same policy, and ours at each stage."""
    name, steps = "llama", 20
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = make(name)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch_optimizer("AdamW", model.parameters())
    losses: dict[Any, list[float]] = {"fully_shard": []}
    for step in range(steps):
        loss = loss_of(model(**batch_for(name, rank + 10 * (step % 3))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses["fully_shard"].append(loss.item())
    for stage in range(4):
        engine = zerograph.compile(make(name), config_for(stage, bf16={"enabled": True}))
        losses[stage] = []
        for step in range(steps):
            loss = loss_of(engine(**batch_for(name, rank + 10 * (step % 3))))
            engine.backward(loss)
            engine.step()
            losses[stage].append(loss.item())
    return losses


@captured_once()
def compare_clipping(rank: int, world: int) -> dict[int, tuple[float, float]]:
    """Per stage: the state error after five clipped steps, and the relative error of the last norm.

    With SGD: AdamW divides a gradient that is all rounding by itself, so that the last bit of the clip
    factor decides the sign of an update.
    """
    name, limit = "llama", 0.5
    model = make(name)
    wrapped = DistributedDataParallel(model)
    optimizer = torch_optimizer("SGD", model.parameters())
    norm = torch.zeros(())
    for step in range(STEPS):
        loss_of(wrapped(**batch_for(name, rank + 10 * step))).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
    assert norm > limit, "nothing was clipped"
    expected = _cpu(model.state_dict())
    report = {}
    for stage in range(4):
        found = ours(name, rank, stage, "SGD", gradient_clipping=limit)
        error = abs(found["norms"][-1] / norm.item() - 1)
        report[stage] = (state_error(found["state"], expected), error)
    return report
