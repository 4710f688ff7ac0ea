"""Read a config: a path to JSON, or a mapping, becomes a `ZeroConfig` or one `ConfigError`.

The error lists every problem of the first step that finds any: reading the file; repeated keys; names and
types (or, where these are right, what keys contradict each other) together with what is not built.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from pydantic import ValidationError

from zerograph.config.auto import without_auto
from zerograph.config.check import refusals
from zerograph.config.model import ZeroConfig
from zerograph.config.problems import problems
from zerograph.config.zero import groups
from zerograph.errors import ConfigError

Source = Mapping[str, Any] | str | os.PathLike[str] | ZeroConfig


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were repeated."""

    repeated: tuple[str, ...] = ()


def load_config(source: Source) -> ZeroConfig:
    """Read and check a config.

    Args:
        source: DeepSpeed's JSON as a mapping, the path of a file with it, or a `ZeroConfig`,
            which is checked and returned as it is.

    Raises:
        ConfigError: With one line per problem; each names the key and how to mend it.
    """
    name = _name(source)
    if isinstance(source, ZeroConfig):
        config = source
    else:
        config = _validated(source if isinstance(source, Mapping) else _read(source, name), name)
    _raise_any([*_conflicts(config), *refusals(config)], name)
    return config


def _name(source: object) -> str:
    """Name the file in front of each problem; a mapping has no name."""
    if isinstance(source, Mapping | ZeroConfig):
        return ""
    if isinstance(source, str) and source.lstrip().startswith("{"):
        raise ConfigError("a str is the path of a config; to pass JSON text, give json.loads(text)")
    if isinstance(source, str | os.PathLike):
        return f"{os.fspath(source)}: "
    raise ConfigError(f"a config is a dict, a path or a ZeroConfig, got {type(source).__name__}")


def _validated(data: Mapping[str, Any], name: str) -> ZeroConfig:
    plain, auto = without_auto(_plain(data))
    try:
        config = ZeroConfig.model_validate(plain)
        config._auto = auto
        return config
    except ValidationError as error:
        found = [*problems(ZeroConfig, error), *_not_built(plain, error)]
    _raise_any(found, name)
    raise AssertionError("a validation error has at least one problem")


def _not_built(plain: dict[str, Any], error: ValidationError) -> list[str]:
    """What is not built of a config, without the keys that `error` is about; nothing if more is wrong."""
    for place in (problem["loc"] for problem in error.errors()):
        if not place:  # of the whole
            return []
        _drop(plain, *place)
    try:
        return list(refusals(ZeroConfig.model_validate(plain)))
    except ValidationError:
        return []


def _drop(section: dict[str, Any], key: int | str, *rest: int | str) -> None:
    """Take a key out, as deep in the sections as there are any."""
    inner = section.get(str(key))
    if rest and isinstance(inner, dict):
        _drop(inner, *rest)
    else:
        section.pop(str(key), None)


def _conflicts(config: ZeroConfig) -> list[str]:
    found = []
    if config.fp16.enabled and config.bf16.enabled:
        found.append("fp16.enabled and bf16.enabled are both true; keep one")
    if config.torch_autocast.enabled and config.precision != "fp32":
        found.append(
            f"torch_autocast.enabled and {config.precision}.enabled are both true; keep one (with "
            "autocast the parameters stay fp32)"
        )
    if config.fp16.enabled and config.data_types.grad_accum_dtype == "bf16":
        found.append("data_types.grad_accum_dtype: 'bf16' cannot keep fp16 gradients; use fp32")
    mean = config.gradient_allreduce_op == "mean"
    if config.prescale_gradients and config.gradient_predivide_factor != 1.0:
        found.append(
            "prescale_gradients and gradient_predivide_factor both say what is divided before the "
            "sum; keep one"
        )
    if not mean and (config.prescale_gradients or config.gradient_predivide_factor != 1.0):
        found.append(
            "gradient_allreduce_op='sum' divides nothing; leave prescale_gradients and "
            "gradient_predivide_factor out"
        )
    if not mean and config.compile.weighted_accumulation:
        found.append(
            "compile.weighted_accumulation gives a weighted mean; leave gradient_allreduce_op out"
        )
    activations = config.activation_checkpointing
    if activations.contiguous_memory_optimization and not activations.number_checkpoints:
        found.append(
            "activation_checkpointing.contiguous_memory_optimization needs number_checkpoints, the number "
            "of checkpoints that the memory is for; give it, or leave contiguous_memory_optimization out"
        )
    return found + _against_updates(config) + groups(config.zero_optimization)


def _against_updates(config: ZeroConfig) -> list[str]:
    """What has to know all gradients before any is applied, with updates in the backward."""
    if not config.compile.update_in_backward:
        return []
    clips, fp16 = config.gradient_clipping > 0, config.fp16.enabled
    checks = config.bf16.enabled and config.bf16.check_grad_overflow
    lamb = config.optimizer is not None and config.optimizer.type.lower() == "lamb"
    reasons = {
        "gradient_clipping needs the norm of all gradients first; set it to 0 (it is 1.0 when it is not "
        "given)": clips,
        "fp16.enabled skips a step whose gradients overflow; use bf16": fp16,
        "bf16.check_grad_overflow skips a step whose gradients are not finite; set it to false": checks,
        "compile.weighted_accumulation divides by a sum that the step knows; leave one of them out": (
            config.compile.weighted_accumulation
        ),
        "zero_optimization.overlap_comm=false waits for everything where it starts; leave one of them out": (
            config.zero_optimization.overlap_comm is False
        ),
        "optimizer.type='Lamb' needs norms of whole parameters, over ranks; use AdamW": lamb,
    }
    return [f"compile.update_in_backward: {why}" for why, found in reasons.items() if found]


def _raise_any(found: list[str], name: str) -> None:
    if len(found) == 1:
        raise ConfigError(name + found[0])
    if found:
        title = f"{name}{len(found)} problems in the config"
        raise ConfigError("\n  ".join([title, *found]))


def _plain(value: Any) -> Any:
    """Copy nested mappings into dicts, so that any Mapping is an object and none is shared."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _read(path: str | os.PathLike[str], name: str) -> Mapping[str, Any]:
    data = _parse(_text(path, name), name)
    if not isinstance(data, _Object):
        raise ConfigError(f"{name}a config is a JSON object {{...}}, got {type(data).__name__}")
    _raise_any(_repeated(data), name)
    return data


def _text(path: str | os.PathLike[str], name: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"{name}no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}the config file cannot be read: {error}") from error


def _parse(text: str, name: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name}line {error.lineno}, column {error.colno}: broken JSON: {error.msg} "
            "(comments and trailing commas are not JSON)"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{name}{error}") from None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    keys = [key for key, _ in pairs]
    made.repeated = tuple(key for key in made if keys.count(key) > 1)
    return made


def _not_json(word: str) -> NoReturn:
    raise ConfigError(f"{word} is not a JSON number; give a finite one")


def _repeated(value: object, prefix: str = "") -> list[str]:
    """List the repeated keys at every level, also within lists."""
    if isinstance(value, list):
        return [line for inner in value for line in _repeated(inner, prefix)]
    if not isinstance(value, _Object):
        return []
    found = [f"{prefix}{key}: given more than once; keep one" for key in value.repeated]
    for key, inner in value.items():
        found += _repeated(inner, f"{prefix}{key}.")
    return found
