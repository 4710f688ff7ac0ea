"""`zerograph.gathered`: full parameter values for a while, to read or to change."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from zerograph.engine import Engine
from zerograph.errors import PlanError
from zerograph.runtime.shown import shown
from zerograph.runtime.state import State


@contextmanager
def gathered(
    what: Engine | nn.Parameter | Iterable[nn.Parameter], *, modifier_rank: int | None = None
) -> Iterator[None]:
    """Within, the parameters hold their full values, on all ranks; changes are kept at the end.

    `what` is an engine (all its parameters), a parameter, or several of one or more engines. Every rank
    enters, and makes the same changes, unless `modifier_rank` names the rank whose values are taken.
    Blocks may be nested. If the block raises, its changes are dropped. `engine.step()` and loading are
    refused within.

        with zerograph.gathered(engine):
            print(engine.module.lm_head.weight.norm())
    """
    if isinstance(what, Engine):
        state = what.state
        what.require_alive()
        with shown(state, set(state.layout.params), modifier_rank):
            yield
        return
    chosen = [what] if isinstance(what, nn.Parameter) else list(what)
    by_state = _by_state(chosen)
    with ExitStack() as stack:
        for state, names in by_state:
            stack.enter_context(shown(state, names, modifier_rank))
        yield


def _by_state(chosen: list[nn.Parameter]) -> list[tuple[State, set[str]]]:
    found: dict[int, tuple[State, set[str]]] = {}
    for parameter in chosen:
        state = getattr(parameter, "_zerograph_state", None)
        if state is None:
            raise PlanError(
                f"a parameter of shape {list(parameter.shape)} belongs to no engine; "
                "compile its model first"
            )
        name = next(n for n, p in state.parameters.items() if p is parameter)
        found.setdefault(id(state), (state, set()))[1].add(name)
    return list(found.values())
