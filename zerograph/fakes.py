"""Fake stand-ins: a model's parameters, buffers and inputs as tensors with shapes and no data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zerograph import compat
from zerograph.layout import Layout
from zerograph.precision import Precision


def fake_state(
    model: nn.Module, layout: Layout, mode: compat.FakeTensorMode, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Fake parameters (in the dtypes of the layout; tied names share one) and buffers, by FQN."""
    params: dict[str, torch.Tensor] = {}
    for param in layout.params.values():
        with mode:
            value = torch.empty_strided(param.shape, param.stride, dtype=param.dtype, device=device)
        fake = nn.Parameter(value, requires_grad=requires_grad(model, param.name))
        params.update(dict.fromkeys((param.name, *param.tied), fake))
    buffers: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) not in seen:
            seen[id(buffer)] = _fake_like(buffer, buffer.dtype, mode, device)
        buffers[name] = seen[id(buffer)]
    return params, buffers


def requires_grad(model: nn.Module, name: str) -> bool:
    return model.get_parameter(name).requires_grad


def _fake_like(
    tensor: torch.Tensor, dtype: torch.dtype, mode: compat.FakeTensorMode, device: torch.device
) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)


def fake_inputs(
    tensors: list[torch.Tensor],
    precision: Precision,
    mode: compat.FakeTensorMode,
    device: torch.device,
) -> list[torch.Tensor]:
    """Fake inputs; arguments that are the same tensor stay the same."""
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in made:
            fake = _fake_like(tensor, precision.input(tensor.dtype), mode, device)
            made[id(tensor)] = fake.requires_grad_(tensor.requires_grad)
    return [made[id(tensor)] for tensor in tensors]


@contextmanager
def substituted(model: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with the named parameters and buffers replaced; they are put back at the end."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            table = module._parameters if key in module._parameters else module._buffers
            replaced.append((table, key, table[key]))
            table[key] = tensor  # type: ignore[assignment]
        yield
    finally:
        for table, key, original in reversed(replaced):
            table[key] = original
