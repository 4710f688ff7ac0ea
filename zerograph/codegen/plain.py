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
    tiles: list[tuple[int, ...]],
    rows: list[list[float]],
    control: Tensor | None,
    grad: Tensor | None,
    states: list[Tensor],
    low: Tensor | None,
    param: Tensor,
    norms: Tensor | None = None,
) -> Tensor | None:
    """Apply the rule to tiles (start, stop, row, run), in place. Reads a flag of `control` on the host.

    Of "measure" it answers the sums, float64 [tiles, 2]; of "apply" it takes their totals, `norms`.
    """
    if control is not None and not bool(control[1]):
        return param.new_zeros(len(tiles), 2, dtype=torch.float64)
    rule = module(render(spec, "torch"), f"{spec.name} torch")[spec.name]
    sums = []
    for tile in tiles:
        own, row = slice(tile[0], tile[1]), rows[tile[2]]
        pieces = {name: t[own] for name, t in zip(("param", *spec.states), (param, *states))}
        if norms is None:
            assert grad is not None
            other: Tensor | float = grad[own].to(param.dtype)
            if control is not None:
                other = other * control[0]
        else:
            other = _trust(spec, row, norms[tile[3]])
        made = rule(row, other, *pieces.values())
        if spec.phase == "measure":
            made, change = made
            both = (pieces["param"], change)
            sums.append(torch.stack([x.double().square().sum() for x in both]))
        for name, value in zip(spec.stored, made):
            pieces[name].copy_(value)
        if low is not None and "param" in spec.stored:
            low[own].copy_(pieces["param"])
    return torch.stack(sums) if sums else None


def _trust(spec: Update, row: list[float], sums: Tensor) -> float:
    """What the change of a parameter is multiplied by, rounded to the master's dtype."""
    of_param, of_change = sums.sqrt().tolist()
    if of_param == 0.0 or of_change == 0.0:
        return 1.0
    low, high = (row[spec.described.scalars.index(f"{end}_coeff")] for end in ("min", "max"))
    ratio = torch.tensor(of_param / of_change, dtype=torch.float64).clamp(low, high)
    return float(ratio.to(spec.master))


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
