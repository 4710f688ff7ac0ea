"""The zoo of model families: captured beside eager, and trained on two ranks beside DDP.

docs/models.md holds the same for every family at every stage, made by benchmarks/compatibility.py.
"""

import copy
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zerograph
from tests.models import batch_for, loss_of, make
from tests.oracle import config_for, differing, gradient_error
from tests.ranks import run_ranks
from tests.traces import captured_once
from tests.zoo import ZOO
from tests.zoo.family import TEXT, from_config
from zerograph.errors import CaptureError

REFUSED = {"switch_transformers": "experts are a Python loop"}
"""Families that cannot be captured, and what the error says."""
ROUNDED = {"clip", "mamba", "jamba", "lstm"}
"""Gradients are summed in another order than eager's, and are within the bound instead of bitwise."""
UPSAMPLED = {"segformer": 4.0}
"""Times the bound: interpolation and BatchNorm are rounded apart, and everything is behind them."""
TABLE_ONLY = {
    "xlm-roberta": "roberta",
    "gptj": "gpt_neox",
    "mbart": "bart",
    "pegasus": "bart",
    "marian": "bart",
    "m2m_100": "bart",
    "umt5": "mt5",
    "vit_msn": "dinov2",
    "convnextv2": "convnext",
    "mobilenet_v2": "resnet",
    "hubert": "wav2vec2",
    "wavlm": "wav2vec2",
    "siglip": "clip",
    "blip": "llava",
    "falcon_mamba": "mamba",
    "phimoe": "phimoe with router loss",
    "smollm3": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "phi": "gpt_neox",
    "stablelm": "gpt_neox",
    "electra": "bert",
    "distilbert": "bert",
    "mpnet": "bert",
    "gemma2": "gemma3_text",
    "deepseek_v2": "deepseek_v3",
    "gpt_oss": "gpt_oss with router loss",
}
"""Families with a sibling that is tested here or in test_parity.py; the table of docs/models.md has both."""
PAIRS = [
    "modernbert",
    "gemma3_text",
    "swin",
    "llava",
    "deepseek_v3",
    "peft lora",
]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def received(engine: zerograph.Engine) -> dict[str, Tensor]:
    return {n: g for n, g in engine.gradients().items() if g is not None}


@pytest.mark.parametrize("name", [n for n in ZOO if n not in REFUSED and n not in TABLE_ONLY])
def test_capture_equals_eager(name: str) -> None:
    """Loss and every gradient in fp32: bitwise, or within the bound where that is said above."""
    family = ZOO[name]
    model = family.make()
    eager = copy.deepcopy(model)
    expected = family.loss(eager(**family.batch(0)))
    expected.backward()
    engine = zerograph.compile(model, config_for(3))
    loss = family.loss(engine(**family.batch(0)))
    engine.backward(loss)
    found, gradients = received(engine), gradients_of(eager)
    assert set(found) == set(gradients)
    if name in ROUNDED or name in UPSAMPLED:
        assert gradient_error(found, gradients) <= UPSAMPLED.get(name, 1.0)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    else:
        assert torch.equal(loss, expected)
        assert differing(found, gradients) == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_is_told_what_to_do(name: str) -> None:
    family = ZOO[name]
    engine = zerograph.compile(family.make(), config_for(3))
    with pytest.raises(CaptureError, match=f"change: .*{REFUSED[name]}"):
        engine(**family.batch(0))


def test_ctc_labels_inside_the_forward_are_refused_with_the_way_round() -> None:
    engine = zerograph.compile(ZOO["wav2vec2"].make(), config_for(3))
    labels = torch.full((2, 6), 5)
    with pytest.raises(CaptureError, match=r"without `labels`, and compute .*ctc_loss"):
        engine(**ZOO["wav2vec2"].batch(0), labels=labels)


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_recorded_outputs(name: str, option: str) -> None:
    """What the model records is returned as eager returns it, and may be in the loss."""
    model = make(name)
    model.set_attn_implementation("eager")
    eager = copy.deepcopy(model)
    batch = {**batch_for(name, 0), option: True}
    expected = eager(**batch)
    engine = zerograph.compile(model, config_for(3))
    found = engine(**batch)
    recorded = [key for key, value in expected.items() if isinstance(value, tuple) and value]
    assert recorded
    for key in recorded:
        assert len(found[key]) == len(expected[key])
        assert all(map(torch.equal, found[key], expected[key])), key

    def loss(output: Any) -> Tensor:
        return output.loss + output[recorded[0]][-1].square().mean()

    loss(expected).backward()
    engine.backward(loss(found))
    assert differing(received(engine), gradients_of(eager)) == []


def test_checkpointing_that_cannot_be_captured_is_refused_by_name() -> None:
    model = make("t5")
    model.gradient_checkpointing_enable()
    engine = zerograph.compile(model, config_for(3))
    with pytest.raises(CaptureError, match=r"change: call .*gradient_checkpointing_disable\(\)"):
        engine(**batch_for("t5", 0))


@captured_once()
def beside_ddp(rank: int, world: int, name: str) -> dict[int, Any]:
    """Per stage: is the loss bitwise, which gradients are not, and those without a gradient."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    family = ZOO[name]
    model = family.make()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    expected = family.loss(wrapped(**family.batch(rank)))
    expected.backward()
    gradients = gradients_of(model)
    report = {}
    for stage in range(4):
        engine = zerograph.compile(family.make(), config_for(stage))
        loss = family.loss(engine(**family.batch(rank)))
        engine.backward(loss)
        found = received(engine)
        silent = [n for n in gradients if n not in found and gradients[n].any()]
        wrong = [n for n in differing(found, gradients) if n in found]
        engine.step()
        report[stage] = (torch.equal(loss, expected), wrong, silent)
    return report


@pytest.mark.parametrize("name", PAIRS)
def test_two_ranks_equal_ddp(name: str) -> None:
    for report in run_ranks(2, beside_ddp, name):
        assert report == dict.fromkeys(range(4), (True, [], []))


@captured_once()
def lonely_experts(rank: int, world: int, family: str) -> tuple[list[list[int]], dict[int, Any]]:
    """A mixture in which a rank sees one token only: the tokens per expert, and errors beside DDP."""
    shape = {**TEXT, "num_key_value_heads": 2, "num_experts_per_tok": 1}
    experts = {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 32}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return from_config("CausalLM", family, shape, **experts).train()

    ids = torch.full((2, 16), 5 + 60 * rank)
    batch = {"input_ids": ids, "labels": ids}
    model = build()
    counts: list[list[int]] = []
    gates = [m for n, m in model.named_modules() if n.endswith(("mlp.gate", "mlp.router"))]
    count = partial(_count, counts)
    handles = [gate.register_forward_hook(count) for gate in gates]
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    expected = loss_of(wrapped(**batch))
    expected.backward()
    for handle in handles:
        handle.remove()
    gradients = gradients_of(model)
    errors = {}
    for stage in range(4):
        engine = zerograph.compile(build(), config_for(stage))
        engine.backward(loss_of(engine(**batch)))
        errors[stage] = gradient_error(engine.gradients(), gradients)
        engine.step()
    return counts, errors


def _count(counts: list[list[int]], gate: nn.Module, args: Any, output: Any) -> None:
    chosen = next(t for t in output if not t.is_floating_point())
    counts.append(torch.bincount(chosen.flatten(), minlength=8).tolist())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_without_tokens_on_a_rank(family: str) -> None:
    """Ranks route to different experts; all run the same collectives, and the gradients are DDP's."""
    (first, errors), (second, others) = run_ranks(2, lonely_experts, family)
    assert first and any(0 in counts for counts in first)
    assert first != second, "the ranks chose the same experts"
    assert max(*errors.values(), *others.values()) <= 1.0
