"""Activation checkpointing as DeepSpeed's users call it: `zerograph.checkpointing`.

    zerograph.checkpointing.configure(None, num_checkpoints=12)
    hidden = zerograph.checkpointing.checkpoint(layer, hidden, mask)

Within a model that zerograph compiles, a call marks a region of the graph (boundaries.py), and what is
computed again is planned (passes/checkpoint.py). Anywhere else it does what `torch.utils.checkpoint` does.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.utils.checkpoint

from zerograph.config import ZeroConfig, load_config
from zerograph.runtime.arenas import release_all

Source = Mapping[str, Any] | str | os.PathLike[str] | ZeroConfig

_KEYS = {
    "partition_activations": "partition_activations",
    "contiguous_checkpointing": "contiguous_memory_optimization",
    "num_checkpoints": "number_checkpoints",
    "checkpoint_in_cpu": "cpu_checkpointing",
    "synchronize": "synchronize_checkpoint_boundary",
    "profile": "profile",
}
"""Arguments of `configure`, and the keys of `activation_checkpointing` that they are."""
_given: dict[str, Any] | None = None
_mpu: Any = None


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, whose inner values are computed again in the backward, not kept.

    Random numbers are those of the first time.
    """
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def configure(
    mpu_: Any = None,
    deepspeed_config: Source | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | Literal["auto"] | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set keys of `activation_checkpointing` for every engine that is compiled from now on.

    They win over the engine's own config. Those that are not given here come from
    `deepspeed_config`, of which no other section is read. A second call replaces the first.
    `mpu_` is the `mpu` of engines that are compiled without one (`zerograph.compile`).

    Raises ConfigError for what a config could not ask for either.
    """
    global _given, _mpu
    values = (
        partition_activations,
        contiguous_checkpointing,
        num_checkpoints,
        checkpoint_in_cpu,
        synchronize,
        profile,
    )
    keys = {} if deepspeed_config is None else _section_of(load_config(deepspeed_config))
    named = zip(_KEYS.values(), values, strict=True)
    keys |= {key: value for key, value in named if value is not None}
    load_config({"activation_checkpointing": keys})
    _given, _mpu = keys, mpu_


def is_configured() -> bool:
    """Whether `configure` was called."""
    return _given is not None


def reset() -> None:
    """Let go of the arenas of contiguous_memory_optimization that hold nothing now; they are made again.

    Like DeepSpeed's it takes back no `configure`. No forward needs it: one that is called before the backward
    of another has arenas of its own.
    """
    release_all()


def configured(config: ZeroConfig) -> ZeroConfig:
    """`config` with what `configure` said."""
    if not _given:
        return config
    section = config.activation_checkpointing
    changed = type(section).model_validate({**_section_of(config), **_given})
    return load_config(config.model_copy(update={"activation_checkpointing": changed}))


def configured_mpu() -> Any:
    """The `mpu_` that `configure` was given; None without."""
    return _mpu


def _section_of(config: ZeroConfig) -> dict[str, Any]:
    """The keys of `activation_checkpointing` that a config gives."""
    return config.activation_checkpointing.model_dump(exclude_unset=True)
