"""What two canonical texts differ in: their unified diff, and what changed in their summaries.

    gather    5 (514.0 KiB) -> 7 (675.0 KiB)
    peak      851.8 KiB -> 827.1 KiB

Texts alone are read here, so that a golden of last year can be compared; nothing imports torch.
"""

import difflib
import re

_SUMMARY = "summary  "
_ENTRY = re.compile(r"(\w+(?: over \w+)?) (\d+ \(.*\)|\d+ ops|[\d.]+ [KMGT]?i?B)")


def unified(
    before: str, after: str, names: tuple[str, str] = ("before", "after"), context: int = 3
) -> list[str]:
    """The lines of a unified diff, without line ends; empty for equal texts."""
    old, new = before.splitlines(), after.splitlines()
    return list(difflib.unified_diff(old, new, *names, n=context, lineterm=""))


def changes(before: str, after: str) -> list[str]:
    """What changed in collectives, bytes and peak, one line each; empty for texts without summaries."""
    old, new = _summary(before), _summary(after)
    if not old or not new:
        return []
    differing = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    width = max(map(len, differing), default=0)
    lines = [f"{n:<{width}}  {old.get(n, 'none')} -> {new.get(n, 'none')}" for n in differing]
    return lines or ["collectives, bytes and peak are the same"]


def _summary(text: str) -> dict[str, str]:
    """The entries of the last summary line by name."""
    lines = [line for line in text.splitlines() if line.startswith(_SUMMARY)]
    entries = lines[-1].removeprefix(_SUMMARY).split("  ") if lines else []
    return dict(found.groups() for entry in entries if (found := _ENTRY.fullmatch(entry)))  # type: ignore[misc]
