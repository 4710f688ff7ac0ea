"""Images and text together."""

from functools import partial
from typing import Any

import torch

from tests.zoo.family import TEXT, Batch, Family, from_config, generator, tokens
from tests.zoo.vision import VIT

IMAGE_TOKEN = 127
TOWERS = {
    "text_config": TEXT,
    "vision_config": VIT,
    "projection_dim": 16,
}


def _pairs(seed: int) -> Batch:
    """Images with captions, and a contrastive loss."""
    pixels = torch.randn(2, 3, 16, 16, generator=generator(seed))
    return {"pixel_values": pixels, "input_ids": tokens(seed), "return_loss": True}


def _captions(seed: int) -> Batch:
    return {**_pairs(seed), "labels": tokens(seed + 500)}


def _dialogue(image_tokens: int) -> Any:
    """Text with the places of one image's `image_tokens` features in each row."""

    def batch(seed: int) -> Batch:
        ids = tokens(seed, length=image_tokens + 8, high=IMAGE_TOKEN)
        ids[:, 1 : 1 + image_tokens] = IMAGE_TOKEN
        labels = tokens(seed + 500, length=image_tokens + 8)
        pixels = torch.randn(2, 3, 16, 16, generator=generator(seed))
        return {"pixel_values": pixels, "input_ids": ids, "labels": labels}

    return batch


def _contrastive(name: str, note: str = "") -> Family:
    return Family(name, partial(from_config, "", name, TOWERS), _pairs, note)


def _blip() -> Any:
    from transformers import BlipConfig, BlipForConditionalGeneration

    from tests.zoo.family import still

    config = BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 32, "sep_token_id": 2},
        vision_config=VIT,
        projection_dim=16,
    )
    still(config)
    return BlipForConditionalGeneration(config)


def _blip_batch(seed: int) -> Batch:
    batch = _captions(seed)
    del batch["return_loss"]
    return batch


def _llava() -> Any:
    return from_config(
        "ImageTextToText",
        "llava",
        {},
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VIT, "model_type": "clip_vision_model"},
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
    )


FAMILIES = [
    _contrastive("clip", "contrastive loss"),
    _contrastive("siglip", "sigmoid loss"),
    Family("blip", _blip, _blip_batch),
    Family("llava", _llava, _dialogue(16)),
]
