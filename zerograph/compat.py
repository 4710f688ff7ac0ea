"""Every private torch interface that zerograph uses, in one place.

Seen working on torch 2.11, 2.12 and 2.13. What a later torch renames is mended here and nowhere
else:

    torch._dynamo.functional_export: dynamo_graph_capture_for_export,  2.11 - 2.13
        _compiling_state_context
    torch._functorch.aot_autograd.aot_export_joint_with_descriptors    2.11 - 2.13
    torch._functorch._aot_autograd.descriptors                         2.11 - 2.13
    torch._subclasses.fake_tensor.FakeTensorMode                       2.11 - 2.13
    torch._dynamo.config (names below)                                 2.11 - 2.13
    torch.distributed.distributed_c10d._get_default_store              2.11 - 2.13
    ctx.maybe_clear_saved_tensors of autograd functions                2.11 - 2.13
    torch._dynamo.maybe_mark_dynamic, TracingContext.tensor_to_context 2.13
    ShapeEnv: guards, var_to_sources, create_symintnode; SymInt.node   2.13
    torch.utils._sympy: interp, printers, reference                    2.13
    torch.optim.Optimizer: _opt_called, step._wrapped_by_lr_sched,     2.11 - 2.13
        the hook tables
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import sympy  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import fx, nn
from torch._dynamo import functional_export
from torch._dynamo.exc import TorchDynamoException as DynamoError
from torch._dynamo.exc import Unsupported
from torch._dynamo.source import TensorProperty, TensorPropertySource
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.schemas import OutputType
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

from zerograph.errors import CaptureError

__all__ = [
    "SYMBOLIC",
    "Captured",
    "DynamoError",
    "FakeTensorMode",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "TangentAOTInput",
    "Unsupported",
    "capture",
    "clear_saved",
    "default_store",
    "exact",
    "export_joint",
    "function_of",
    "guards_of",
    "has_step_hooks",
    "hint",
    "insert_expression",
    "mark_dynamic",
    "mark_stepped",
    "mark_tracked",
    "new_fake_mode",
    "new_size",
    "optimizer_hooks",
    "show",
    "sizes_of",
    "symbol_of",
]


def new_fake_mode() -> FakeTensorMode:
    """A mode whose tensors have shapes and no data; shapes are static."""
    return FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)


@dataclass(frozen=True)
class Captured:
    """A model's forward as a flat graph: tensors in, tensors out."""

    module: fx.GraphModule
    inputs: list[Any]
    """What each placeholder was fed: parameters, buffers, arguments, captured constants or SymInts."""
    outputs: list[torch.Tensor]
    """The graph's fake outputs."""
    rebuilt: Any
    """What the user's forward returns, with `outputs` as its tensors."""
    tracing_context: Any
    fake_mode: FakeTensorMode
    """The mode of every value of the graph, and of the joint one."""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Capture `model(*args, **kwargs)` on fake tensors, whole, with no graph break."""
    with _dynamo_settings(), _not_exporting(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = functional_export.dynamo_graph_capture_for_export(model)(*args, **kwargs)
    _heed(said)
    flatten, unflatten = module._dynamo_bytecode_flatten, module._dynamo_bytecode_unflatten
    fed = flatten(*args, *kwargs.values())
    examples = [_example(node) for node in module.graph.find_nodes(op="placeholder")]
    inputs = [e if isinstance(e, torch.SymInt) else i for i, e in zip(fed, examples, strict=True)]
    returned = module.graph.output_node().args[0]
    outputs = [_example(node) for node in returned]
    rebuilt = unflatten(tuple(outputs), (*args, *kwargs.values()))
    graph = fx.Graph()
    graph_output = graph.graph_copy(module.graph, {})
    graph.output(tuple(graph_output))  # type: ignore[arg-type]
    flat = fx.GraphModule(module, graph)
    return Captured(
        flat, inputs, outputs, rebuilt, module.meta["tracing_context"], module.meta["fake_mode"]
    )


def _example(node: Any) -> Any:
    return (
        node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node
    )


def export_joint(captured: Captured) -> fx.GraphModule:
    """The joint graph (forward, backward) of a captured one, in aten ops.

    An output that is a view of an input, or of a tensor that another output is a view of, would
    have its gradient asked for at its base. Such outputs are copied, and the joint is taken again.
    """
    joint, aliased = _export_joint(captured)
    if aliased:
        output = captured.module.graph.output_node()
        returned = list(output.args[0])  # type: ignore[arg-type]
        with captured.module.graph.inserting_before(output):
            for index in aliased:
                source = returned[index]
                clone = captured.module.graph.call_function(torch.clone, (source,))
                clone.meta.update(source.meta)  # type: ignore[union-attr]
                returned[index] = clone
        output.args = (tuple(returned),)
        captured.module.recompile()
        joint, _ = _export_joint(captured)
    return joint


def _export_joint(captured: Captured) -> tuple[fx.GraphModule, list[int]]:
    with contextlib.ExitStack() as stack, _dynamo_settings():
        stack.enter_context(torch._guards.tracing(captured.tracing_context))
        exported = aot_export_joint_with_descriptors(
            stack, captured.module, tuple(captured.inputs), {}
        )
        plain = (
            OutputType.non_alias,
            OutputType.unsafe_view_alias,
            OutputType.custom_function_view,
        )
        infos = exported._aot_state.fw_metadata.output_info
        aliased = [i for i, info in enumerate(infos) if info.output_type not in plain]
        return exported.graph_module, aliased


def _heed(said: list[warnings.WarningMessage]) -> None:
    """Refuse side effects of the forward that would be lost; pass other warnings on."""
    for warning in said:
        text = str(warning.message)
        if "we found certain side effects" not in text:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        elif "._buffers" in text:
            raise CaptureError(
                "the forward assigns a new tensor to a buffer of the module, which a captured forward "
                "would lose; change the buffer in place (`self.count.add_(1)`, `self.mean.copy_(new)`)"
            )


def _not_exporting() -> Any:
    """Let models take the path that they take in training, not the one for `torch.export`.

    The capture sets a flag that transformers reads: attention masks would be made that eager leaves
    out, with other kernels and other bits.
    """
    return mock.patch.object(functional_export, "_compiling_state_context", contextlib.nullcontext)


@contextlib.contextmanager
def _dynamo_settings() -> Iterator[None]:
    """Static capture, with the logging inside models left out of the graph."""
    config = torch._dynamo.config
    loggers = {
        method
        for name in dir(logging.Logger)
        if not name.startswith("_") and callable(method := getattr(logging.Logger, name))
    }
    with (
        _quiet("torch._subclasses.fake_tensor"),
        config.patch(  # type: ignore[attr-defined]
            assume_static_by_default=True,
            automatic_dynamic_shapes=False,
            specialize_int=True,
            specialize_float=True,
            allow_rnn=True,
            ignore_logging_functions=set(config.ignore_logging_functions) | loggers,
        ),
    ):
        yield


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Errors that we raise with an explanation of our own are not logged as well."""
    target = logging.getLogger(logger)
    level = target.level
    target.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        target.setLevel(level)


def user_frames(error: BaseException) -> Sequence[Any]:
    """Stack frames of the user's code at which capture failed, outermost first."""
    return list(getattr(error, "real_stack", None) or [])


def clear_saved(ctx: Any) -> None:
    """Let go of an autograd node's saved tensors inside its backward (unless the graph is kept)."""
    clear: Callable[[], None] | None = getattr(ctx, "maybe_clear_saved_tensors", None)
    if clear is not None:
        clear()


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """What torch's schedulers look at before they warn of a step() before the optimizer's."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def mark_tracked(step: Callable[..., Any]) -> None:
    """Tell torch's schedulers that this replacement of an optimizer's step() is known to them."""
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the user registered a hook on the optimizer's step()."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def optimizer_hooks() -> set[str]:
    """Names of the attributes in which a torch optimizer keeps its hooks."""
    when = ("step_pre", "step_post", "state_dict_pre", "state_dict_post")
    return {
        f"_optimizer_{name}_hooks"
        for name in (*when, "load_state_dict_pre", "load_state_dict_post")
    }


def default_store() -> Any:
    """The key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


# Sizes that vary

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
