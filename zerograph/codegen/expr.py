"""Expressions of a rule's body, and how each target writes them.

    k.exp_avg = lerp(k.exp_avg, k.grad, k.weight)     in a rule
    exp_avg = tl.fma(weight, grad - exp_avg, exp_avg)  about what Triton gets

A body is run once on a `Block`, whose names are expressions; what it assigns becomes a list of
(name, expression), which a `Printer` writes line by line. An expression is of one value an element, or a
scalar (the same for all elements of a tile). The order of operations is that of the body, each
rounded once to the type computed in: no target may reorder, contract or approximate, so that all give
the same bits. Scalars among themselves may only do what is exact: the rest is for the host, in
float64. This file knows no rule and no kernel.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Expr:
    """An operation on expressions; a leaf has a name or a constant's value as `leaf`."""

    op: str
    args: tuple["Expr", ...] = ()
    leaf: str | float = ""
    scalar: bool = False

    def __add__(self, other: "Value") -> "Expr":
        return _made("add", self, other)

    def __sub__(self, other: "Value") -> "Expr":
        return _made("sub", self, other)

    def __mul__(self, other: "Value") -> "Expr":
        return _made("mul", self, other)

    def __truediv__(self, other: "Value") -> "Expr":
        return _made("div", self, other)

    def __neg__(self) -> "Expr":
        return _made("neg", self)


Value = Expr | float


def _expr(value: Value) -> Expr:
    if isinstance(value, Expr):
        return value
    number = float(value)
    exact = struct.unpack("f", struct.pack("f", number))[0] == number
    assert exact, f"{number} is no fp32 number; make it a scalar, which the host computes"
    return Expr("constant", leaf=number, scalar=True)


def _made(op: str, *args: Value) -> Expr:
    made = tuple(map(_expr, args))
    return Expr(op, made, scalar=all(a.scalar for a in made))


def sqrt(x: Value) -> Expr:
    """The square root, correctly rounded."""
    return _made("sqrt", x)


def absolute(x: Value) -> Expr:
    return _made("abs", x)


def maximum(a: Value, b: Value) -> Expr:
    """The larger; NaN if either is."""
    return _made("maximum", a, b)


def minimum(a: Value, b: Value) -> Expr:
    """The smaller; NaN if either is."""
    return _made("minimum", a, b)


def fma(a: Value, b: Value, c: Value) -> Expr:
    """`a * b + c`, rounded once, which is what torch's vectorised CPU kernels do."""
    return _made("fma", a, b, c)


def sign(x: Expr) -> Expr:
    """-1, 0 or 1; 0 for NaN, as torch.sign. Of a name, since some targets write it twice."""
    assert x.op == "name"
    return _made("sign", x)


def less(a: Value, b: Value) -> Expr:
    """A condition, for `where` alone."""
    return _made("less", a, b)


def where(condition: Expr, a: Value, b: Value) -> Expr:
    return _made("where", condition, a, b)


def lerp(a: Expr, b: Expr, weight: Expr) -> Expr:
    """`a + weight * (b - a)` from the nearer end, as torch.lerp; `weight` is a scalar."""
    near = less(weight, 0.5)
    return fma(where(near, weight, weight - 1.0), b - a, where(near, a, b))


Assignment = tuple[str, Expr]


class Block:
    """What a rule's body reads and assigns: `k.name` is an expression, `k.name = ..` an assignment."""

    def __init__(self, elements: Sequence[str], scalars: Sequence[str]) -> None:
        known = {name: Expr("name", leaf=name) for name in elements}
        known.update((name, Expr("name", leaf=name, scalar=True)) for name in scalars)
        vars(self)["_known"] = known
        vars(self)["_assignments"] = []

    def __getattr__(self, name: str) -> Expr:
        known: dict[str, Expr] = vars(self)["_known"]
        assert name in known, f"the body reads {name}, which is neither loaded nor assigned"
        return known[name]

    def __setattr__(self, name: str, value: Value) -> None:
        made = _expr(value)
        self._known[name] = Expr("name", leaf=name, scalar=made.scalar)  # type: ignore[index]
        vars(self)["_assignments"].append((name, made))


def traced(
    body: Callable[[Block], None], elements: Sequence[str], scalars: Sequence[str]
) -> list[Assignment]:
    """The assignments of `body`, in order."""
    block = Block(elements, scalars)
    body(block)
    assignments: list[Assignment] = vars(block)["_assignments"]
    return assignments


# Printing

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
_CALL = 9
"""How tightly a call or a name binds."""


@dataclass(frozen=True)
class Printer:
    """How one target writes operations; those that are not in `calls` are written infix."""

    calls: Mapping[str, str]
    """Formats by operation, "{0}" the first argument. They are calls or in parentheses."""
    constant: Callable[[float], str] = repr
    special: Callable[["Printer", Expr], str | None] = lambda printer, expr: None
    """Asked first; None leaves it to the rest."""

    def __call__(self, expr: Expr) -> str:
        return self._write(expr)[0]

    def _write(self, expr: Expr) -> tuple[str, int]:
        """The text, and how tightly it binds."""
        if expr.op == "name":
            return str(expr.leaf), _CALL
        if expr.op == "constant":
            return self.constant(float(expr.leaf)), _CALL
        text = self.special(self, expr)
        if text is not None:
            return text, _CALL
        if expr.op in self.calls:
            return self.calls[expr.op].format(*map(self, expr.args)), _CALL
        if expr.op == "neg":
            return f"-{self._within(expr.args[0], 3)}", 3
        infix, level = _INFIX[expr.op]
        left, right = self._within(expr.args[0], level), self._within(expr.args[1], level + 1)
        return f"{left} {infix} {right}", level

    def _within(self, expr: Expr, level: int) -> str:
        text, binds = self._write(expr)
        return text if binds >= level else f"({text})"


def _triton(double: bool) -> Printer:
    precise = {"div": "tl.div_rn({0}, {1})", "sqrt": "tl.sqrt_rn({0})"}
    calls = {
        "sqrt": "tl.sqrt({0})",
        "abs": "tl.abs({0})",
        "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "fma": "tl.fma({0}, {1}, {2})",
        "sign": "(tl.where({0} > 0.0, 1.0, 0.0) - tl.where({0} < 0.0, 1.0, 0.0))",
        "less": "{0} < {1}",
        "where": "tl.where({0}, {1}, {2})",
    }
    return Printer(calls if double else {**calls, **precise})


def _cpp(double: bool) -> Printer:
    suffix = "" if double else "f"
    calls = {
        "sqrt": f"__builtin_sqrt{suffix}({{0}})",
        "abs": f"__builtin_fabs{suffix}({{0}})",
        "maximum": "larger({0}, {1})",
        "minimum": "smaller({0}, {1})",
        "fma": f"__builtin_fma{suffix}({{0}}, {{1}}, {{2}})",
        "sign": "(real({0} > 0) - real({0} < 0))",
        "less": "{0} < {1}",
        "where": "({0} ? {1} : {2})",
    }
    return Printer(calls, constant=lambda value: f"{value!r}{suffix}")


def _conditional(printer: Printer, expr: Expr) -> str | None:
    """Scalars are Python numbers: a choice by one is Python's own. numpy has no fma."""
    if expr.op == "fma":
        a, b, c = expr.args
        return f"({printer(a * b + c)})"
    if expr.op == "where" and expr.args[0].scalar:
        condition, yes, no = map(printer, expr.args)
        return f"({yes} if {condition} else {no})"
    return None


def _torchs(printer: Printer, expr: Expr) -> str | None:
    """torch rounds once where it is given an fma as one call, with the scalar factor as `alpha`."""
    if expr.op != "fma":
        return _conditional(printer, expr)
    a, b, c = expr.args
    if a.scalar or b.scalar:
        factor, value = (a, b) if a.scalar else (b, a)
        return f"torch.add({printer(c)}, {printer(value)}, alpha={printer(factor)})"
    return f"torch.addcmul({printer(c)}, {printer(a)}, {printer(b)})"


_TORCH = {
    "sqrt": "torch.sqrt({0})",
    "abs": "torch.abs({0})",
    "maximum": "torch.maximum({0}, {1})",
    "minimum": "torch.minimum({0}, {1})",
    "sign": "torch.sign({0})",
    "less": "{0} < {1}",
    "where": "torch.where({0}, {1}, {2})",
}
_NUMPY = {
    "sqrt": "np.sqrt({0})",
    "abs": "np.abs({0})",
    "maximum": "np.maximum({0}, {1})",
    "minimum": "np.minimum({0}, {1})",
    "sign": "(1.0 * ({0} > 0.0) - ({0} < 0.0))",
    "less": "{0} < {1}",
    "where": "np.where({0}, {1}, {2})",
}


def printer(target: str, double: bool) -> Printer:
    """Of "triton", "cpp", "torch" or "numpy"; `double` if it computes in float64."""
    if target == "triton":
        return _triton(double)
    if target == "cpp":
        return _cpp(double)
    if target == "torch":
        return Printer(_TORCH, special=_torchs)
    return Printer(_NUMPY, special=_conditional)
