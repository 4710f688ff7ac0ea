"""`--input x=f32[4,16]`: tensors of the meta device, described on the command line."""

import re

import torch
from torch import Tensor

from zerograph.errors import PlanError
from zerograph.precision import SHORT

_PATTERN = re.compile(r"([A-Za-z_][\w.]*)=(\w+)\[([\d,\s]*)\]")
DTYPES = {name: dtype for dtype, name in SHORT.items()}


def parse_input(given: str) -> tuple[str, Tensor]:
    """The name and the meta tensor of `name=dtype[shape]`. Raises PlanError."""
    match = _PATTERN.fullmatch(given.strip())
    if match is None:
        raise PlanError(
            f"--input {given}: not name=dtype[shape], such as x=f32[4,16] or step=i64[]"
        )
    name, spelled, shape = match.groups()
    if spelled not in DTYPES:
        raise PlanError(f"--input {given}: no dtype {spelled!r}; there are {', '.join(DTYPES)}")
    sizes = [part.strip() for part in shape.split(",")] if shape.strip() else []
    if not all(sizes):
        raise PlanError(f"--input {given}: a size is missing in [{shape}]")
    return name, torch.empty([int(size) for size in sizes], dtype=DTYPES[spelled], device="meta")


def parse_inputs(given: list[str]) -> dict[str, Tensor]:
    """All of them by name, each given once."""
    found: dict[str, Tensor] = {}
    for each in given:
        name, tensor = parse_input(each)
        if name in found:
            raise PlanError(f"--input {name} is given twice")
        found[name] = tensor
    return found
