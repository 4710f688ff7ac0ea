"""What a forward reads and changes in Python beside its tensors.

    self.scale * x          read: the number is fixed in the graph, and compared at every call
    self.steps += 1         changed: a captured forward would lose it, so it is refused

A program serves a call only if everything that its capture read is still the same: numbers, strings and
functions that the forward used, lengths of lists, keys of dicts, hooks, the types of submodules, globals.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from zerograph import compat
from zerograph.errors import CaptureError

_VALUES = (
    *("CONSTANT_MATCH", "EQUALS_MATCH", "ID_MATCH", "CLASS_MATCH"),
    *("FUNCTION_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH"),
)
_FACTS = {
    **dict.fromkeys(_VALUES, "{}"),
    "SEQUENCE_LENGTH": "len({})",
    "DICT_KEYS_MATCH": "tuple({})",
    "EMPTY_NN_MODULE_HOOKS_DICT": "tuple({})",
    "TYPE_MATCH": "type({})",
    "TENSOR_MATCH": "_Same({})",
    "HASATTR": "hasattr({}, {of})",
    "NOT_PRESENT_IN_GENERIC_DICT": "{of} in {}.__dict__",
    **dict.fromkeys(("DICT_CONTAINS", "DICT_NOT_CONTAINS"), "{of} in {}"),
    **dict.fromkeys(("SET_CONTAINS", "SET_NOT_CONTAINS"), "{of} in {}"),
}
"""What is compared of a value, by the kind of its guard; `of` is the attribute or key that is asked for."""
_ELSEWHERE = re.compile(r"__builtins_|__import_(torch|transformers)($|_dot_)")
"""Globals that no training loop changes."""
_KEYED = re.compile(r"\._(parameters|buffers)\b")
"""Sources that the engine itself looks after; a module's `training` is in the key of a call (`_is_mode`)."""
_ARRAY = re.compile(r"___from_numpy\((.*)\)")
"""An array is the same as long as it is the same object."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_STEP = re.compile(r"\.[A-Za-z_]\w*|\['[^']*'\]|\[-?\d+\]")
_GONE = (AttributeError, IndexError, KeyError, TypeError, NameError)


@dataclass(frozen=True)
class _Fact:
    """An expression over the module and globals that is compared at every call."""

    text: str
    """With "{}" for the source, and "{of}" for the constant."""
    source: str
    of: Any


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
    facts = list(dict.fromkeys(_facts(effects)))
    while True:
        function = _function(facts, effects)
        try:
            values = function(model)
            break
        except _GONE:  # made by the forward itself: no call sees it before
            facts = [fact for fact in facts if _exists(fact, effects, model)]
    return Reads(tuple(_spoken(f, effects.own) for f in facts), values, function)


def _facts(effects: compat.Effects) -> Iterator[_Fact]:
    own = f"L['{effects.own}']"
    yield _Fact("{}.__dict__.get({of})", own, "forward")
    yield from (_Fact("tuple({})", f"{own}.{hooks}", None) for hooks in _HOOKS)
    for read in effects.reads:
        text = _FACTS.get(read.guard)
        if text is None or not _is_ours(read.source, effects) or _KEYED.search(read.source):
            continue
        if not _is_mode(read.source, effects):
            yield _Fact(text, _ARRAY.sub(r"\1", read.source), read.of)


def _is_ours(source: str, effects: compat.Effects) -> bool:
    """Whether it starts from the module or from a global of the user's; the call's arguments do not."""
    locals_ = re.findall(r"L\['([^']*)'\]", source)
    globals_ = re.findall(r"G\['([^']*)'\]", source)
    if any(name != effects.own for name in locals_) or any(map(_ELSEWHERE.match, globals_)):
        return False
    return bool(locals_ or globals_)


def refuse_lost_writes(model: nn.Module, effects: compat.Effects) -> None:
    """Raise CaptureError if the forward changed its module, a global or an argument, which would be lost.

    What torch's and transformers' own modules note for themselves is left out: they compute it again. So is
    the dict of further keyword arguments, which is new at each call.
    """
    for write in effects.writes:
        if write.source.endswith("._buffers"):
            raise CaptureError(
                "the forward assigns a new tensor to a buffer of the module, which a captured forward "
                "would lose; change the buffer in place (`self.count.add_(1)`, `self.mean.copy_(new)`)"
            )
        root = re.match(r"([LG])\['([^']*)'\]", write.source)
        if root is None or (root[1] == "G" and _ELSEWHERE.match(root[2])):
            continue
        if root[1] == "L" and root[2] != effects.own:
            if write.source != f"L['{effects.extra}']":
                _refuse_argument(model, write)
        elif not _notes(model, write, effects):
            where = _said(write.source, effects.own)
            what = ", ".join(f"{where}.{name}".lstrip(".") for name in write.attributes) or where
            raise CaptureError(
                f"the forward of {type(model).__name__} changes {what} in Python, which a captured forward "
                "would do once and never again; return the value, keep a number in a buffer that is "
                "changed in place (`self.steps.add_(1)`), or change it in the training loop"
            )


def _refuse_argument(model: nn.Module, write: compat.Write) -> None:
    raise CaptureError(
        f"the forward of {type(model).__name__} changes its argument {_argument(model, write.source)} in "
        "Python, which the caller of the engine would not see; return the value, or change a copy "
        "(`dict(batch)`, `list(items)`)"
    )


def _argument(model: nn.Module, source: str) -> str:
    """`L['args'][0]['x']`, as a module's call has it, by the forward's own name: `batch['x']`."""
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    if code is not None:
        names = code.co_varnames[1:]
        source = re.sub(r"^L\['args'\]\[(\d+)\]", lambda m: names[int(m[1])], source)
    return re.sub(r"^L\['(?:kwargs'\]\[')?([^']*)'\]", r"\1", source)


def _notes(model: nn.Module, write: compat.Write, effects: compat.Effects) -> bool:
    """Whether the changed object is of torch or transformers."""
    try:
        changed = _function([_Fact("{}", write.source, None)], effects)(model)[0]
    except _GONE:
        return False
    return type(changed).__module__.startswith(("torch.", "transformers."))


def _is_mode(source: str, effects: compat.Effects) -> bool:
    """Whether it is `training` of a module below the model, or of the model."""
    module = rf"L\['{re.escape(effects.own)}'\](\._modules\['[^']*'\])*\.training"
    return re.fullmatch(module, source) is not None


def _exists(fact: _Fact, effects: compat.Effects, model: nn.Module) -> bool:
    try:
        _function([fact], effects)(model)
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
    facts: list[_Fact], effects: compat.Effects
) -> Callable[[nn.Module], tuple[Any, ...]]:
    """A function of the module that answers all facts; common beginnings are looked up once."""
    lines: list[str] = []
    known = {f"L['{effects.own}']": "module"}
    answers = []
    for index, fact in enumerate(facts):
        path, name = "", ""
        for step in _steps(fact.source) or [fact.source]:
            path += step
            if path not in known:
                known[path] = f"v{len(known)}"
                lines.append(f"  {known[path]} = {name + step if name else path}")
            name = known[path]
        answers.append(fact.text.format(name, of=f"of[{index}]"))
    body = "\n".join(lines)
    code = (
        f"def read(module):\n  L = {{{effects.own!r}: module}}\n{body}\n"
        f"  return ({''.join(a + ', ' for a in answers)})"
    )
    constants = [fact.of for fact in facts]
    scope = {**compat.guard_names(), "G": effects.globals, "_Same": _Same, "of": constants}
    exec(code, scope)
    made: Callable[[nn.Module], tuple[Any, ...]] = scope["read"]
    return made


def _spoken(fact: _Fact, own: str) -> str:
    """As the user would write it: `layers.0.tau`, `'x' in options`."""
    said = _said(fact.source, own)
    return said if fact.of is None else f"{fact.of!r} in {said}".removesuffix(" in ")


def _said(source: str, own: str) -> str:
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
