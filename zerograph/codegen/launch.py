"""Launch settings of Triton kernels, from a table by family and architecture (launch.json).

    settings("update", "sm_90")     Settings(block=1024, warps=8)

The table is static: nothing is tuned while training, so that ranks and runs agree. With fp32
state beside bf16 gradients four elements a thread are best, that is 128-bit accesses of fp32.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast


@dataclass(frozen=True)
class Settings:
    block: int
    """Elements a program works on."""
    warps: int


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    path = Path(__file__).with_name("launch.json")
    return cast(dict[str, dict[str, dict[str, Any]]], json.loads(path.read_text()))


def settings(family: str, architecture: str) -> Settings:
    """Of "update", "norm", "total" (its second stage), "finish", "pack" or "unpack"."""
    rows = _table()[family]
    return Settings(**rows.get(architecture, rows["default"]))
