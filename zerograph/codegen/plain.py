"""The kernels as plain torch operations, for where neither a compiler nor Triton is there.

Norms, the finish and copies have the results of the generated kernels; an update is the rule printed
as torch operations (render.py), whose bits are those of torch.optim's unfused loop on the same machine.
"""

import torch
from torch import Tensor

from zerograph.codegen.gpu import module
from zerograph.codegen.render import render
from zerograph.codegen.spec import CHUNK, LANES, Finish, Update

PIECE = 1 << 15
"""Elements updated at a time, so that a rule's several passes over them stay in the cache."""


def update(
    spec: Update,
    tiles: list[tuple[int, int, int]],
    rows: list[list[float]],
    control: Tensor | None,
    param: Tensor,
    grad: Tensor,
    states: list[Tensor],
    low: Tensor | None,
) -> None:
    """Apply the rule to tiles (start, stop, row). With `control` this reads a flag on the host."""
    if control is not None and not bool(control[1]):
        return
    rule = module(render(spec, "torch"), f"{spec.name} torch")[spec.name]
    for start, stop, row in tiles:
        own = slice(start, stop)
        pieces = [tensor[own] for tensor in (param, *states)]
        mean = grad[own].to(param.dtype)
        if control is not None:
            mean = mean * control[0]
        made = rule(rows[row], pieces[0], mean, *pieces[1:])
        for piece, value in zip(pieces, made):
            piece.copy_(value)
        if low is not None:
            low[own].copy_(pieces[0])


def sums_of_squares(flat: Tensor) -> Tensor:
    """float64 [chunks]: of each CHUNK elements of `flat`, as the norm kernels sum."""
    chunks = -(-flat.numel() // CHUNK)
    real = torch.float64 if flat.dtype == torch.float64 else torch.float32
    lanes = flat.new_zeros(chunks * CHUNK, dtype=real)
    lanes[: flat.numel()] = flat
    total = flat.new_zeros(chunks, LANES, dtype=real)
    for piece in lanes.view(chunks, CHUNK // LANES, LANES).unbind(1):
        total.addcmul_(piece, piece)
    return total.sum(1, dtype=torch.float64)


def finish(
    spec: Finish, partials: Tensor, divided: Tensor | None, limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(norm float64 [], control fp32 [2])."""
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    norm = total.sqrt()
    if divided is not None:
        norm = norm * divided
    factor = torch.ones_like(norm)
    if limit is not None:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0).float().double()
    if divided is not None:
        factor = factor * divided
    applies = norm.isfinite() if spec.skips else torch.ones_like(norm)
    return norm, torch.stack([factor.float(), applies.float()])
