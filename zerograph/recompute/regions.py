"""regions: into how many regions to cut the repeated blocks, so that the least is alive at once.

    regions    kept at least     peak of activations        12 layers of 1 MiB, boundaries of 0.1 MiB
       12         1.2 MiB            2.2 MiB
        6         0.6 MiB            2.6 MiB
        4         0.4 MiB            3.4 MiB
    none          0                 12.0 MiB                all is computed again at once

With boundaries kept the backward has one region's values at a time. Which number is best depends on how large
a layer is beside its boundary ("Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, section 4).
So runs of one block, of two, .. are tried, until longer ones are worse twice. For a budget each number that
fits is a choice of its own, with as few FLOPs as that allows; of those within SLACK of the lowest peak that
with the fewest FLOPs is taken. Where a choice keeps the boundaries anyhow, all are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from zerograph import compat
from zerograph.boundaries import crossing, no_blocks, regions_of_blocks
from zerograph.errors import PlanError
from zerograph.ir import TrainGraph
from zerograph.recompute.choose import Choice, Chooser
from zerograph.recompute.peak import Peaks
from zerograph.units import size

SLACK = 0.01
"""The share of the lowest peak by which one may be higher if less is computed again for it."""

STEPS = 32
"""Of all bytes beyond the least; the first few are tried as the budget with the lowest peak."""


@dataclass(frozen=True)
class Option:
    """One number of regions, whose boundaries are kept at every budget; 0 has none."""

    number: int
    chooser: Chooser
    lowest: int
    """The peak of activations with nothing else kept."""

    @property
    def least(self) -> int:
        """The fewest bytes that it keeps."""
        return self.chooser.solver.least


@dataclass(frozen=True)
class Options:
    """What can be chosen for one graph."""

    peaks: Peaks
    found: tuple[Option, ...]

    @classmethod
    def of(cls, graph: TrainGraph, whole: bool) -> "Options":
        """`whole`: what lies outside of the repeated blocks may be computed again, too."""
        peaks = Peaks.of(graph)
        found = [_option(graph, peaks, 0, set())] if whole else []
        worse = 0
        for number in _numbers(len(graph.layout.blocks)):
            regions = regions_of_blocks(graph, number)
            pinned = crossing(graph, regions) if whole else pins_of(graph, regions)
            option = _option(graph, peaks, number, pinned)
            worse = worse + 1 if found and option.lowest > min(o.lowest for o in found) else 0
            found.append(option)
            if worse == 2:
                break
        return cls(peaks, tuple(found))

    @property
    def lowest(self) -> Option:
        """The one with the lowest peak; of several the one that keeps most."""
        return min(self.found, key=lambda option: (option.lowest, -option.least))

    @cached_property
    def start(self) -> int:
        """The budget with the lowest peak: what the last region keeps may be had for nothing."""
        least, most = self.lowest.least, self._most
        tried = [least + (most - least) * step // STEPS for step in range(STEPS // 8 + 1)]
        return min(tried, key=lambda budget: self.peaks.peak(self.choose(budget)[1].keep))

    def budget(self, fraction: float) -> int:
        """Bytes at a fraction of the way from what the lowest peak needs (0) to all (1)."""
        return self.start + int(fraction * (self._most - self.start))

    @property
    def _most(self) -> int:
        return max(option.chooser.solver.most for option in self.found)

    def choose(self, budget: int) -> tuple[int, Choice]:
        """The number of regions for a budget of bytes, and the choice.

        Raises PlanError if it is less than the lowest peak needs.
        """
        if budget < self.lowest.least:
            least = self.lowest.least
            raise PlanError(
                f"a budget of {budget} bytes ({size(budget)}) for what the forward keeps is too small: "
                f"{least} bytes ({size(least)}) are the smallest budget that works; with fewer, what must be "
                "kept does not fit, or more is alive at once in the backward"
            )
        chosen = [(o.number, o.chooser.choose(budget)) for o in self.found if o.least <= budget]
        peaks = [self.peaks.peak(choice.keep) for _, choice in chosen]
        near = (pair for pair, p in zip(chosen, peaks) if p <= (1 + SLACK) * min(peaks))
        return min(near, key=lambda pair: (pair[1].flops, pair[1].traffic))


def pins_of(graph: TrainGraph, regions: dict[fx.Node, str]) -> set[fx.Node]:
    """What checkpoints alone keep: what enters or leaves regions, lies outside, or a policy keeps."""
    outside = (n for n in graph.nodes("forward") if n not in regions or compat.policy_keeps(n))
    return crossing(graph, regions).union(outside)


@dataclass(frozen=True)
class Auto:
    """`number_checkpoints: "auto"`: as many regions as give the lowest peak."""

    budget: int | None = None
    """Bytes that the forward may keep."""
    on_host: bool = False
    """Boundaries leave the device: with a region for each block least is alive at once."""

    def __call__(self, graph: TrainGraph) -> int:
        """Raises PlanError for a model without repeated blocks, or too small a budget."""
        if not graph.layout.blocks:
            raise no_blocks(graph, "auto")
        if self.on_host and self.budget is None:
            return len(graph.layout.blocks)
        options = Options.of(graph, whole=False)
        if self.budget is None:
            return options.lowest.number
        try:
            return options.choose(self.budget)[0]
        except PlanError as error:
            raise PlanError(f"compile.activation_budget={self.budget}: {error}") from error


def _option(graph: TrainGraph, peaks: Peaks, number: int, pinned: set[fx.Node]) -> Option:
    chooser = Chooser.of(graph, pinned)
    least = chooser.choose(chooser.solver.least)
    return Option(number, chooser, peaks.peak(least.keep))


def _numbers(blocks: int) -> Iterator[int]:
    """Regions of one block, of two, ..; each number once."""
    before = 0
    for length in range(1, blocks + 1):
        number = -(-blocks // length)
        if number != before:
            yield number
        before = number
