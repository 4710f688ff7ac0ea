"""What differs between two plans: lines of their texts, collectives, memory and time.

difference(before, after)  ->  a unified diff, and one line such as
gather 5 -> 7 (+64.0 KiB)  peak 851.8 -> 827.1 KiB  step on h100 1.20 -> 1.14 ms
"""

from dataclasses import dataclass

from zerograph.changes import unified
from zerograph.document import Document, TrafficEntry
from zerograph.errors import PlanError
from zerograph.units import duration, size


@dataclass(frozen=True)
class Difference:
    """A unified diff of two texts, and what it costs; falsy if the texts are the same."""

    lines: tuple[str, ...]
    costs: str
    """One line."""

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        return "\n".join([*self.lines, self.costs]) if self else ""


def difference(
    before: Document,
    after: Document,
    names: tuple[str, str] = ("before", "after"),
    *,
    skeleton: bool = False,
    any_model: bool = False,
) -> Difference:
    """Compare the texts of two plans. Raises PlanError for two models, unless `any_model` allows them."""
    if not any_model:
        _require_one_model(before, after, names)
    lines = unified(before.text(skeleton=skeleton), after.text(skeleton=skeleton), names)
    return Difference(tuple(lines), costs(before, after))


def costs(before: Document, after: Document) -> str:
    """What changed in the collectives, the memory and the time of a step, in one line."""
    kinds = sorted({*before.traffic, *after.traffic})
    none = TrafficEntry(count=0, nbytes=0)
    found = [
        _traffic(kind, before.traffic.get(kind, none), after.traffic.get(kind, none))
        for kind in kinds
    ]
    old, new = before.memory, after.memory
    for name in ("parameters", "gradients", "optimizer", "gathered", "saved", "peak"):
        found.append(_change(name, size(getattr(old, name)), size(getattr(new, name))))
    if before.time.cluster == after.time.cluster:
        step = f"step on {after.time.cluster}"
        found.append(_change(step, duration(before.time.step), duration(after.time.step)))
    return "  ".join(each for each in found if each) or "collectives, memory and time are the same"


def _traffic(kind: str, old: TrafficEntry, new: TrafficEntry) -> str:
    if old == new:
        return ""
    count = f"{old.count} -> {new.count}" if old.count != new.count else f"{new.count}"
    more = new.nbytes - old.nbytes
    return f"{kind} {count} ({'+' if more >= 0 else '-'}{size(abs(more))})"


def _change(name: str, old: str, new: str) -> str:
    """`peak 851.8 -> 827.1 KiB`; the first unit only where it is another."""
    if old == new:
        return ""
    same_unit = old.rpartition(" ")[2] == new.rpartition(" ")[2]
    return f"{name} {old.rpartition(' ')[0] if same_unit else old} -> {new}"


def _require_one_model(before: Document, after: Document, names: tuple[str, str]) -> None:
    if before.model != after.model:
        what = f"{before.model} and {after.model}"
    else:
        old, new = before.parameters(), after.parameters()
        changed = [name for name in (*old, *new) if old.get(name) != new.get(name)]
        if not changed:
            return
        shapes = (str(list(s[changed[0]])) if changed[0] in s else "absent" for s in (old, new))
        what = f"two shapes of {before.model} ({changed[0]}: {' and '.join(shapes)})"
    raise PlanError(
        f"{names[0]} and {names[1]} are plans of different models, {what}; --any-model compares them "
        "all the same"
    )
