"""Capture: a model and example inputs become one joint graph, on fake tensors.

    model(input_ids=..., labels=...)
      | every parameter, buffer and input replaced by a fake one      `substituted`
      | dynamo: one flat graph of the forward                         `compat.capture`
      | AOTAutograd: forward and backward together, in aten           `compat.export_joint`
      v roles, results and gradients by name                          `TrainGraph`

Nothing here touches a real tensor or a rank. Models on the meta device are traced as fake tensors
of a named device, never as meta: on meta the backward of some losses is lost without a word.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn

from zerograph import compat, nodes
from zerograph.boundaries import mark_captured
from zerograph.effects import Reads, reads_of, refuse_lost_writes
from zerograph.errors import CaptureError
from zerograph.explain import explained, refuse_unknown_sizes
from zerograph.fakes import fake_inputs, fake_state, substituted
from zerograph.integrations import transformers
from zerograph.ir import Gradient, Result, TrainGraph
from zerograph.layout import Layout
from zerograph.nodes import Role
from zerograph.origins import require_gradients, write_origins
from zerograph.precision import Precision
from zerograph.sizes import Sizes
from zerograph.symbols import compute_sizes, symbols_of
from zerograph.template import Rebuild, dissect


@dataclass(frozen=True)
class Trace:
    """A captured step: the graph, and how to go between it and the user's call."""

    graph: TrainGraph
    inputs: tuple[int, ...]
    """For each "input" placeholder, in order: index into the tensors of (args, kwargs)."""
    constants: dict[str, torch.Tensor]
    """Tensors that the module's code captured, by the name of their placeholder's role."""
    rebuild: Rebuild
    """Makes the user's return value from `sources`' tensors."""
    sources: tuple[tuple[str, int | str], ...]
    """Where each tensor of the return value comes from: ("result", index), ("input", index into the
    call's tensors) or ("buffer", FQN)."""
    reads: Reads
    """The Python values that the forward read, for which alone the graph is right."""


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    layout: Layout,
    precision: Precision,
    device: torch.device,
    dynamic: Collection[tuple[int, int]] = (),
) -> Trace:
    """Trace one call under the grad and autocast modes in force.

    `dynamic` are the dims whose sizes may vary, as (index of the tensor in the call, dim).

    Raises CaptureError, with the user's own source line, for what cannot be captured whole.
    """
    mode = compat.new_fake_mode()
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        params, buffers = fake_state(model, layout, mode, device)
        tensors, rebuild_call = dissect((args, kwargs))
        fakes = fake_inputs([tensor for _, tensor in tensors], precision, mode, device)
        for index, dim in dynamic:
            compat.mark_dynamic(fakes[index], dim)
        fake_args, fake_kwargs = rebuild_call(fakes)
        call = partial(model, *fake_args, **fake_kwargs)
        autocast = precision.around_forward(device)
        with autocast, substituted(model, {**params, **buffers}), explained(model, call, mode):
            captured = transformers.capture(model, fake_args, fake_kwargs)
            refuse_unknown_sizes(model, captured)
            returned, rebuild = dissect(captured.rebuilt)
            joint = compat.export_joint(captured)
    refuse_lost_writes(model, captured.effects)
    paths = [call_path(path, model, len(args)) for path, _ in tensors]
    sizes = symbols_of(captured, fakes, paths) if dynamic else Sizes()
    names = _Names(
        params={id(t): n for n, t in params.items() if n in layout.params},
        buffers={id(t): n for n, t in buffers.items()},
        inputs={id(t): i for i, t in reversed(list(enumerate(fakes)))},
        sizes={size.symbol: size.name for size in sizes.symbols},
        paths=paths,
    )
    return _trace_of(model, joint, captured, returned, rebuild, names, layout, precision, sizes)


@dataclass
class _Names:
    """What the fake tensors stand for, by identity."""

    params: dict[int, str]
    buffers: dict[int, str]
    inputs: dict[int, int]
    sizes: dict[Any, str]
    paths: list[str]

    def role(self, tensor: Any, constants: dict[str, torch.Tensor]) -> Role:
        if isinstance(tensor, torch.SymInt):
            return Role("size", self.sizes[compat.symbol_of(tensor)])
        key = id(tensor)
        if key in self.params:
            return Role("param", self.params[key])
        if key in self.buffers:
            return Role("buffer", self.buffers[key])
        if key in self.inputs:
            return Role("input", self.paths[self.inputs[key]])
        name = f"c{len(constants)}"
        constants[name] = tensor
        return Role("constant", name)


def _trace_of(
    model: nn.Module,
    joint: fx.GraphModule,
    captured: compat.Captured,
    returned: list[tuple[str, Any]],
    rebuild: Rebuild,
    names: _Names,
    layout: Layout,
    precision: Precision,
    sizes: Sizes,
) -> Trace:
    """Name everything in the joint graph, and set its output in sections."""
    constants: dict[str, torch.Tensor] = {}
    roles = [names.role(tensor, constants) for tensor in captured.inputs]
    index_of = {id(tensor): index for index, tensor in reversed(list(enumerate(captured.outputs)))}
    path_of: dict[int, str] = {}
    sources: list[tuple[str, int | str]] = []
    for path, tensor in returned:
        source = _source(tensor, index_of, names, path)
        sources.append(source)
        if source[0] == "result":
            path_of.setdefault(cast(int, source[1]), path or "output")
    placeholders = joint.graph.find_nodes(op="placeholder")
    differentiable = set()
    for node in placeholders:
        desc = node.meta["desc"]
        if isinstance(desc, compat.TangentAOTInput):
            index = _plain_output(desc.output)
            differentiable.add(index)
            node.meta["role"] = Role("tangent", path_of.get(index, f"output{index}"))
        else:
            node.meta["role"] = roles[desc.idx]
    results, gradients, forward, backward = _sections(joint, roles, path_of, differentiable)
    joint.graph.output_node().args = (
        {"forward": tuple(forward), "saved": (), "backward": tuple(backward), "step": ()},
    )
    graph = TrainGraph(
        module=joint,
        model=type(model).__name__,
        layout=layout,
        precision=precision,
        results=tuple(results),
        gradients=tuple(gradients),
        fake_mode=captured.fake_mode,
        training=bool(differentiable),
        sizes=sizes,
    )
    write_origins(graph)
    mark_captured(graph)
    compute_sizes(graph, captured)
    require_gradients(graph, model)
    position = {path: index for index, path in reversed(list(enumerate(names.paths)))}
    order = tuple(position[nodes.role_of(node).name] for node in graph.placeholders("input"))
    reads = reads_of(model, captured.effects)
    return Trace(graph, order, constants, rebuild, tuple(sources), reads)


def _source(
    tensor: Any, index_of: dict[int, int], names: _Names, path: str
) -> tuple[str, int | str]:
    key = id(tensor)
    if key in index_of:
        return ("result", index_of[key])
    if key in names.inputs:
        return ("input", names.inputs[key])
    if key in names.buffers:
        return ("buffer", names.buffers[key])
    what = f"parameter {names.params[key]}" if key in names.params else "a tensor made outside it"
    raise CaptureError(
        f"output {path or '0'} of the forward is {what} itself; return a copy (`.clone()`), since "
        "zerograph owns the storage of parameters"
    )


def _plain_output(desc: Any) -> int:
    if isinstance(desc, compat.PlainAOTOutput):
        return desc.idx
    raise CaptureError(
        f"the forward changes a tensor that requires grad in place ({desc}); clone it before changing it"
    )


def _sections(
    joint: fx.GraphModule, roles: list[Role], path_of: dict[int, str], differentiable: set[int]
) -> tuple[list[Result], list[Gradient], list[Any], list[Any]]:
    """The joint graph's flat outputs, split into results (with updates) and gradients."""
    output = joint.graph.output_node()
    found: list[tuple[Result, Any]] = []
    gradients: list[Gradient] = []
    backward: list[Any] = []
    for node, desc in zip(cast(Any, output.args[0]), output.meta["desc"], strict=True):
        if isinstance(desc, compat.PlainAOTOutput):
            name = path_of.get(desc.idx, f"output{desc.idx}")
            found.append((Result("output", name, desc.idx in differentiable), node))
        elif isinstance(desc, compat.InputMutationAOTOutput):
            role = roles[desc.mutated_input.idx]  # type: ignore[attr-defined]
            if role.kind == "param":
                raise CaptureError(
                    f"the forward changes parameter {role.name} in place; use a buffer, or change it "
                    "inside `zerograph.gathered`"
                )
            if role.kind == "constant":
                raise CaptureError(
                    "the forward changes a tensor in place that is no buffer of its module; make it one with "
                    "register_buffer(name, tensor)"
                )
            kind = "input_update" if role.kind == "input" else "update"
            found.append((Result(kind, role.name), node))
        elif isinstance(desc, compat.GradAOTOutput):
            role = roles[desc.grad_of.idx]  # type: ignore[attr-defined]
            if node is not None:
                gradients.append(Gradient(role.kind, role.name))
                backward.append(node)
    found.sort(key=lambda pair: pair[0].kind != "output")
    return [r for r, _ in found], gradients, [n for _, n in found], backward


def call_path(path: str, model: nn.Module, positional: int) -> str:
    """A tensor's name in the call: `labels`, `batch.ids`; positional ones by the forward's names."""
    kind, _, rest = path.partition(".")
    if kind == "1":
        return rest
    code = getattr(model.forward, "__code__", None)
    names = code.co_varnames[1 : code.co_argcount] if code else ()
    index, _, inner = rest.partition(".")
    name = names[int(index)] if int(index) < len(names) else f"arg{index}"
    return f"{name}.{inner}" if inner else name
