"""Sizes that vary: the symbols of a dynamic program, where their values come from, and its guards.

A dim of an input whose size changes from call to call gets a symbol of its own (s0, s1, ... in the
order of inputs and dims), also where two sizes are equal by chance. What the capture assumed about
the symbols is a guard (`s0*s1 == s2*s3`): a call for which one does not hold needs another program.
A static program has no symbols.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from zerograph import compat


@dataclass(frozen=True)
class Size:
    """One symbol: the size or stride of one dim of one input."""

    name: str
    symbol: Any
    """What torch calls it."""
    index: int
    """Of the input, among the call's tensors."""
    path: str
    kind: str
    """"size" or "stride"."""
    dim: int
    hint: int
    """Its value at the call that was captured."""

    def of(self, tensors: Sequence[Tensor]) -> int:
        tensor = tensors[self.index]
        return tensor.size(self.dim) if self.kind == "size" else tensor.stride(self.dim)

    def __str__(self) -> str:
        return f"{self.path}.{self.kind}({self.dim})"


@dataclass(frozen=True)
class Sizes:
    """All symbols of a program, in order, and its guards (sympy expressions over torch's symbols)."""

    symbols: tuple[Size, ...] = ()
    guards: tuple[Any, ...] = ()

    def values(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """The symbols' values in a call with these tensors."""
        return tuple(size.of(tensors) for size in self.symbols)

    def hold(self, values: tuple[int, ...]) -> bool:
        """Whether every guard holds for these values of the symbols."""
        return all(_function(self._own, self.guards)(*values))

    def broken(self, values: tuple[int, ...]) -> list[str]:
        """The guards that do not hold: `input_ids.size(1) <= 64, but input_ids.size(1) is 65`."""
        held = _function(self._own, self.guards)(*values)
        paths = {size.symbol: str(size) for size in self.symbols}
        found = dict(zip(self.symbols, values))
        return [
            f"{compat.show(guard, paths)}, but "
            + " and ".join(
                f"{s} is {v}" for s, v in found.items() if s.symbol in guard.free_symbols
            )
            for guard, ok in zip(self.guards, held)
            if not ok
        ]

    def evaluate(self, shape: Sequence[Any], values: tuple[int, ...]) -> tuple[int, ...]:
        """A shape (or strides) of the graph at these values of the symbols."""
        if not self.symbols:
            return tuple(map(int, shape))
        return _function(self._own, tuple(map(compat.exact, shape)))(*values)

    def show(self, value: Any) -> str:
        """A size, or an expression over torch's symbols, with the names of this program."""
        return compat.show(compat.exact(value), self._names) if self.symbols else str(value)

    @cached_property
    def _own(self) -> tuple[Any, ...]:
        return tuple(size.symbol for size in self.symbols)

    @cached_property
    def _names(self) -> dict[Any, str]:
        return {size.symbol: size.name for size in self.symbols}


_function = lru_cache(maxsize=1024)(compat.function_of)
