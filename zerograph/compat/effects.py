"""What a captured forward read and changed in Python, as dynamo notes it.

Dynamo writes a guard for every Python value that it read and fixed, and knows every object that existed
before and that the forward changed. The capture for export keeps neither.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any
from unittest import mock

from torch._dynamo import functional_export
from torch._dynamo.guards import _get_closure_vars
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting


@dataclass(frozen=True)
class Read:
    """A value that was read: `source` is an expression over `L` (locals of the forward) and `G` (globals)."""

    source: str
    guard: str
    """The kind of dynamo's guard: CONSTANT_MATCH, SEQUENCE_LENGTH, ..."""
    of: Any = None
    """The attribute or key that the guard asks for, where it asks for one."""


@dataclass(frozen=True)
class Write:
    """An object that was changed: attributes by name, or its items if there are none."""

    source: str
    attributes: tuple[str, ...]


@dataclass
class Effects:
    """All of one capture."""

    own: str = "self"
    """What the forward calls its module."""
    reads: list[Read] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    globals: dict[str, Any] = field(default_factory=dict)
    extra: str = ""
    """What the forward calls the dict of its further keyword arguments, which is new at each call."""


def guard_names() -> dict[str, Any]:
    """The names that sources of dynamo use beside `L` and `G`."""
    return dict(_get_closure_vars())


@contextlib.contextmanager
def recorded() -> Iterator[Effects]:
    """Within, a capture leaves its effects here."""
    effects = Effects()
    capture = vars(functional_export)["fullgraph_capture"]
    replay = SideEffects.codegen_save_tempvars

    def capturing(*args: Any, **kwargs: Any) -> Any:
        made = capture(*args, **kwargs)
        found = made.graph_capture_output
        code = found.traced_code[0]
        effects.own, effects.extra = code.co_varnames[0], _keywords(code)
        effects.globals = found.f_globals
        guards = found.output_graph.guards
        effects.reads = list(dict.fromkeys(map(_read, guards)))
        return made

    def replaying(side_effects: SideEffects, *args: Any, **kwargs: Any) -> Any:
        effects.writes = list(_writes(side_effects))
        return replay(side_effects, *args, **kwargs)

    with (
        mock.patch.object(functional_export, "fullgraph_capture", capturing),
        mock.patch.object(SideEffects, "codegen_save_tempvars", replaying),
    ):
        yield effects


def _read(guard: Any) -> Read:
    asked = getattr(guard.create_fn, "keywords", {})
    return Read(guard.name, guard.create_fn_name(), asked.get("attr", asked.get("key")))


def _keywords(code: CodeType) -> str:
    """The name of `**kwargs` in a function's code; empty if it has none."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return ""
    plain = code.co_argcount + code.co_kwonlyargcount
    return code.co_varnames[plain + bool(code.co_flags & inspect.CO_VARARGS)]


def _writes(side_effects: Any) -> Iterator[Write]:
    existing = (AttributeMutationExisting, ValueMutationExisting)
    for variable in side_effects._get_modified_vars():
        if isinstance(variable.mutation_type, existing) and variable.source is not None:
            if variable.source.name.endswith("._buffers") and _in_place(variable):
                continue
            attributes = side_effects.store_attr_mutations.get(variable, {})
            yield Write(variable.source.name, tuple(attributes))


def _in_place(buffers: Any) -> bool:
    """Whether each buffer of a module is still its own tensor: `self.count += 1` assigns it to itself.

    So is the result of an operator that was given it as `out`.
    """
    before = {_name(key): value for key, value in buffers.original_items.items()}
    after = {_name(key): value for key, value in buffers.items.items()}
    return before.keys() == after.keys() and all(
        _same(after[name], before[name]) for name in before
    )


def _name(key: Any) -> Any:
    return getattr(key, "vt", key).as_python_constant()


def _same(value: Any, buffer: Any) -> bool:
    value, buffer = value.realize(), buffer.realize()
    if not (value.is_tensor() and buffer.is_tensor()):
        return value is buffer
    node, own = value.as_proxy().node, buffer.as_proxy().node
    given = node.kwargs.get("out", node)
    return bool(given.meta.get("example_value") is own.meta.get("example_value"))
