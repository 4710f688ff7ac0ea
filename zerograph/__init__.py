"""zerograph: ZeRO as a compiler pass for PyTorch.

A name is imported when it is first used: pytest imports this package in every run, for its plugin, and
torch takes seconds.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerograph.access import gathered
    from zerograph.config import ZeroConfig, load_config
    from zerograph.engine import Engine, compile
    from zerograph.integrations.deepspeed import add_config_arguments, initialize
    from zerograph.plan import Plan
    from zerograph.planning import plan
    from zerograph.runtime.record import record
    from zerograph.runtime.world import init_distributed

__all__ = [
    "Engine",
    "Plan",
    "ZeroConfig",
    "add_config_arguments",
    "compile",
    "gathered",
    "init_distributed",
    "initialize",
    "load_config",
    "plan",
    "record",
]

_HOMES = {
    "Engine": "engine",
    "Plan": "plan",
    "ZeroConfig": "config",
    "add_config_arguments": "integrations.deepspeed",
    "compile": "engine",
    "gathered": "access",
    "init_distributed": "runtime.world",
    "initialize": "integrations.deepspeed",
    "load_config": "config",
    "plan": "planning",
    "record": "runtime.record",
}


def __getattr__(name: str) -> Any:
    """A public name, or a module of this package."""
    if name == "__version__":
        return version(__name__)
    home = f"{__name__}.{_HOMES.get(name, name)}"
    try:
        module = import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Though there is a module `zerograph.plan`, the attribute of that name is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "plan" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
