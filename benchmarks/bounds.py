"""What `overlap.py` holds its contestants to, and the least time that a step can take on a link.

A rank sends at least (world - 1) / world of a buffer that is gathered or reduce-scattered, and twice that
of one that is all-reduced. With everything hidden, a step takes max(compute alone, these bytes over the
line rate). A plan's own bytes count, but never more than its stage must send (`PASSES`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from contest import Times, ratio

from zerograph.cost import Traffic

BOTH_WAYS = ("all_reduce", "any_rank", "sum_weights")
"""Collectives that are a reduce-scatter and a gather in one."""
PASSES = {1: 2, 2: 2, 3: 3}
"""How often a stage must send its share of all parameters: one reduction; one gather, or two."""
FREED = "stage 3 freed"
EARLY = ", updating in backward"
"""Of a contestant with `compile.update_in_backward`."""


@dataclass(frozen=True)
class Bound:
    """A contestant takes at most `most` times what another takes; "bound" is its own least time."""

    name: str
    against: str
    most: float


@dataclass(frozen=True)
class Verdict:
    """A bound, and the ratio that was measured."""

    bound: Bound
    ratio: float | None
    """None if one of the two was left out."""

    @property
    def held(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= self.bound.most

    @property
    def said(self) -> str:
        return {True: "held", False: "**not held**", None: "not measured"}[self.held]


LOOPBACK = (
    Bound(FREED, "ddp", 1.05),
    Bound(FREED, "fully_shard", 0.85),
    Bound(FREED, "deepspeed freed", 0.70),
)
LINK = (
    Bound(FREED, "bound", 1.08),
    Bound(FREED, "fully_shard", 0.45),
    Bound(FREED, "deepspeed freed", 0.50),
    Bound(f"stage 1{EARLY}", "ddp", 0.80),
    Bound(f"stage 2{EARLY}", "ddp", 0.80),
    Bound(f"stage 3{EARLY}", "ddp", 0.80),
)
MEMORY = Bound(FREED, "fully_shard", 1.0)
"""Of the peaks of live storages."""


def least_bytes(traffic: Mapping[str, Traffic], stage: int, parameters: int, world: int) -> float:
    """Bytes that a rank sends in a step, at the least; `parameters` are the bytes of all of them."""
    passes = sum((2 if k in BOTH_WAYS else 1) * t.nbytes for k, t in traffic.items())
    return min(passes, PASSES[stage] * parameters) * (world - 1) / world


def least_seconds(alone: Times, sent: float, rate: float) -> list[float]:
    """The bound of each round; `rate` in bytes a second."""
    return [max(seconds, sent / rate) for seconds in alone.seconds]


def ratio_to(
    name: str, against: str, times: Mapping[str, Times], least: Mapping[str, list[float]]
) -> float | None:
    """The paired ratio of two contestants, or of one to its own bound; None where one is missing."""
    if name not in times:
        return None
    if against == "bound":
        return ratio(times[name].seconds, least[name]) if name in least else None
    return ratio(times[name].seconds, times[against].seconds) if against in times else None


def judged(
    bounds: Sequence[Bound], times: Mapping[str, Times], least: Mapping[str, list[float]]
) -> list[Verdict]:
    """A verdict for each bound."""
    return [Verdict(b, ratio_to(b.name, b.against, times, least)) for b in bounds]


def table(
    times: Mapping[str, Times], sent: Mapping[str, float], least: Mapping[str, list[float]]
) -> str:
    """Markdown: the median step, its range, ratios to the peers, and to its own bound."""
    peers = [name for name in times if not name.startswith("stage")]
    heads = ["", "median", "min", "max", *(f"x {p}" for p in peers), "sends", "bound", "x bound"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in times.items():
        row = [
            name,
            *(f"{1e3 * s:.0f} ms" for s in (own.median, min(own.seconds), max(own.seconds))),
        ]
        row += [f"{ratio(own.seconds, times[p].seconds):.2f}" for p in peers]
        if name in least:
            bound = f"{1e3 * median(least[name]):.0f} ms"
            row += [f"{sent[name] / 1e6:.0f} MB", bound, f"{ratio(own.seconds, least[name]):.2f}"]
        else:
            row += ["", "", ""]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def table_of_verdicts(verdicts: Sequence[Verdict]) -> str:
    lines = ["| contestant | against | ratio | at most | |", "|---" * 5 + "|"]
    for v in verdicts:
        ratio = "" if v.ratio is None else f"{v.ratio:.3f}"
        lines.append(
            f"| {v.bound.name} | {v.bound.against} | {ratio} | {v.bound.most:.2f} | {v.said} |"
        )
    return "\n".join(lines)
