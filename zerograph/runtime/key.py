"""The key of a call: what a captured program is valid for.

Capture specialises on all of this without a word (labels that are the inputs themselves, a Python float, a
training flag), so all of it is compared at every call, and a call with another key is captured anew.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def key_of(module: nn.Module, values: Any, tensors: Sequence[tuple[str, Tensor]]) -> Hashable:
    """The key of calling `module` with `values`, whose tensors (with paths) are `tensors`."""
    return (
        structure_of(values),
        tuple((path, *_tensor(tensor)) for path, tensor in tensors),
        aliasing([tensor for _, tensor in tensors]),
        tuple(child.training for child in module.modules()),
        tuple(parameter.requires_grad for parameter in module.parameters()),
        modes(),
    )


def _tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    return (
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
    )


def structure_of(value: Any) -> Hashable:
    """Containers, their types and keys, and the values of all that is no tensor."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, dict):
        return (type(value), tuple((k, structure_of(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(structure_of(v) for v in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(structure_of(v) for v in value))
    if isinstance(value, float):
        return ("float", value.hex())
    if hasattr(value, "__dict__") and not callable(value):
        return (type(value), structure_of(vars(value)))
    try:
        hash(value)
    except TypeError:
        return (type(value), id(value))
    return (type(value), value)


def aliasing(tensors: Sequence[Tensor]) -> Hashable:
    """For each tensor the first one that it shares storage with, and whether it is the same."""
    first: dict[int, int] = {}
    pattern = []
    for index, tensor in enumerate(tensors):
        storage = tensor.untyped_storage()
        owner = first.setdefault(storage._cdata, index)
        same = tensor.storage_offset() - tensors[owner].storage_offset()
        pattern.append((owner, tensor is tensors[owner], same))
    return tuple(pattern)


def modes() -> Hashable:
    """Grad, inference and autocast modes, and the determinism that changes which kernels are used."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
        torch.are_deterministic_algorithms_enabled(),
    )
