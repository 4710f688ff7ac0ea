"""TrainGraph: one training step as one torch.fx graph, and the tables that give it meaning.

The graph has three regions, in this order: forward, backward, step. Its placeholders have roles:

    param      a whole parameter (before `shard`)          name = FQN
    buffer     a buffer of the module                      name = FQN
    constant   a tensor that the module's code captured    name = c0, c1, ...
    input      a tensor argument of the forward            name = its path in the call
    arena      memory for what is kept for the backward    name = a0, a1, ... (a row a value)
    size       a size that varies from call to call        name = s0, s1, ... (sizes.py)
    tangent    the gradient of an output that arrived      name = the output's path
    full       a bucket's full storage (stages 0 to 2)     name = bucket
    shard      this rank's slice of a bucket               name = bucket
    kept       gradients kept since the last step          name = bucket
    master     the fp32 slice that the optimizer updates   name = bucket
    state      one optimizer state slice                   name = bucket/state
    hyper      the optimizer's scalars, one row a group    name = hyper
    used       flags: which parameters had a gradient      name = used
    scale      what the loss is multiplied by (fp16)       name = scale
    weight     sum of the losses' weights since the step   name = weight

and its output is a dict: "forward" (what the forward returns, then what it stores into buffers),
"saved" (what the forward keeps for the backward, whichever gradients arrive), "backward" (gradients
of parameters and inputs; after `reduce`, the kept gradients, or of those that the backward applies the
sums of squares), "step" (the gradient norm).

What a single node says of itself is in nodes.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from zerograph import compat, ops
from zerograph.layout import Layout
from zerograph.mesh import Mesh
from zerograph.nodes import REGIONS, Region, Role, is_random, region_of, role_of
from zerograph.precision import Precision
from zerograph.sizes import Sizes


@dataclass(frozen=True)
class Result:
    """One entry of the "forward" outputs.

    kind "output": `name` is its path in what the model returns. kind "update": the new value of
    buffer `name`; kind "input_update": the new value of input `name`, which the forward changed.
    """

    kind: str
    name: str
    differentiable: bool = False


@dataclass(frozen=True)
class Gradient:
    """One entry of the "backward" outputs: of a "param" or an "input".

    After `reduce` parameters' are "kept", by bucket; where the backward updates, "squares".
    """

    kind: str
    name: str


@dataclass
class TrainGraph:
    """A joint graph and its tables. Passes change `module.graph` in place and replace the tables."""

    module: fx.GraphModule
    model: str
    layout: Layout
    precision: Precision
    results: tuple[Result, ...]
    gradients: tuple[Gradient, ...]
    fake_mode: FakeTensorMode
    training: bool
    """Whether the graph has a backward region."""
    stage: int = 0
    unused: tuple[str, ...] = ()
    """Trainable parameters that receive no gradient in this graph."""
    notes: dict[str, Any] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    """The symbols of a dynamic graph."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def world(self) -> int:
        """All ranks; `layout.world` are those that hold a bucket together."""
        return self.layout.mesh.world

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    @property
    def reduces_early(self) -> bool:
        """Whether gradients are reduced by every backward, not by the step.

        So it is where ranks keep slices of them, and where a step has one backward.
        """
        return self.stage >= 2 or self.notes.get("accumulation") == 1

    @property
    def resident(self) -> int:
        """Elements of buckets that stay gathered from step to step at stage 3."""
        buckets = self.layout.buckets.values()
        return sum(b.numel for b in buckets if self.stage == 3 and b.persistent)

    @property
    def updates_in_backward(self) -> bool:
        """Whether the backward updates parameters, each bucket once it is reduced."""
        return bool(self.notes.get("updates") == "backward")

    @property
    def syncs_late(self) -> bool:
        """Whether the step brings the copies' gradients together, not every backward (mesh.py).

        So it is where a step has several backwards, each of which reduces among the ranks of one copy.
        """
        return self.mesh.copies != "" and self.notes.get("accumulation") != 1

    @property
    def device(self) -> torch.device:
        """Where the step is planned to run."""
        values = (node.meta["val"] for node in self.placeholders())
        found = {value.device for value in values if isinstance(value, torch.Tensor)}
        return next((each for each in found if each.type != "cpu"), torch.device("cpu"))

    def copy(self) -> "TrainGraph":
        """An independent graph with the same tables."""
        graph = fx.Graph()
        output = graph.graph_copy(self.graph, {}, return_output_node=True)
        assert isinstance(output, tuple)
        graph.output(output[0])
        return replace(self, module=fx.GraphModule(self.module, graph), notes=dict(self.notes))

    # Reading

    def nodes(self, region: Region | None = None) -> list[fx.Node]:
        """Call nodes in order, of one region or of all."""
        calls = (n for n in self.graph.nodes if n.op not in ("placeholder", "output"))
        return [n for n in calls if region is None or region_of(n) == region]

    def placeholders(self, kind: str | None = None) -> list[fx.Node]:
        found = self.graph.find_nodes(op="placeholder")
        return [n for n in found if kind is None or role_of(n).kind == kind]

    def placeholder(self, kind: str, name: str) -> fx.Node:
        return next(n for n in self.placeholders(kind) if role_of(n).name == name)

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    def outputs(self, section: str) -> tuple[fx.Node | None, ...]:
        sections = cast(dict[str, Sequence[fx.Node | None]], self.output.args[0])
        return tuple(sections[section])

    # Changing

    def set_outputs(self, **sections: Sequence[fx.Node | None]) -> None:
        current = dict(cast(dict[str, Any], self.output.args[0]))
        self.output.args = ({**current, **{k: tuple(v) for k, v in sections.items()}},)

    def save(self, node: fx.Node) -> None:
        """Have the forward keep one more value for the backward."""
        self.set_outputs(saved=[*self.outputs("saved"), node])

    def add_placeholder(self, kind: str, name: str, value: Any) -> fx.Node:
        """A new input of the graph, after those that are there."""
        last = self.placeholders()
        anchor = last[-1] if last else None
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_after(anchor) if anchor else self.graph.inserting_before(first):
            node = self.graph.placeholder(_identifier(f"{kind}_{name}"))
        node.meta.update(role=Role(kind, name), val=value)
        return node

    def fake(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A fake flat tensor, for a placeholder's value."""
        with self.fake_mode:
            return torch.empty(numel, dtype=dtype, device=device)

    @contextmanager
    def inserting(self, before: fx.Node, region: Region, module: str = "") -> Iterator["Inserter"]:
        """Insert zero.* (or aten) calls before `before`; each gets its value, region and module."""
        with self.graph.inserting_before(before):
            yield Inserter(self, region, module)

    def first(self, region: Region) -> fx.Node:
        """The node before which something at the start of `region` is inserted."""
        later = REGIONS[REGIONS.index(region) :]
        return next((n for n in self.nodes() if region_of(n) in later), self.output)

    def end(self, region: Region) -> fx.Node:
        """The node before which something at the end of `region` is inserted."""
        later = REGIONS[REGIONS.index(region) + 1 :]
        return next((n for n in self.nodes() if region_of(n) in later), self.output)


@dataclass(frozen=True)
class Inserter:
    """Calls operators into a graph at a fixed place."""

    graph: TrainGraph
    region: Region
    module: str

    def __call__(self, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.graph.fake_mode:
            node.meta["val"] = target(*values[0], **values[1])
        node.meta.update(region=self.region, module=self.module)
        return node

    def size(self, value: int | torch.SymInt) -> fx.Node | int:
        """A size of a value of the graph, as an argument: a number, or what computes it."""
        if isinstance(value, int):
            return value
        inputs = {
            s.symbol: self.graph.placeholder("size", s.name) for s in self.graph.sizes.symbols
        }
        made = compat.insert_expression(self.graph.graph, compat.exact(value), inputs)
        for node in _sources(made, set(inputs.values())):
            args = fx.map_arg(node.args, lambda n: n.meta["val"])
            value = cast(Callable[..., Any], node.target)(*args)
            node.meta.update(val=value, region=self.region, module=self.module)
        return made


def _sources(made: fx.Node | int, inputs: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that compute `made` from `inputs`, in order."""
    if isinstance(made, fx.Node) and made not in inputs:
        for source in made.all_input_nodes:
            yield from _sources(source, inputs)
        yield made


def eliminate_dead_code(graph: TrainGraph) -> None:
    """Drop nodes without effect that nobody uses; placeholders stay."""
    graph.graph.eliminate_dead_code(is_impure_node=_has_effect)


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    target: Any = node.target
    if ops.is_zero(target):
        return target in ops.EFFECTS
    if not isinstance(target, OpOverload):
        return False
    asserts = target.overloadpacket is torch.ops.aten._assert_async
    return is_random(node) or target._schema.is_mutable or asserts


def _identifier(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text)
