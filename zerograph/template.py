"""What a model takes and returns, as a template: the structure with its tensors taken out.

A model may return tuples, dicts, dataclasses, `ModelOutput`s, or objects of its own that hold tensors
(a key-value cache). `dissect` walks such a value once and answers its tensors, each with a
path, and a function that rebuilds the value around other tensors.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Rebuild = Callable[[Sequence[Any]], Any]


def dissect(value: Any) -> tuple[list[tuple[str, Any]], Rebuild]:
    """The tensors in `value` with their paths ("loss", "past.layers.0.keys"), and its rebuilder.

    The rebuilder takes one replacement for each tensor, in order. A tensor that occurs twice is
    listed twice. A size that varies (a SymInt) counts as a tensor. Whatever else is not a container is
    kept as it is.
    """
    leaves: list[tuple[str, Any]] = []
    rebuild = _walk(value, "", leaves, ())
    return leaves, rebuild


def _walk(value: Any, path: str, leaves: list[tuple[str, Any]], above: tuple[int, ...]) -> Rebuild:
    if isinstance(value, (torch.Tensor, torch.SymInt)):
        index = len(leaves)
        leaves.append((path, value))
        return lambda tensors: tensors[index]
    children = None if id(value) in above else _children(value)
    if children is None:
        return lambda tensors: value
    names, parts, assemble = children
    here = (*above, id(value))
    rebuilds = [_walk(p, f"{path}.{n}" if path else n, leaves, here) for n, p in zip(names, parts)]
    return lambda tensors: assemble([rebuild(tensors) for rebuild in rebuilds])


Children = tuple[list[str], list[Any], Callable[[list[Any]], Any]]


def _children(value: Any) -> Children | None:
    """One level of a container: names, parts, and how to assemble it again; None for a leaf."""
    if type(value) in (type(None), bool, int, float, complex, str, bytes, type) or callable(value):
        return None
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
    if not (len(parts) == 1 and parts[0] is value):
        return _names(value, len(parts)), parts, lambda new: pytree.tree_unflatten(new, spec)
    if isinstance(value, Mapping):
        return _mapping(value)
    if dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        return _attributes(value)
    return None


def _names(value: Any, count: int) -> list[str]:
    if isinstance(value, Mapping) and len(value) == count:
        return [str(key) for key in value]
    fields = getattr(value, "_fields", None)
    return list(fields) if fields else [str(index) for index in range(count)]


def _mapping(value: Mapping[Any, Any]) -> Children:
    """A mapping that pytree does not know (transformers' BatchEncoding)."""
    keys = list(value)

    def assemble(parts: list[Any]) -> Any:
        made = copy.copy(value)
        data = getattr(made, "data", None)
        if isinstance(data, dict):  # UserDict: a copy shares its dict
            made.data = dict(data)  # type: ignore[attr-defined]
        for key, part in zip(keys, parts):
            made[key] = part  # type: ignore[index]
        return made

    return [str(key) for key in keys], [value[key] for key in keys], assemble


def _attributes(value: Any) -> Children:
    names = list(vars(value))

    def assemble(parts: list[Any]) -> Any:
        made = copy.copy(value)
        for name, part in zip(names, parts):
            object.__setattr__(made, name, part)
        return made

    return names, [vars(value)[name] for name in names], assemble
