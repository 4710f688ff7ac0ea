"""What an optimizer rule is, and what bodies of several rules begin with. No rule is named here.

Options that change the code (amsgrad, nesterov, maximize, whether there is momentum) are `flags`; every
other option is a number in the table of scalars, so that a schedule changes no kernel. Operations are in
the order of torch's unfused CPU loop, with its fused multiply-adds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zerograph.codegen.expr import Block, fma

Options = Mapping[str, Any]
Flags = frozenset[str]
Body = Callable[[Block, Flags], None]
TINY = 2.0**-126
"""The smallest normal number of fp32: smaller ones may be 0 in a kernel."""


@dataclass(frozen=True)
class Run:
    """A range of a slice whose parameters share one group and one step count."""

    start: int
    stop: int
    group: int
    step: int
    """The number of this update for the range's parameters, from 1."""


@dataclass(frozen=True)
class Kind:
    """What a plan says of an optimizer. `scalars` names the columns of the table of scalars."""

    name: str
    defaults: Options
    states: Callable[[Options], tuple[str, ...]]
    """State slices that it keeps with the given options."""
    scalars: tuple[str, ...]


@dataclass(frozen=True)
class Described(Kind):
    """A rule of which kernels are made. States are named as torch names them."""

    host: Callable[[Options, int], Mapping[str, float]]
    """(options, step number from 1) -> scalars by name, in float64."""
    body: Body
    """Reads `param`, `grad`, the states and scalars; assigns `param` and the states."""
    source: str
    """Where the rule is defined."""
    switches: tuple[str, ...] = ()
    """Options that change the code."""
    apply: Body | None = None
    """Of a rule that needs norms of whole parameters: a second launch, which has `trust`, a scalar, and
    assigns `param`; the first assigns the states and `change`, whose norms and the parameters' are taken."""

    divides_by: tuple[str, ...] = ()
    """Options that would make 0 / 0 where gradients are zero, padding included, if they were 0 in fp32."""

    def refused(self, options: Options) -> str:
        """Why a group cannot have these options; empty if it can."""
        for name in self.divides_by:
            if not float(options[name]) >= TINY:
                return (
                    f"{name}={float(options[name])}, and {self.name} needs at least {TINY:.1e} (fp32's "
                    f"smallest normal number): where gradients are zero its change would be 0 / 0, and "
                    f"the norm of all of them NaN; the default is {self.defaults[name]}"
                )
        return ""

    def flags(self, options: Options) -> Flags:
        """The switches that are not zero or false."""
        return frozenset(name for name in self.switches if options.get(name))

    def row(self, options: Options, step: int) -> list[float]:
        """One row of the table of scalars."""
        made = self.host(options, step)
        return [made[name] for name in self.scalars]

    def states_of(self, flags: Flags) -> tuple[str, ...]:
        """The states that a kernel with these flags takes."""
        return self.states({name: name in flags for name in self.defaults})


# Beginnings of bodies


def turn(k: Block, flags: Flags) -> None:
    """The other direction, to climb."""
    if "maximize" in flags:
        k.grad = -k.grad


def turn_and_decay(k: Block, flags: Flags) -> None:
    """L2 regularisation: decay is part of the gradient."""
    turn(k, flags)
    k.grad = fma(k.weight_decay, k.param, k.grad)
