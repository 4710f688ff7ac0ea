"""Capture: dynamo's flat graph of a forward, and AOTAutograd's joint graph of it."""

import builtins
import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._dynamo import functional_export
from torch._dynamo.variables.torch import tracing_state_functions
from torch._functorch._aot_autograd.schemas import OutputType
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from zerograph.compat.effects import Effects, recorded


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
    effects: Effects
    """What the forward read and changed in Python."""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Capture `model(*args, **kwargs)` on fake tensors, whole, with no graph break."""
    with _dynamo_settings(), _not_exporting(), recorded() as effects, _quiet_of_effects():
        module = functional_export.dynamo_graph_capture_for_export(model)(*args, **kwargs)
    flatten, unflatten = module._dynamo_bytecode_flatten, module._dynamo_bytecode_unflatten
    for step in (flatten, unflatten):  # 2.11 looks for builtins among the globals
        step.f_globals = {**vars(builtins), **step.f_globals}
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
    context, mode = module.meta["tracing_context"], module.meta["fake_mode"]
    return Captured(flat, inputs, outputs, rebuilt, context, mode, effects)


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


@contextlib.contextmanager
def _quiet_of_effects() -> Iterator[None]:
    """Without dynamo's warnings of side effects, which are recorded, and of what is an error anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*we found certain side effects")
        warnings.filterwarnings("ignore", message="Dynamo does not know how to trace the builtin")
        yield


@contextlib.contextmanager
def _not_exporting() -> Iterator[None]:
    """Let models take the path that they take in training, not the one for `torch.export`.

    The capture sets a flag that transformers reads: attention masks would be made that eager leaves
    out, with other kernels and other bits. Dynamo of 2.11 and 2.12 answers by itself.
    """
    nothing, answers = contextlib.nullcontext, tracing_state_functions()
    with (
        mock.patch.object(functional_export, "_compiling_state_context", nothing),
        mock.patch.dict(answers, {torch.compiler.is_exporting: False}),
    ):
        yield


@contextlib.contextmanager
def _dynamo_settings() -> Iterator[None]:
    """Static capture, with what models log and warn of left out of the graph."""
    config = torch._dynamo.config
    loggers = {
        method
        for name in dir(logging.Logger)
        if not name.startswith("_") and callable(method := getattr(logging.Logger, name))
    }
    with (
        quiet(),
        _quiet("torch._dynamo.metrics_context"),  # 2.11 cannot log the setting that follows
        config.patch(  # type: ignore[attr-defined]
            assume_static_by_default=True,
            automatic_dynamic_shapes=False,
            specialize_int=True,
            specialize_float=True,
            allow_rnn=True,
            ignore_logging_functions={*config.ignore_logging_functions, *loggers, warnings.warn},
        ),
    ):
        yield


def quiet() -> contextlib.AbstractContextManager[None]:
    """Without what fake tensors log of an operator that raises, which is raised as well."""
    return _quiet("torch._subclasses.fake_tensor")


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
