"""`"auto"` beside the batch keys: what the Hugging Face Trainer fills in, and has a default for.

    {"fp16": {"enabled": "auto"}, "gradient_clipping": "auto"}     as if neither were given
    {"scheduler": {"params": {"warmup_max_lr": "auto"}}}           the optimizer's lr
    {"optimizer": {"params": {"lr": "auto"}}}                      stays, and is an error

The Trainer's arguments are off, 1.0, (0.9, 0.999), ... unless they are given, which are DeepSpeed's defaults
as well; bucket sizes it makes of the model's width, and here they are DeepSpeed's. `plan.advisory` has each.
A learning rate and numbers of steps are the user's own, so "auto" remains an error there.
"""

from collections.abc import Mapping
from typing import Any

_DEFAULTS = frozenset(
    {
        "bf16.enabled",
        "bfloat16.enabled",
        "fp16.enabled",
        "gradient_clipping",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_min_lr",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.sub_group_size",
    }
)
"""Keys whose "auto" is the default."""
_PEAK = ("scheduler", "params", "warmup_max_lr")


def without_auto(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config with such values left out or filled in, and their keys, dotted."""
    found: list[str] = []
    return _filled(_stripped(data, "", found), found), tuple(found)


def said(key: str, value: object) -> str:
    """A line for `plan.advisory`."""
    return f'{key}="auto": {value} is used; give the value itself to have another'


def _stripped(data: Mapping[str, Any], prefix: str, found: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            kept[key] = _stripped(value, f"{path}.", found)
        elif value == "auto" and path in _DEFAULTS:
            found.append(path)
        else:
            kept[key] = value
    return kept


def _filled(data: dict[str, Any], found: list[str]) -> dict[str, Any]:
    """The schedule's peak is the optimizer's learning rate, where that is given."""
    section, params, key = _PEAK
    schedule = _inner(data, section, params)
    rate = _inner(data, "optimizer", "params").get("lr")
    if schedule.get(key) == "auto" and isinstance(rate, (int, float)):
        found.append(".".join(_PEAK))
        schedule[key] = rate
    return data


def _inner(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        inner = data.get(key)
        data = inner if isinstance(inner, dict) else {}
    return data
