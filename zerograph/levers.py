"""Levers: the keys of the config that `fit` tries, and how activations are brought down to what fits.

    stage 0 .. 3              all of them: each may be the fastest
    activation_budget         where a stage does not fit: the least (0), then as much more as fits
    cpu_checkpointing         where the least does not fit either, on a device with a memory of its own; each
                              block is a region then, "auto", and the budget says what is kept within

The peak rises with the budget, the steeper the larger it is. So what fits by the straight line between two
budgets fits by the plan too, and two such steps come near the largest that fits. Keeping more is faster.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zerograph.config import ZeroConfig

Settings = Mapping[str, Any]
"""Values by dotted key of the config."""
BUDGET = "compile.activation_budget"
HOST = "activation_checkpointing.cpu_checkpointing"
NUMBER = "activation_checkpointing.number_checkpoints"
TRIES = 2
"""Budgets above the least that are planned for one stage and micro-batch."""
MOST = 1 + 2 + TRIES
"""Plans of one stage and micro-batch: as given, the least without and with the host, and TRIES."""
NEAR = 0.01
"""A budget that is larger by less is not worth another plan."""
_STEP = 1000
"""Budgets are whole parts of it: 0.125, not 0.12534."""


@dataclass(frozen=True)
class Lever:
    """A key of the config, dotted, and the values to try in the order of growing effort."""

    name: str
    key: str
    values: tuple[Any, ...]


LEVERS: tuple[Lever, ...] = (Lever("stage", "zero_optimization.stage", (0, 1, 2, 3)),)
ACTIVATIONS: dict[str, str] = {
    "activation_budget": BUDGET,
    "number_checkpoints": NUMBER,
    "cpu_checkpointing": HOST,
}
"""How the levers of activations are shown, and their keys. None is as the config says."""


def is_open(config: ZeroConfig) -> bool:
    """Whether a config leaves it open what the forward keeps."""
    given = config.activation_checkpointing.number_checkpoints, config.compile.activation_budget
    return given in ((None, None), (0, None))


def with_settings(given: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A config as nested dicts with other values."""
    changed = {k: dict(v) if isinstance(v, Mapping) else v for k, v in given.items()}
    for name, value in settings.items():
        *sections, key = name.split(".")
        inner = changed
        for section in sections:
            inner[section] = dict(inner.get(section) or {})
            inner = inner[section]
        inner[key] = value
    return changed


def least_of(free: bool, hosts: bool, blocks: bool) -> list[Settings]:
    """What keeps least, without the host and with it.

    `free` tells whether the config leaves open what is kept, `hosts` whether there is a host to copy to,
    `blocks` whether the model repeats blocks.
    """
    regions: Settings = {} if not free else {NUMBER: "auto"} if blocks else {BUDGET: 0.0}
    found: list[Settings] = [{BUDGET: 0.0}] if free else []
    return [*found, {**regions, HOST: True}] if hosts else found


def keep_less(
    peak_of: Callable[[Settings], int | None],
    most: int,
    budget: int,
    least: Sequence[Settings],
    free: bool,
) -> None:
    """Plan what may bring a peak of `most` bytes down to `budget`; `peak_of` plans, and None is an error.

    `least` is tried first; `free` tells whether the activation budget may be set.
    """
    for settings in least:
        low = peak_of(settings)
        if low is not None and low <= budget:
            if free:
                _keep_more(lambda f, s=settings: peak_of({**s, BUDGET: f}), low, most, budget)  # type: ignore[misc]
            return


def _keep_more(peak_of: Callable[[float], int | None], low: int, high: int, budget: int) -> None:
    """Plan larger budgets, between one of 0 with the peak `low` and one of 1 with the peak `high`."""
    (less, under), (more, over) = (0.0, low), (1.0, high)
    for _ in range(TRIES):
        at = less + (more - less) * (budget - under) / max(1, over - under)
        fraction = math.floor(at * _STEP) / _STEP
        peak = peak_of(fraction) if less + NEAR < fraction < more else None
        if peak is None:
            return
        if peak <= budget:
            less, under = fraction, peak
        else:
            more, over = fraction, peak


def shown(settings: Settings) -> Iterator[tuple[str, Any]]:
    """(name, value) of each lever of activations; None for one that is not set."""
    for name, key in ACTIVATIONS.items():
        yield name, settings.get(key)
