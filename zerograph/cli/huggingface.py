"""A config of transformers as a model with example inputs. Nothing is downloaded.

The model's class is the first of the config's `architectures`, else that of the first of _TASKS which knows
the config. The cache of keys and values, which training does not read, is off; a decoder begins with token 0
where the config does not say with which.
"""

import inspect
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zerograph.errors import PlanError, suggestion

_TASKS = (
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
)
_LONGEST = 2048
_ONE_A_ROW = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
    "ForNextSentencePrediction",
)
"""Endings of classes whose labels are one number for each row."""


def is_config(value: Any) -> bool:
    """Whether `value` is a config of transformers, without importing it."""
    return is_config_class(type(value))


def is_config_class(value: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return (
        transformers is not None
        and isinstance(value, type)
        and issubclass(value, transformers.PretrainedConfig)
    )


def read_config(path: str) -> Any:
    """A config.json, or a folder that holds one. Raises PlanError."""
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        with open(file, encoding="utf-8") as stream:
            given = json.load(stream)
    except OSError as error:
        raise PlanError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{file} is not JSON: {error}") from error
    if not isinstance(given, dict) or "model_type" not in given:
        raise PlanError(f"{file} is not a config of transformers: it has no `model_type`")
    known = _transformers().CONFIG_MAPPING
    kind = given["model_type"]
    if kind not in known:
        raise PlanError(f"{file}: no model_type {kind!r}{suggestion(str(kind), list(known))}")
    try:
        return known[kind].from_dict(given)
    except Exception as error:
        raise PlanError(f"{file}: {type(error).__name__}: {error}") from error


def check_keys(kind: Any, given: Mapping[str, Any], expression: str) -> None:
    """Refuse keys that a config class would keep without using them. Raises PlanError."""
    default = kind()
    for key in given:
        if not hasattr(default, key) and not hasattr(default, f"_{key}"):
            names = [name for name in vars(default) if not name.startswith("_")]
            raise PlanError(f"{expression}: {kind.__name__} has no {key!r}{suggestion(key, names)}")


def model_of(config: Any) -> nn.Module:
    """The model of a config on the meta device, in training. Raises PlanError."""
    kind = _class_of(config)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    try:
        with torch.device("meta"):
            model: nn.Module = kind(config)
    except Exception as error:
        raise PlanError(f"{kind.__name__} raised {type(error).__name__}: {error}") from error
    return model.to(config.dtype) if config.dtype is not None else model


def _class_of(config: Any) -> Any:
    transformers = _transformers()
    for name in config.architectures or ():
        if not hasattr(transformers, name):
            raise PlanError(f"architectures: transformers has no {name!r}")
        return getattr(transformers, name)
    auto = transformers.models.auto.modeling_auto
    mappings = [getattr(auto, f"MODEL_FOR_{task}_MAPPING", {}) for task in _TASKS]
    for mapping in (*mappings, auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise PlanError(
        f"{type(config).__name__}: transformers names no model for it; say which, architectures=[...]"
    )


def inputs_of(model: nn.Module, batch: int, seq: int | None) -> dict[str, Tensor]:
    """Meta tensors for one micro-batch: the model's main input, and labels if its forward takes them."""
    config: Any = model.config
    main, taken = str(model.main_input_name), inspect.signature(model.forward).parameters
    length = seq or min(_LONGEST, _positions(config))
    inputs = {main: _main_input(main, config, batch, length)}
    kind = type(model).__name__
    if "start_positions" in taken:
        return inputs | {name: _ids(batch) for name in ("start_positions", "end_positions")}
    if "labels" not in taken or kind.endswith("ForCTC"):
        return inputs
    if kind.endswith(_ONE_A_ROW):
        labels = _ids(batch)
    elif kind.endswith("ForSemanticSegmentation"):
        labels = _ids(batch, *inputs[main].shape[-2:])
    else:
        labels = _ids(batch, length)
    return inputs | {"labels": labels}


def _main_input(name: str, config: Any, batch: int, length: int) -> Tensor:
    if name == "input_ids":
        return _ids(batch, length)
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return _floats(batch, getattr(vision, "num_channels", 3), height, width)
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return _floats(batch, getattr(config, "num_mel_bins", 80), frames)
    if name == "input_values" and hasattr(config, "num_mel_bins"):
        return _floats(batch, config.max_length, config.num_mel_bins)
    if name == "input_values":
        return _floats(batch, 16_000)
    raise PlanError(
        f"{type(config).__name__}: its main input is {name!r}, for which no example is known; write a "
        "factory that gives (model, example_inputs)"
    )


def _positions(config: Any) -> int:
    text = config.get_text_config()
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    found = (getattr(text, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), _LONGEST)


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PlanError(
            "transformers is not installed; pip install 'zerograph[transformers]'"
        ) from error
    return transformers
