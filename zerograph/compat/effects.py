"""What a captured forward read and changed in Python, as dynamo notes it.

Dynamo writes a guard for every Python value that it read and fixed, and knows every object that existed
before and that the forward changed. The capture for export keeps neither.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch._dynamo import functional_export
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting


@dataclass(frozen=True)
class Read:
    """A value that was read: `source` is an expression over `L` (locals of the forward) and `G` (globals)."""

    source: str
    guard: str
    """The kind of dynamo's guard: CONSTANT_MATCH, SEQUENCE_LENGTH, ..."""


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


@contextlib.contextmanager
def recorded() -> Iterator[Effects]:
    """Within, a capture leaves its effects here."""
    effects = Effects()
    capture = vars(functional_export)["fullgraph_capture"]
    replay = SideEffects.codegen_save_tempvars

    def capturing(*args: Any, **kwargs: Any) -> Any:
        made = capture(*args, **kwargs)
        found = made.graph_capture_output
        effects.own = found.traced_code[0].co_varnames[0]
        effects.globals = found.f_globals
        guards = found.output_graph.guards
        effects.reads = list(dict.fromkeys(Read(g.name, g.create_fn_name()) for g in guards))
        return made

    def replaying(side_effects: SideEffects, *args: Any, **kwargs: Any) -> Any:
        effects.writes = list(_writes(side_effects))
        return replay(side_effects, *args, **kwargs)

    with (
        mock.patch.object(functional_export, "fullgraph_capture", capturing),
        mock.patch.object(SideEffects, "codegen_save_tempvars", replaying),
    ):
        yield effects


def _writes(side_effects: Any) -> Iterator[Write]:
    existing = (AttributeMutationExisting, ValueMutationExisting)
    for variable in side_effects._get_modified_vars():
        if isinstance(variable.mutation_type, existing) and variable.source is not None:
            attributes = side_effects.store_attr_mutations.get(variable, {})
            yield Write(variable.source.name, tuple(attributes))
