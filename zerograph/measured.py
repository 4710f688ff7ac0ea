"""Measured: what a profile of real steps found, as plain data: calls, sums, shares, a table. No torch.

A call goes from its start to its end. The time waited is what compute stood still for it; the rest of it is
hidden. Sums over calls count overlapping calls apiece; `Measured.communication` counts a moment once.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich import box
from rich.console import Console
from rich.table import Table

from zerograph.units import duration, size

_ROWS = 40
"""Rows that the table shows at most; the least waited for are left out."""
_COLUMNS = ("region", "collective", "bucket", ">calls", ">waited", ">under way", ">hidden")
_MOVED = (">sent", ">bandwidth")


@dataclass(frozen=True)
class CallEntry:
    """One collective. Moments are seconds from the start of the profile."""

    kind: str
    """As the plan's traffic names it: `gather`, `gather over node`, `reduce_scatter`, .."""
    bucket: str
    """Empty for one of no bucket."""
    region: str
    nbytes: int
    """Bytes of the full buffer, as in `plan.traffic`."""
    sent: float
    """Bytes that one rank sends."""
    start: float
    end: float
    seen: bool
    """Whether its end was seen. If not, it had ended by `end`."""
    waits: tuple[tuple[float, float], ...]
    """From when to when compute stood still for it."""

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.end - self.start


@dataclass(frozen=True)
class StretchEntry:
    """A program's run: all of a forward, a backward or a step, waits included."""

    region: str
    start: float
    end: float


@dataclass(frozen=True)
class Collective:
    """All calls of one kind, bucket and region."""

    kind: str
    bucket: str
    region: str
    calls: int
    waited: float
    """Seconds that compute stood still for them."""
    seconds: float
    """From start to end, summed over calls; an upper bound where not all were `seen`."""
    nbytes: int
    """Bytes of their full buffers, as in `plan.traffic`."""
    sent: float
    """Bytes that one rank sent for them."""
    seen: int
    """Calls whose end was seen."""

    @property
    def hidden(self) -> float:
        """The share of `seconds` behind which compute went on."""
        return 1 - self.waited / self.seconds if self.seconds else 1.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second that one rank sent; a lower bound where not all were `seen`.

        Calls that are under way together share the link, so each reaches less than the link does.
        """
        return self.sent / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Measured:
    """Some steps of one rank."""

    model: str
    stage: int
    world: int
    rank: int
    steps: int
    calls: tuple[CallEntry, ...]
    stretches: tuple[StretchEntry, ...]

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """By kind, bucket and region, in the order of their first starts."""
        found: dict[tuple[str, str, str], list[CallEntry]] = {}
        for call in self.calls:
            found.setdefault((call.kind, call.bucket, call.region), []).append(call)
        return tuple(_sum(*key, calls) for key, calls in found.items())

    @cached_property
    def communication(self) -> float:
        """Seconds in which at least one collective was under way."""
        total, until = 0.0, float("-inf")
        for call in sorted(self.calls, key=lambda call: call.start):
            total += max(0.0, call.end - max(call.start, until))
            until = max(until, call.end)
        return total

    @cached_property
    def waited(self) -> float:
        """Seconds that compute stood still for collectives."""
        return sum(end - start for call in self.calls for start, end in call.waits)

    @property
    def hidden(self) -> float:
        """The share of `communication` behind which compute went on; 1 if there is none."""
        return 1 - self.waited / self.communication if self.communication else 1.0

    @property
    def seconds(self) -> float:
        """From the start of the first program to the end of the last."""
        return max((stretch.end for stretch in self.stretches), default=0.0)

    def line(self) -> str:
        """`communication 1.42 s, 96 % hidden`."""
        if not self.calls:
            return "no communication"
        return f"communication {duration(self.communication)}, {_share(self.hidden)} hidden"

    def table(self) -> Table:
        """The collectives, for rich."""
        steps = f"{self.steps} step{'' if self.steps == 1 else 's'}"
        title = f"{self.model}, stage {self.stage}, rank {self.rank} of {self.world}: {steps}"
        made = Table(
            title=f"{title} in {duration(self.seconds)}, {self.line()}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for name in (*_COLUMNS, *_MOVED):
            right = name.startswith(">")
            made.add_column(
                name.removeprefix(">"), justify="right" if right else "left", no_wrap=True
            )
        shown, others = self._shown()
        for each in shown:
            made.add_row(each.region, each.kind, each.bucket or "-", *_numbers([each]))
        if others:
            made.add_row(f"{len(others)} others", "", "", *_numbers(others))
        if len(self.collectives) > 1:
            made.add_section()
            made.add_row("all", "", "", *_numbers(self.collectives))
        return made

    def __str__(self) -> str:
        """The table as text, as wide as it needs to be."""
        console = Console(file=io.StringIO(), width=200, highlight=False, emoji=False)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _shown(self) -> tuple[list[Collective], list[Collective]]:
        """Those that are waited for longest, in order, and the others."""
        by_wait = sorted(self.collectives, key=lambda each: -each.waited)
        kept = set(by_wait if len(by_wait) <= _ROWS else by_wait[: _ROWS - 1])
        return (
            [each for each in self.collectives if each in kept],
            [each for each in self.collectives if each not in kept],
        )


def _sum(kind: str, bucket: str, region: str, calls: Sequence[CallEntry]) -> Collective:
    return Collective(
        kind,
        bucket,
        region,
        calls=len(calls),
        waited=sum(end - start for call in calls for start, end in call.waits),
        seconds=sum(call.seconds for call in calls),
        nbytes=sum(call.nbytes for call in calls),
        sent=sum(call.sent for call in calls),
        seen=sum(call.seen for call in calls),
    )


def _numbers(of: Iterable[Collective]) -> Sequence[str]:
    """The table's numbers of some collectives together; `<=` and `>=` where ends were not seen."""
    of = list(of)
    calls, seen = sum(c.calls for c in of), sum(c.seen for c in of)
    waited, seconds = sum(c.waited for c in of), sum(c.seconds for c in of)
    sent = sum(c.sent for c in of)
    at_most, at_least = ("", "") if seen == calls else ("<= ", ">= ")
    return (
        f"{calls:,}",
        duration(waited) if waited else "0 s",
        at_most + duration(seconds),
        at_most + _share(1 - waited / seconds if seconds else 1.0),
        size(round(sent)),
        f"{at_least}{size(round(sent / seconds))}/s" if seconds else "-",
    )


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"
