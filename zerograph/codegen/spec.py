"""What a kernel is: its kind, rule and dtypes. Never a size: one kernel serves every bucket.

    Update("adamw", frozenset(), bf16, fp32, bf16)   update_adamw_bf16_f32_bf16   28 bytes an element
    Norm(bf16)                                       norm_bf16
    Finish(clips, fp32, skips)                       finish_clip_f32_skip
    Copy("pack", fp32, bf16)                         pack_f32_bf16

A spec is a frozen value: programs of all ranks, the cache and ahead-of-time compilation name a kernel by it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zerograph.codegen.expr import Assignment, Expr, traced
from zerograph.codegen.rules import RULES, Described, Flags

Phase = Literal["whole", "measure", "apply"]

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}

CHUNK = 1 << 14
"""Elements of a slice that one partial sum of squares is of."""
LANES = 1 << 10
"""Sums in fp32 side by side, each of CHUNK / LANES squares in order; float64 over them."""
RUN_ALIGN = 16
"""Starts and stops of runs are multiples of this many elements (layout.py), so that accesses vectorise."""


@dataclass(frozen=True)
class Update:
    """The optimizer on the runs of one slice, in one launch.

    Reads master [n], grad [n], the rule's states [n], the table of tiles int64 [tiles, 3] (start, stop,
    row), scalars [rows, columns], control fp32 [2] (factor, applies); writes master, states, low [n].
    """

    rule: str
    flags: Flags
    grad: torch.dtype
    master: torch.dtype
    """Also the dtype of the states and of the arithmetic."""
    low: torch.dtype | None = None
    """Dtype of the copy that is gathered, None where the master itself is."""
    controlled: bool = True
    """Whether it takes `control`."""
    phase: Phase = "whole"
    """Rules with norms of parameters take two launches. "measure" updates the states and writes two sums
    of squares a tile, float64 [tiles, 2]: of the parameters and of the change; "apply" reads the two
    totals of each run, float64 [runs, 2], and updates the parameters. Their tables say the run in a
    fourth column."""

    kind: ClassVar[str] = "update"

    @property
    def name(self) -> str:
        last = [SHORT[self.low]] if self.low else []
        free = [] if self.controlled else ["free"]
        dtypes = [SHORT[self.grad], SHORT[self.master], *last]
        first = "update" if self.phase == "whole" else self.phase
        return "_".join([first, self.rule, *sorted(self.flags), *dtypes, *free])

    @property
    def described(self) -> Described:
        return RULES[self.rule]

    @property
    def states(self) -> tuple[str, ...]:
        return self.described.states_of(self.flags)

    @property
    def double(self) -> bool:
        return self.master == torch.float64

    @property
    def nbytes(self) -> int:
        """Bytes moved per element: gradient read, master and states read and written, low written."""
        arrays = 1 + len(self.states) + len(self.stored)
        read = self.grad.itemsize if self.phase != "apply" else 0
        last = self.low.itemsize if self.low and "param" in self.stored else 0
        return read + arrays * self.master.itemsize + last

    @property
    def stored(self) -> tuple[str, ...]:
        """Of the parameters and states, what it writes."""
        param = ("param",) if self.phase != "measure" else ()
        return (*param, *(self.states if self.phase != "apply" else ()))

    def assignments(self) -> list[Assignment]:
        """The body's, in order."""
        rule = self.described
        body = rule.apply if self.phase == "apply" else rule.body
        assert body is not None and (self.phase == "whole") == (rule.apply is None)
        grad = ("grad",) if self.phase != "apply" else ()
        trust = ("trust",) if self.phase == "apply" else ()
        elements, scalars = ("param", *grad, *self.states), (*rule.scalars, *trust)
        return traced(lambda block: body(block, self.flags), elements, scalars)

    def scalars(self) -> list[tuple[int, str]]:
        """(column, name) of the scalars that it reads."""
        read = {name for _, expr in self.assignments() for name in _names(expr)}
        read |= {"min_coeff", "max_coeff"} if self.phase == "apply" else set()
        return [(i, name) for i, name in enumerate(self.described.scalars) if name in read]


def _names(expr: Expr) -> set[str]:
    own = {str(expr.leaf)} if expr.op == "name" else set()
    return own.union(*map(_names, expr.args))


@dataclass(frozen=True)
class Norm:
    """Sums of squares of the equal slices of a flat gradient, in two stages without atomics.

    Reads grad [parts * size]; writes into partials float64 [parts, blocks] one sum a chunk of CHUNK
    elements of a slice, then totals float64 [parts].
    """

    grad: torch.dtype

    kind: ClassVar[str] = "norm"

    @property
    def name(self) -> str:
        return f"norm_{SHORT[self.grad]}"

    @property
    def double(self) -> bool:
        return self.grad == torch.float64

    @property
    def nbytes(self) -> int:
        return self.grad.itemsize


@dataclass(frozen=True)
class Finish:
    """From all ranks' partials to the norm, the factor of the update and whether it applies.

    Reads partials float64 [world], divided [] (what gradients are to be multiplied by), limit float64 []
    (the norm to clip to); writes norm float64 [] and control fp32 [2] (factor, applies).
    """

    clips: bool
    divided: torch.dtype | None = None
    skips: bool = False
    """Whether an update whose norm is not finite does not apply."""

    kind: ClassVar[str] = "finish"

    @property
    def name(self) -> str:
        divided = [SHORT[self.divided]] if self.divided else []
        clips, skips = ["clip"] * self.clips, ["skip"] * self.skips
        return "_".join(["finish", *clips, *divided, *skips])

    @property
    def nbytes(self) -> int:
        """Bytes a partial."""
        return 8


@dataclass(frozen=True)
class Copy:
    """A contiguous piece [n] cast and multiplied by `scale` fp32 []: "pack" into a bucket, or "unpack".

    "pack" rounds to the target's dtype before it multiplies, as `copy_` and `mul_` do.
    """

    kind: Literal["pack", "unpack"]
    source: torch.dtype
    target: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kind}_{SHORT[self.source]}_{SHORT[self.target]}"

    @property
    def double(self) -> bool:
        return torch.float64 in (self.source, self.target)

    @property
    def rounds_first(self) -> bool:
        """Whether the product is of a value that the cast has rounded."""
        return self.kind == "pack" and torch.promote_types(self.source, self.target) != self.target

    @property
    def nbytes(self) -> int:
        return self.source.itemsize + self.target.itemsize


Spec = Update | Norm | Finish | Copy
