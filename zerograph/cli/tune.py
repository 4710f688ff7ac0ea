"""`zerograph tune`: measure launch settings of the generated kernels on this machine's GPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from zerograph.cli.app import command
from zerograph.cli.options import Output
from zerograph.cli.tables import show, table
from zerograph.codegen import gpu, launch
from zerograph.codegen.tune import Tuned, rows
from zerograph.codegen.tune import tune as measured
from zerograph.errors import KernelError
from zerograph.units import duration

_ALIGN = 16


@command
def tune(
    output: Output = None,
    elements: Annotated[
        int, typer.Option(help="Elements of the slices that are measured, a multiple of 16.")
    ] = 1 << 26,
) -> None:
    """Measure block sizes and warps of the generated kernels on a GPU, and write the table for it.

    Without --output it goes to where kernels look for it.
    """
    _require_gpu()
    if elements < _ALIGN or elements % _ALIGN:
        raise KernelError(f"--elements must be a positive multiple of {_ALIGN}, got {elements}")
    path = Path(output) if output is not None else launch.place()
    if path is None:
        raise KernelError(
            "ZEROGRAPH_LAUNCH is empty, so no table is read; unset it, or give --output"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    found = measured(device, elements)
    launch.write(path, gpu.architecture(device), rows(found))
    columns = ("kernels", ">block", ">warps", ">time", ">before")
    show([table(columns, _rows(found))])
    typer.echo(f"\n{gpu.architecture(device)} ({torch.cuda.get_device_name(device)}) is in {path}")
    if path != launch.place():
        typer.echo(f"ZEROGRAPH_LAUNCH={path} has kernels use it")


def _rows(found: Sequence[Tuned]) -> Iterator[Sequence[str]]:
    for each in found:
        own = each.chosen
        times = [duration(each.seconds[one]) for one in (own, each.before)]
        yield each.family, f"{own.block:,}", str(own.warps), *times


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise KernelError(
            "tune measures on a GPU, and torch finds none here; kernels are launched as the table that comes "
            "with zerograph says"
        )
    if not gpu.available():
        raise KernelError(
            "tune measures Triton kernels, and Triton is not installed: pip install triton"
        )
