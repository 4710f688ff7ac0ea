"""What a forward reads and changes in Python beside its tensors.

    self.scale * x          read: the number is fixed in the graph, and compared at every call
    self.steps += 1         changed: a captured forward would lose it, so it is refused

A program serves a call only if everything that its capture read is still the same: numbers, strings and
functions that the forward used, lengths of lists, keys of dicts, hooks, the types of submodules, globals.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from zerograph import compat
from zerograph.errors import CaptureError

_VALUES = (
    *("CONSTANT_MATCH", "EQUALS_MATCH", "ID_MATCH"),
    *("FUNCTION_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH"),
)
_FACTS = {
    **dict.fromkeys(_VALUES, "{}"),
    "SEQUENCE_LENGTH": "len({})",
    "DICT_KEYS_MATCH": "tuple({})",
    "EMPTY_NN_MODULE_HOOKS_DICT": "tuple({})",
    "TYPE_MATCH": "type({})",
    "TENSOR_MATCH": "_Same({})",
}
"""What is compared of a value, by the kind of its guard."""
_ELSEWHERE = ("G['__builtins", "G['__import_torch", "G['__import_transformers")
"""Beginnings of sources that no training loop changes."""
_KEYED = re.compile(r"\.training$|_parameters\b|_buffers\b")
"""Sources that the key of a call, or the engine itself, looks after."""
_STEP = re.compile(r"\.[A-Za-z_]\w*|\['[^']*'\]|\[-?\d+\]")
_GONE = (AttributeError, IndexError, KeyError, TypeError)


@dataclass(frozen=True)
class Reads:
    """The Python values that a capture fixed."""

    names: tuple[str, ...]
    values: tuple[Any, ...]
    read: Callable[[nn.Module], tuple[Any, ...]]

    def hold(self, model: nn.Module) -> bool:
        """Whether all of them are what they were."""
        try:
            now = self.read(model)
        except _GONE:
            return False
        return now == self.values and tuple(map(type, now)) == tuple(map(type, self.values))

    def changed(self, model: nn.Module) -> list[str]:
        """Those that are not, in words: `layers.0.tau is 0.5 (was 1.0)`."""
        try:
            now = self.read(model)
        except _GONE:
            return ["a submodule or attribute that the forward read is gone"]
        pairs = zip(self.names, self.values, now)
        return [_difference(name, was, value) for name, was, value in pairs if was != value]


def reads_of(model: nn.Module, effects: compat.Effects) -> Reads:
    """What the capture of `model` read, with the values that it saw."""
    facts: dict[str, str] = {}
    for read in effects.reads:
        fact = _FACTS.get(read.guard)
        ours = read.source.startswith((f"L['{effects.own}']", "G['"))
        if fact is None or not ours or read.source.startswith(_ELSEWHERE):
            continue
        if _KEYED.search(read.source) or (read.guard == "TYPE_MATCH" and not _is_module(read)):
            continue
        facts.setdefault(fact.format(read.source), read.source)
    steps = {source: _steps(source) for source in facts.values()}
    usable = {fact: source for fact, source in facts.items() if steps[source] is not None}
    while True:
        function = _function(list(usable), list(usable.values()), effects)
        try:
            values = function(model)
            break
        except _GONE:  # made by the forward itself: no call sees it before
            usable = {f: s for f, s in usable.items() if _exists(f, s, effects, model)}
    return Reads(tuple(_spoken(s, effects.own) for s in usable.values()), values, function)


def refuse_lost_writes(model: nn.Module, effects: compat.Effects) -> None:
    """Raise CaptureError if the forward changed its module or a global, which would be lost.

    What torch's and transformers' own modules note for themselves is left out: they compute it again.
    """
    for write in effects.writes:
        if write.source.endswith("._buffers"):
            raise CaptureError(
                "the forward assigns a new tensor to a buffer of the module, which a captured forward "
                "would lose; change the buffer in place (`self.count.add_(1)`, `self.mean.copy_(new)`)"
            )
        ours = write.source.startswith((f"L['{effects.own}']", "G['"))
        if ours and not write.source.startswith(_ELSEWHERE) and not _notes(model, write, effects):
            where = _spoken(write.source, effects.own)
            what = ", ".join(f"{where}.{name}".lstrip(".") for name in write.attributes) or where
            raise CaptureError(
                f"the forward of {type(model).__name__} changes {what} in Python, which a captured forward "
                "would do once and never again; return the value, keep a number in a buffer that is "
                "changed in place (`self.steps.add_(1)`), or change it in the training loop"
            )


def _notes(model: nn.Module, write: compat.Write, effects: compat.Effects) -> bool:
    """Whether the changed object is of torch or transformers."""
    try:
        changed = _function([write.source], [write.source], effects)(model)[0]
    except _GONE:
        return False
    return type(changed).__module__.startswith(("torch.", "transformers."))


def _is_module(read: compat.Read) -> bool:
    return bool(re.search(r"_modules(\['[^']*'\])$", read.source))


def _exists(fact: str, source: str, effects: compat.Effects, model: nn.Module) -> bool:
    try:
        _function([fact], [source], effects)(model)
    except _GONE:
        return False
    return True


def _steps(source: str) -> list[str] | None:
    """`L['self'].a['b']` as its root and steps; None if it is more than attributes and items."""
    root = re.match(r"[LG]\['[^']*'\]", source)
    if root is None:
        return None
    steps, end = [root.group()], root.end()
    while end < len(source):
        step = _STEP.match(source, end)
        if step is None:
            return None
        steps.append(step.group())
        end = step.end()
    return steps


def _function(
    facts: list[str], sources: list[str], effects: compat.Effects
) -> Callable[[nn.Module], tuple[Any, ...]]:
    """A function of the module that answers all facts; common beginnings are looked up once."""
    lines: list[str] = []
    known = {f"L['{effects.own}']": "module"}
    answers = []
    for fact, source in zip(facts, sources):
        steps = _steps(source) or [source]
        path, name = "", ""
        for step in steps:
            path += step
            if path not in known:
                known[path] = f"v{len(known)}"
                lines.append(f"  {known[path]} = {name + step if name else path}")
            name = known[path]
        answers.append(fact.replace(source, name))
    body = "\n".join(lines)
    code = f"def read(module):\n{body}\n  return ({''.join(a + ', ' for a in answers)})"
    scope: dict[str, Any] = {"G": effects.globals, "_Same": _Same}
    exec(code, scope)
    made: Callable[[nn.Module], tuple[Any, ...]] = scope["read"]
    return made


def _spoken(source: str, own: str) -> str:
    """A source as the user would write it: `layers.0.tau`, `BETA`."""
    text = re.sub(r"\.__dict__\['([^']*)'\]", r".\1", source.removeprefix(f"L['{own}']"))
    text = re.sub(r"\.?_modules\['([^']*)'\]", r".\1", re.sub(r"^G\['([^']*)'\]", r"\1", text))
    return text.lstrip(".")


class _Same:
    """A tensor, equal to itself alone."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor

    __hash__ = None  # type: ignore[assignment]


def _difference(name: str, was: Any, value: Any) -> str:
    if isinstance(value, _Same):
        return f"{name} is another tensor"
    return f"{name} is {_short(value)} (was {_short(was)})"


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)[:60]
