"""What a member of the zoo is, and how one of transformers is made from a few config values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import loss_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model family with one tiny model of it.

    `build` answers a model with random weights; `batch` answers the forward's keyword arguments, other
    ones for another seed. `note` says what is particular about it.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    note: str = ""
    loss: Callable[[Any], Tensor] = loss_of

    def make(self, seed: int = 0) -> nn.Module:
        """The model, the same for the same seed, in train mode with its randomness off."""
        torch.manual_seed(seed)
        model = self.build().train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model


TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Config values that most families of text name alike."""


def from_config(task: str, family: str, shape: Mapping[str, Any], **changes: Any) -> nn.Module:
    """A model of transformers: `task` is the suffix of an Auto class ("CausalLM")."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**shape, **changes})
    still(config)
    auto = getattr(transformers, f"AutoModel{'For' if task else ''}{task}")
    model: nn.Module = auto.from_config(config)
    return model


RANDOM = ("drop", "jitter", "mask_time_prob", "mask_feature_prob")


def still(config: Any) -> None:
    """Set every probability of dropping, masking or jitter to 0, in the sub-configs as well."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            still(value)
        elif isinstance(value, float) and any(word in name for word in RANDOM):
            setattr(config, name, 0.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def tokens(seed: int, size: int = 2, length: int = 16, low: int = 3, high: int = 128) -> Tensor:
    return torch.randint(low, high, (size, length), generator=generator(seed))


def text(seed: int) -> Batch:
    """Token ids and labels, each (2, 16)."""
    return {"input_ids": tokens(seed), "labels": tokens(seed + 500)}


def images(side: int = 16, classes: int = 5) -> Callable[[int], Batch]:
    """Pixels (2, 3, side, side) and a class for each image."""

    def batch(seed: int) -> Batch:
        pixels = torch.randn(2, 3, side, side, generator=generator(seed))
        return {"pixel_values": pixels, "labels": tokens(seed, 2, 1, 0, classes).flatten()}

    return batch
