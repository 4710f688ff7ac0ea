"""guard: a model whose values an engine has says so when it is called, saved or copied.

Parameters that an engine owns keep shapes and names, and have no values. What would compute, or write a
checkpoint of, NaN in silence is an error instead that names the way:

    model(batch)                                      engine(batch)
    torch.save(model.state_dict()), save_pretrained   engine.state_dict()
    copy.deepcopy(model), torch.save(model)           within zerograph.gathered(engine), or after destroy()

Within `gathered` all of it works. Left alone are `state_dict(keep_vars=True)`, which answers the parameters
themselves, and a call of a submodule. A capture would trace a hook of the forward, and an engine compares
hooks with those of the capture: while it looks for a program, this one is not there (`lifted`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from zerograph.errors import PlanError
from zerograph.runtime.state import State


class Guard:
    """The hooks of one engine's model."""

    def __init__(self, state: State) -> None:
        self._call = _Call(state, "")
        self._saves = [
            inner.register_state_dict_pre_hook(_Save(state, f"{name}." if name else ""))
            for name, inner in state.module.named_modules()
        ]
        self._calls = self._hooked()

    def _hooked(self) -> RemovableHandle:
        return self._call.state.module.register_forward_pre_hook(self._call, prepend=True)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model as it is without the hook of its forward."""
        self._calls.remove()
        try:
            yield
        finally:
            self._calls = self._hooked()

    def remove(self) -> None:
        for handle in (self._calls, *self._saves):
            handle.remove()


@dataclass
class _Hook:
    """Of one engine; in a copy of its model it is of none."""

    state: State
    prefix: str
    """Of the names of its module's parameters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Callable[..., None]":
        self.require("a copy of the model", "copy it within zerograph.gathered(engine)")
        return _passes

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        self.require("the saved model", "save engine.state_dict()")
        return _no_hook, ()

    def require(self, what: str, change: str) -> None:
        """Raise PlanError if a parameter of the module is without values."""
        names = (name for name in self.state.parameters if name.startswith(self.prefix))
        hidden = next((name for name in names if name not in self.state.shown), None)
        if hidden is not None:
            raise PlanError(
                f"{what} would have no values: an engine owns the parameters of "
                f"{type(self.state.module).__name__} ({hidden} is the first); {change}, or end the engine "
                "with engine.destroy()"
            )


class _Save(_Hook):
    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not keep_vars:
            way = (
                "take engine.state_dict() (save_pretrained(folder, state_dict=engine.state_dict()))"
            )
            self.require("this state dict", way)


class _Call(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        self.require(
            "this forward", "call the engine, or the model within zerograph.gathered(engine)"
        )


def _passes(*given: Any) -> None:
    """The hook of a copy."""


def _no_hook() -> Callable[..., None]:
    return _passes
