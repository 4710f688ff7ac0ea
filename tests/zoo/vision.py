"""Image classifiers and a segmenter."""

from functools import partial
from typing import Any

import torch

from tests.zoo.family import Batch, Family, from_config, generator, images, tokens

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}


def _classifier(name: str, shape: dict[str, Any], note: str = "", **changes: Any) -> Family:
    build = partial(from_config, "ImageClassification", name, shape, **changes)
    return Family(name, build, images(changes.get("image_size", 16)), note)


def _segmentation(seed: int) -> Batch:
    pixels = torch.randn(2, 3, 32, 32, generator=generator(seed))
    return {"pixel_values": pixels, "labels": tokens(seed, 2, 32 * 32, 0, 5).view(2, 32, 32)}


def _deit() -> Any:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**VIT, hidden_dropout_prob=0.0))


def _segformer() -> Any:
    return from_config(
        "SemanticSegmentation",
        "segformer",
        {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4], "num_labels": 5},
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
    )


FAMILIES = [
    Family("deit", _deit, images()),
    _classifier("beit", VIT, "relative position bias", use_relative_position_bias=True),
    _classifier("dinov2", VIT, mlp_ratio=2),
    _classifier("vit_msn", VIT),
    _classifier(
        "swin",
        {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "num_labels": 5},
        "shifted windows",
        image_size=32,
        patch_size=4,
        window_size=4,
    ),
    _classifier("convnext", STAGES, num_stages=2, image_size=32),
    _classifier("convnextv2", STAGES, num_stages=2, image_size=32),
    _classifier("resnet", STAGES, "BatchNorm", embedding_size=8, image_size=32),
    _classifier(
        "mobilenet_v2", {"num_labels": 5, "depth_multiplier": 0.25}, "BatchNorm", image_size=32
    ),
    Family("segformer", _segformer, _segmentation, "BatchNorm"),
]
