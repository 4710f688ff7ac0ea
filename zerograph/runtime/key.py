"""The key of a call: what a captured program is valid for.

Capture specialises on all of this without a word (labels that are the inputs themselves, a Python float, a
training flag), so all of it is compared at every call. Calls of one kind differ in the sizes of their
tensors alone; which of them share a program is for runtime/programs.py.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zerograph.trace import call_path


@dataclass(frozen=True)
class Call:
    """A call of `module` with `values` = (args, kwargs), whose tensors (with paths) are `tensors`."""

    module: nn.Module
    values: Any
    named: Sequence[tuple[str, Tensor]]
    kind: Hashable
    """All but the sizes."""
    shapes: tuple[tuple[int, ...], ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in self.named]

    def path(self, index: int) -> str:
        """The name of a tensor in the call: `input_ids`, `batch.ids`."""
        return call_path(self.named[index][0], self.module, len(self.values[0]))

    def facts(self) -> dict[str, str]:
        """What varies from call to call, in the user's terms: `input_ids.size(1)`: `16`."""
        found: dict[str, str] = {}
        for index, tensor in enumerate(self.tensors):
            name = self.path(index)
            found |= {f"{name}.size({dim})": str(size) for dim, size in enumerate(tensor.shape)}
            order = layout_of(tensor)
            found[f"the layout of {name}"] = "contiguous" if order == () else str(tensor.stride())
        for path, value in _leaves(self.values, ""):
            found[call_path(path, self.module, len(self.values[0]))] = repr(value)[:80]
        found["sharing of storage"] = str([first for first, *_ in aliasing(self.tensors)])
        return found

    def family(self, facts: dict[str, str]) -> Hashable:
        """What calls have in common that differ in `facts` alone."""
        types = tuple((t.dtype, t.device, t.requires_grad) for _, t in self.named)
        return (tuple(facts), types, _flags(self.module), modes())


def call_of(module: nn.Module, values: Any, named: Sequence[tuple[str, Tensor]]) -> Call:
    """The call of `module` with `values`, whose tensors (with paths) are `named`."""
    kind = (
        structure_of(values),
        tuple((path, *_tensor(tensor)) for path, tensor in named),
        aliasing([tensor for _, tensor in named]),
        _flags(module),
        modes(),
    )
    return Call(module, values, named, kind, tuple(tuple(tensor.shape) for _, tensor in named))


def _tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    return (
        tensor.dim(),
        layout_of(tensor),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
    )


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """The layout whatever the sizes: () if contiguous, the order of dims if dense, else the strides."""
    shape, stride = tensor.shape, tensor.stride()
    dims = range(len(shape))
    if _is_dense(shape, stride, dims):
        return ()
    order = sorted(dims, key=lambda dim: (-stride[dim], dim))
    return ("order", *order) if _is_dense(shape, stride, order) else ("stride", *stride)


def _is_dense(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    """Whether the strides are those of a tensor without gaps whose dims lie in this order."""
    expected = 1
    for dim in reversed(order):
        if stride[dim] != expected:
            return False
        expected *= max(shape[dim], 1)
    return True


def _flags(module: nn.Module) -> Hashable:
    return (
        tuple(child.training for child in module.modules()),
        tuple(parameter.requires_grad for parameter in module.parameters()),
    )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values in nested containers that are no tensors, with their paths."""
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            yield from _leaves(part, f"{path}.{name}" if path else str(name))
    elif not isinstance(value, Tensor):
        yield path, value


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


def aliasing(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
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
    """Grad, inference and autocast modes, the default dtype, and the determinism that changes kernels."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )
