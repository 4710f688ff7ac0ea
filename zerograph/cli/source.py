"""MODEL: what is named on the command line becomes a model on the meta device, with example inputs.

train:make_model            a factory in a module; the current directory is importable
train:make_model(depth=4)   with arguments, literals only; nothing is evaluated
LlamaConfig(hidden_size=64) a config of transformers, by class
path/config.json            a config of transformers, as saved
"""

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zerograph.cli import huggingface
from zerograph.cli.inputs import parse_inputs
from zerograph.errors import PlanError, suggestion

_FORMS = "give module:factory, a class such as 'LlamaConfig(hidden_size=64)', or a config.json"


@dataclass(frozen=True)
class Built:
    """A model on the meta device (a factory may have put it elsewhere) and its example inputs."""

    model: nn.Module
    inputs: Any


def build(
    given: str, inputs: list[str], batch: int | None, seq: int | None, usual: int | None = None
) -> Built:
    """Build MODEL with inputs for a micro-batch of `batch` rows of `seq` tokens. Raises PlanError.

    `inputs` are those of `--input`, which come before MODEL's own. A factory must take the sizes that are
    asked for, and may take `usual`, the rows where `batch` is not said.
    """
    extra = parse_inputs(inputs)
    made = _made(given, {} if extra else {"batch": batch, "seq": seq}, usual)
    if huggingface.is_config(made):
        model = huggingface.model_of(made)
        return Built(model, huggingface.inputs_of(model, batch or usual or 1, seq) | extra)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"{given} gives {type(made).__name__}; a factory gives an nn.Module, or (model, "
            "example_inputs)"
        )
    return Built(model, _merged(given, model, example, extra))


def _merged(given: str, model: nn.Module, example: Any, extra: dict[str, Any]) -> Any:
    if not extra and (not isinstance(example, dict) or example):
        return example
    if not isinstance(example, dict):
        raise PlanError(f"--input names inputs, but those of {given} are positional")
    if not extra:
        names = ", ".join(inspect.signature(model.forward).parameters)
        raise PlanError(
            f"{given} gives a model without example inputs; say them, --input NAME=DTYPE[SHAPE] "
            f"(its forward takes {names})"
        )
    return {**example, **extra}


def _made(given: str, sizes: dict[str, int | None], usual: int | None) -> Any:
    """What MODEL names: an nn.Module, a pair, or a config of transformers."""
    if os.path.isdir(given) or given.endswith(".json"):
        return huggingface.read_config(given)
    module, expression = _split(given)
    name, args, kwargs = _parse(given, expression)
    found = _attribute(_import(module, given), name, given)
    if isinstance(found, nn.Module) or huggingface.is_config(found):
        return found
    if not callable(found):
        raise PlanError(f"{given} is {type(found).__name__}, not a factory")
    if huggingface.is_config_class(found):
        huggingface.check_keys(found, kwargs, given)
    else:
        kwargs |= _sizes_taken(found, given, sizes, usual)
    return _called(found, args, kwargs, given)


def _split(given: str) -> tuple[str, str]:
    """The module and the expression in it; a class alone is one of transformers."""
    head, colon, rest = given.partition(":")
    if colon and "(" not in head:
        return head, rest
    if "(" in given or given.endswith("Config"):
        return "transformers", given
    raise PlanError(f"no model {given!r}; {_FORMS}")


def _parse(given: str, expression: str) -> tuple[str, list[Any], dict[str, Any]]:
    """`name`, or `name(1, key=[2])`, taken apart; arguments are literals."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
        args = [ast.literal_eval(arg) for arg in call.args]
    except (SyntaxError, ValueError, TypeError) as error:
        what = getattr(error, "msg", "arguments are literals: numbers, strings, lists, ...")
        raise PlanError(f"MODEL {given!r} cannot be read: {what}") from error
    name = ast.unparse(call.func)
    if len(keywords) < len(call.keywords) or not all(map(str.isidentifier, name.split("."))):
        raise PlanError(f"MODEL {given!r} cannot be read; {_FORMS}")
    return name, args, keywords


def _import(module: str, given: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise PlanError(f"{given}: no module {error.name!r} here or installed") from error
        raise PlanError(f"{given}: importing {module} failed: {error}") from error
    except Exception as error:
        raise PlanError(f"{given}: importing {module} failed: {_said(error)}") from error


def _attribute(module: Any, path: str, given: str) -> Any:
    found = module
    for name in path.split("."):
        if not hasattr(found, name):
            guess = suggestion(name, [n for n in dir(found) if not n.startswith("_")])
            raise PlanError(f"{given}: {module.__name__} has no {path!r}{guess}")
        found = getattr(found, name)
    return found


def _sizes_taken(
    factory: Callable[..., Any], given: str, sizes: dict[str, int | None], usual: int | None
) -> dict[str, int]:
    """Of --batch and --seq those that were given, which the factory must take; else the usual batch."""
    taken = inspect.signature(factory).parameters
    if sizes.get("batch") is None and usual is not None and "batch" in taken:
        sizes = {**sizes, "batch": usual}
    asked = {name: size for name, size in sizes.items() if size is not None}
    for name in asked:
        if name not in taken:
            raise PlanError(
                f"--{name}: {given} takes no argument {name!r}; say the sizes with --input, or give the "
                f"factory that argument"
            )
    return asked


def _called(
    factory: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], given: str
) -> Any:
    try:
        with torch.device("meta"):
            return factory(*args, **kwargs)
    except Exception as error:
        raise PlanError(f"{given} raised {_said(error)}") from error


def _said(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
