"""Which settings fit into a device's memory, the fastest first, and why the others do not.

    one trace for each micro-batch  x  LEVERS  ->  plans without text  ->  peak and time of a step
                                               ->  where that does not fit: levers of activations

A lever is a key of the config with the values to try (levers.py). Keeping fewer activations takes time, so it
is planned only where it may fit, and where with all of them kept a step would be faster than what fits
already. The global batch stays as it is given: another micro-batch has another number of accumulation steps.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zerograph.config import ZeroConfig, load_config
from zerograph.cost import CATEGORIES, Cluster, Held, Memory, Timeline
from zerograph.errors import ConfigError, PlanError
from zerograph.levers import (
    LEVERS,
    Lever,
    Settings,
    is_open,
    keep_less,
    least_of,
    shown,
    with_settings,
)
from zerograph.nodes import is_recomputed
from zerograph.plan import Plan
from zerograph.planning import plan_of
from zerograph.trace import Trace
from zerograph.units import size

MICRO = "train_micro_batch_size_per_gpu"
STEPS = "gradient_accumulation_steps"
ROOT = "(root)"
"""How a holder of memory is called that no module inside the model owns."""


@dataclass(frozen=True)
class Candidate:
    """One choice of settings, planned."""

    choice: Mapping[str, Any]
    """What each lever is set to, by its name; "micro-batch" and "accumulation" beside them."""
    config: ZeroConfig
    memory: Memory
    seconds: float
    """Of a step with all its micro-batches, predicted."""
    repeating: float
    """Of these seconds: computing values of the forward again."""
    waited: float
    """Of these seconds: compute stands still for collectives and copies."""
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

    @property
    def floor(self) -> int:
        """The peak if no activation were kept, and none computed again."""
        others = slice(0, CATEGORIES.index("activations"))
        return max((sum(moment.bytes[others]) for moment in self.memory.series), default=0)

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
    untried: tuple[str, ...]
    """Where keeping fewer activations was not tried, each with the reason."""
    plans: int
    """How many were made; at most `levers.MOST` for each stage and micro-batch."""


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
    search = _Search(budget, cluster, world)
    for micro in micro_batches:
        traced = trace_for(micro)
        before = len(search.found)
        for choice, changed in _choices(config, levers, micro):
            search.try_all(traced, micro, choice, changed)
        if all(c.memory.peak > budget for c in search.found[before:]):
            break
    return search.result()


@dataclass
class _Search:
    """What was planned so far."""

    budget: int
    cluster: Cluster
    world: int
    found: list[Candidate] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)

    def result(self) -> Fit:
        fits = sorted(self._fitting(), key=_cost)
        exceeds = [c for c in self.found if c.memory.peak > self.budget]
        exceeds.sort(key=lambda c: c.memory.peak)
        plans = len(self.found) + len(self.refused)
        untried = tuple(self.untried)
        return Fit(self.budget, tuple(fits), tuple(exceeds), tuple(self.refused), untried, plans)

    def try_all(
        self, traced: Trace, micro: int | None, choice: dict[str, Any], changed: dict[str, Any]
    ) -> None:
        """Plan one choice of LEVERS as the config has it, then with the levers of activations."""

        def plan(settings: Settings) -> Candidate | None:
            given = with_settings(changed, settings)
            named = choice | dict(shown(settings))
            try:
                made = _candidate(traced, micro, named, given, self.cluster, self.world)
            except (ConfigError, PlanError) as error:
                self.refused.append(f"{_shown(named)}: {error}")
                return None
            self.found.append(made)
            return made

        def peak_of(settings: Settings) -> int | None:
            made = plan(settings)
            return None if made is None else made.memory.peak

        first = plan({})
        if first is None or first.memory.peak <= self.budget:
            return
        free, hosts = self._levers(first.config)
        why = self._why_not(first) if free or hosts else "the config says what is kept"
        if why:
            self.untried.append(f"{_shown(first.choice)}: {why}")
        else:
            least = least_of(free, hosts, bool(traced.graph.layout.blocks))
            keep_less(peak_of, first.memory.peak, self.budget, least, free)

    def _fitting(self) -> list[Candidate]:
        return [c for c in self.found if c.memory.peak <= self.budget]

    def _levers(self, config: ZeroConfig) -> tuple[bool, bool]:
        """Whether the activation budget is open, and copies to the host: a CPU has no other memory."""
        on_host = config.activation_checkpointing.cpu_checkpointing
        return is_open(config), self.cluster.device.asynchronous and not on_host

    def _why_not(self, first: Candidate) -> str:
        """Why keeping less than a candidate does is not worth planning; empty if it is."""
        if first.floor > self.budget:
            return f"{size(first.floor)} are left without any activations"
        best = min(map(_cost, self._fitting()), default=None)
        if best is not None and best[0] <= _cost(first)[0]:
            return "with all activations kept it is no faster than what fits"
        return ""


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
    given = base.model_dump(mode="json", exclude_unset=True)
    for values in itertools.product(*(lever.values for lever in levers)):
        settings = {lever.key: value for lever, value in zip(levers, values)}
        choice = {lever.name: value for lever, value in zip(levers, values)}
        yield choice, with_settings(given, settings)


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
    named = choice | {"micro-batch": batch.micro_batch_size, "accumulation": batch.accumulation}
    timeline = plan.timeline(cluster)
    seconds = _step(timeline, batch.accumulation)
    repeating = batch.accumulation * _repeating(plan, timeline)
    waited = timeline.waited * seconds / (timeline.seconds or 1.0)
    rows = batch.train_batch_size
    return Candidate(named, config, plan.memory, seconds, repeating, waited, rows, micro)


def _repeating(plan: Plan, timeline: Timeline) -> float:
    """Seconds of a backward that compute values of the forward again."""
    nodes = plan.graph.nodes()
    return sum(span.seconds for span in timeline.spans if is_recomputed(nodes[span.node]))


def _step(timeline: Timeline, accumulation: int) -> float:
    """Seconds of a step of several micro-batches: all but the last have no update."""
    ends = (span.end for span in timeline.spans if span.region != "step")
    return timeline.seconds + (accumulation - 1) * max(ends, default=0.0)


def _cost(candidate: Candidate) -> tuple[float, int]:
    return candidate.seconds / (candidate.rows or 1), candidate.memory.peak


def _held(held: Held) -> str:
    return f"most is {held.category} of {held.owner or ROOT} {size(held.bytes)}"


def _shown(choice: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in choice.items() if value is not None)
