"""Where a call's tensors have to be: on the engine's device, floating ones in the policy's dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zerograph.errors import PlanError
from zerograph.precision import Precision


def place(
    named: Sequence[tuple[str, Tensor]], device: torch.device, precision: Precision
) -> list[Tensor]:
    """The tensors of (path, tensor) pairs, moved and cast where needed; the same stay the same.

    Batches come from the CPU; one on another accelerator, or without values, is a mistake.
    """
    made: dict[int, Tensor] = {}
    for path, tensor in named:
        if id(tensor) not in made:
            _require_reachable(path, tensor, device)
            made[id(tensor)] = tensor.to(device=device, dtype=precision.input(tensor.dtype))
    return [made[id(tensor)] for _, tensor in named]


def _require_reachable(path: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device == device or tensor.device.type == "cpu":
        return
    _, _, name = path.partition(".")
    where = f"input {name} of shape {list(tensor.shape)} is on {tensor.device}"
    if tensor.is_meta:
        raise PlanError(f"{where}, which has no values; give the engine real tensors")
    raise PlanError(
        f"{where}, and the engine computes on {device}; move the batch with .to(engine.device), or "
        "compile on that device: zerograph.compile(model, config, device=...)"
    )
