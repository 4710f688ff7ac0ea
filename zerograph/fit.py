"""Which settings fit into a device's memory, the fastest first, and why the others do not.

    one trace for each micro-batch  x  LEVERS  ->  plans without text  ->  peak and time of a step

A lever is a key of the config with the values to try, one entry in LEVERS. The global batch stays as it is
given: another micro-batch has another number of accumulation steps.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zerograph.config import ZeroConfig, load_config
from zerograph.cost import CATEGORIES, Cluster, Held, Memory, Timeline
from zerograph.errors import ConfigError, PlanError
from zerograph.planning import plan_of
from zerograph.trace import Trace
from zerograph.units import size

MICRO = "train_micro_batch_size_per_gpu"
STEPS = "gradient_accumulation_steps"
ROOT = "(root)"
"""How a holder of memory is called that no module inside the model owns."""


@dataclass(frozen=True)
class Lever:
    """A key of the config, dotted, and the values to try in the order of growing effort."""

    name: str
    key: str
    values: tuple[Any, ...]


LEVERS: tuple[Lever, ...] = (Lever("stage", "zero_optimization.stage", (0, 1, 2, 3)),)


@dataclass(frozen=True)
class Candidate:
    """One choice of settings, planned."""

    choice: Mapping[str, Any]
    """What each lever is set to, by its name; "micro-batch" and "accumulation" beside them."""
    config: ZeroConfig
    memory: Memory
    seconds: float
    """Of a step with all its micro-batches, predicted."""
    rows: int | None
    """Rows of a global batch; None where the config does not say."""
    micro: int | None
    """The micro-batch that it was traced with, as `fit` was asked to."""

    @property
    def alive(self) -> dict[str, int]:
        """Bytes at the peak by category, the most first."""
        moment = self.memory.peak_moment
        alive = dict(zip(CATEGORIES, moment.bytes if moment else ()))
        return {name: alive[name] for name in sorted(alive, key=lambda c: -alive[c]) if alive[name]}

    def why(self, count: int = 3) -> str:
        """The largest categories at the peak, and what holds most."""
        parts = [f"{name} {size(n)}" for name, n in list(self.alive.items())[:count]]
        return ", ".join(parts + [_held(held) for held in self.memory.at_peak[:1]])


@dataclass(frozen=True)
class Fit:
    """All candidates: those that fit, the fastest first; those that do not, the smallest first."""

    budget: int
    """Bytes."""
    fits: tuple[Candidate, ...]
    exceeds: tuple[Candidate, ...]
    refused: tuple[str, ...]
    """Choices that cannot be planned, each with the reason."""


def fit(
    trace_for: Callable[[int | None], Trace],
    config: ZeroConfig,
    budget: int,
    cluster: Cluster,
    world: int,
    micro_batches: Sequence[int | None],
    levers: Sequence[Lever] = LEVERS,
) -> Fit:
    """Plan every combination of `levers` and `micro_batches` (ascending) on one trace a micro-batch.

    A micro-batch of None leaves the config's batch numbers alone. Once nothing fits, no larger one is tried.
    """
    found: list[Candidate] = []
    refused: list[str] = []
    for micro in micro_batches:
        traced = trace_for(micro)
        before = len(found)
        for choice, changed in _choices(config, levers, micro):
            try:
                found.append(_candidate(traced, micro, choice, changed, cluster, world))
            except (ConfigError, PlanError) as error:
                refused.append(f"{_shown(choice)}: {error}")
        if all(c.memory.peak > budget for c in found[before:]):
            break
    fits = sorted((c for c in found if c.memory.peak <= budget), key=_cost)
    exceeds = sorted((c for c in found if c.memory.peak > budget), key=lambda c: c.memory.peak)
    return Fit(budget, tuple(fits), tuple(exceeds), tuple(refused))


def micro_batches_of(config: ZeroConfig, world: int, asked: int | None) -> list[int | None]:
    """The micro-batches to try: the one asked for, the config's own, or, where `train_batch_size` leaves them
    open, the powers of two that divide a rank's share of it."""
    batch = config.batch(world)
    if asked is not None:
        return [asked]
    if config.train_batch_size is None or batch.train_batch_size is None:
        return [None]
    share = batch.train_batch_size // world
    return [2**n for n in range(share.bit_length()) if share % 2**n == 0]


def with_micro_batch(config: ZeroConfig, micro: int) -> ZeroConfig:
    """`config` with this micro-batch; under a given `train_batch_size` the accumulation follows."""
    changed = config.model_dump(mode="json", exclude_unset=True)
    if config.train_batch_size is not None:
        changed.pop(STEPS, None)
    return load_config({**changed, MICRO: micro})


def parse_bytes(given: str) -> int:
    """`80GB` (powers of ten) or `80GiB` (of two) in bytes. Raises PlanError."""
    text = given.strip().lower().removesuffix("b")
    powers = {"k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    powers |= {f"{unit}i": 1024**n for n, unit in enumerate("kmgt", 1)}
    unit = next((u for u in sorted(powers, key=len, reverse=True) if text.endswith(u)), "")
    try:
        value = float(text.removesuffix(unit))
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15:
        raise PlanError(f"{given!r} is no amount of memory; give 80GB, 512MiB, ...")
    return int(value * powers.get(unit, 1))


def _choices(
    config: ZeroConfig, levers: Sequence[Lever], micro: int | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every combination, as what is shown and as a changed config."""
    base = config if micro is None else with_micro_batch(config, micro)
    for values in itertools.product(*(lever.values for lever in levers)):
        changed = base.model_dump(mode="json", exclude_unset=True)
        for lever, value in zip(levers, values):
            *sections, key = lever.key.split(".")
            inner = changed
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[key] = value
        yield {lever.name: value for lever, value in zip(levers, values)}, changed


def _candidate(
    traced: Trace,
    micro: int | None,
    choice: dict[str, Any],
    changed: dict[str, Any],
    cluster: Cluster,
    world: int,
) -> Candidate:
    config = load_config(changed)
    batch = config.batch(world)
    plan = plan_of(traced, config)
    shown = choice | {"micro-batch": batch.micro_batch_size, "accumulation": batch.accumulation}
    seconds = _step(plan.timeline(cluster), batch.accumulation)
    return Candidate(shown, config, plan.memory, seconds, batch.train_batch_size, micro)


def _step(timeline: Timeline, accumulation: int) -> float:
    """Seconds of a step of several micro-batches: all but the last have no update."""
    ends = (span.end for span in timeline.spans if span.region != "step")
    return timeline.seconds + (accumulation - 1) * max(ends, default=0.0)


def _cost(candidate: Candidate) -> tuple[float, int]:
    return candidate.seconds / (candidate.rows or 1), candidate.memory.peak


def _held(held: Held) -> str:
    return f"most is {held.category} of {held.owner or ROOT} {size(held.bytes)}"


def _shown(choice: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in choice.items())
