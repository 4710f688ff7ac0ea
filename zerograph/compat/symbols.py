"""Sizes that vary: the symbols of a capture, and arithmetic on them."""

from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch._dynamo.source import TensorProperty, TensorPropertySource
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, free_unbacked_symbols
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

from zerograph.compat.capture import Captured

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Scalars of a capture that follow from sizes."""


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let capture give a dim of a fake input a symbol; the forward may still settle its size."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def sizes_of(
    captured: Captured, tensors: Sequence[torch.Tensor]
) -> dict[Any, tuple[int, str, int]]:
    """Where each symbol of a capture comes from: (index into `tensors`, "size" or "stride", dim)."""
    contexts = captured.tracing_context.tensor_to_context
    bases: dict[Any, int] = {}
    for index, tensor in enumerate(tensors):
        if (context := contexts.get(tensor)) is not None:
            bases.setdefault(context.tensor_source, index)
    kinds = {TensorProperty.SIZE: "size", TensorProperty.STRIDE: "stride"}
    found: dict[Any, tuple[int, str, int]] = {}
    for symbol, sources in captured.fake_mode.shape_env.var_to_sources.items():  # type: ignore[union-attr]
        for source in sources:
            if isinstance(source, TensorPropertySource) and source.base in bases:
                place = (bases[source.base], kinds.get(source.prop), source.idx)
                if place[1] is not None and place[2] is not None:
                    found.setdefault(symbol, place)  # type: ignore[arg-type]
    return found


def guards_of(captured: Captured) -> list[Any]:
    """What capture assumed about its symbols, as sympy expressions; each once."""
    return list(dict.fromkeys(guard.expr for guard in captured.fake_mode.shape_env.guards))  # type: ignore[union-attr]


def new_size(captured: Captured, symbol: Any, hint: int) -> torch.SymInt:
    """The SymInt of a symbol of the capture."""
    made: Any = captured.fake_mode.shape_env.create_symintnode(symbol, hint=hint)  # type: ignore[union-attr]
    return made  # type: ignore[no-any-return]


def symbol_of(value: torch.SymInt) -> Any:
    """The symbol that an input SymInt was made for, whatever is known of it by now."""
    return value.node._expr


def exact(value: Any) -> Any:
    """A size as it is: an int, or the expression of a SymInt. Comparing these adds no guard."""
    return value.node.expr if isinstance(value, SYMBOLIC) else value


def hint(value: Any) -> int:
    """A size at the call that was captured."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else int(value)


def depends_on_data(value: Any) -> bool:
    """Whether a number, or a size of a tensor, is known only once the values of a tensor are."""
    return isinstance(value, (torch.Tensor, *SYMBOLIC)) and bool(free_unbacked_symbols(value))


def function_of(
    symbols: Sequence[Any], expressions: Sequence[Any]
) -> Callable[..., tuple[Any, ...]]:
    """A Python function from the symbols' values, in order, to those of the expressions."""
    printer = PythonPrinter()
    values = "".join(f"{printer.doprint(e)}, " for e in expressions)
    code = f"lambda {', '.join(map(str, symbols))}: ({values})"
    made: Callable[..., tuple[Any, ...]] = eval(code, dict(SYMPY_INTERP))
    return made


def show(expression: Any, names: dict[Any, str]) -> str:
    """An expression as text, with its symbols renamed."""
    if not isinstance(expression, sympy.Basic):
        return str(expression)
    renamed = expression.xreplace({s: sympy.Symbol(n, integer=True) for s, n in names.items()})
    if isinstance(renamed, sympy.core.relational.Relational):
        return f"{renamed.lhs} {renamed.rel_op} {renamed.rhs}"
    return str(renamed)


def insert_expression(graph: fx.Graph, expression: Any, nodes: dict[Any, fx.Node]) -> fx.Node | int:
    """Nodes that compute an expression over symbols' nodes, at the graph's insertion point."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in nodes.items()}
    made = sympy_interp(PythonReferenceAnalysis, proxies, expression)
    return made.node if isinstance(made, fx.Proxy) else int(made)
