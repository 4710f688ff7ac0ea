"""Tiny models of real families, with batches: what the oracle tests compare on.

Each entry of MODELS is a function from a seed to a model; `batch_for` makes rank-dependent batches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=128,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_labels=5,
        )
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
        )
    )


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            max_position_embeddings=64,
        )
    )


class ConvNet(nn.Module):
    """Convolutions with BatchNorm; the loss is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.stage = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.stage(torch.relu(self.norm(self.stem(pixels))))
        logits = self.head(hidden.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class LowRank(nn.Module):
    """Frozen base weights with trainable low-rank adapters beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.layers = nn.ModuleList(Adapted(32, 4) for _ in range(2))
        self.head = nn.Linear(32, 128)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("adapter" in name)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Adapted(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.adapter_down = nn.Linear(width, rank, bias=False)
        self.adapter_up = nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter_up(self.adapter_down(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "convnet": ConvNet,
    "lowrank": LowRank,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The model, the same for the same seed, in train mode with dropout off."""
    torch.manual_seed(seed)
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for field in ("attention_dropout", "dropout", "attn_dropout", "dropout_prob"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return model


def batch_for(name: str, seed: int, size: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """A batch for the model; another seed gives other data."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if name in ("vit", "convnet"):
        side = 16
        pixels = torch.randn(size, 3, side, side, generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        return {"pixel_values" if name == "vit" else "pixels": pixels, "labels": labels}
    ids = torch.randint(1, 128, (size, length), generator=generator)
    labels = torch.randint(1, 128, (size, length), generator=generator)
    return {"input_ids": ids, "labels": labels}


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what a model returned."""
    if isinstance(output, tuple):
        return output[0]
    loss: torch.Tensor = output["loss"]
    return loss
