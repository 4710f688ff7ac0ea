"""The verifier: good graphs pass at every stage, and each seeded fault is caught by name.

A fault is one edit of a good graph. It is registered with the stage of that graph and with what
the message must say; `after` stops the pipeline early, for faults that a later pass would hide.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from tests import tiny
from zerograph import ops, pipeline, verify
from zerograph.config import load_config
from zerograph.errors import AgreementError, VerifyError
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, is_recomputed, region_of, slice_of
from zerograph.optimizer import optimizer_of
from zerograph.planning import default_arriving, passes_for
from zerograph.runtime.agree import first_difference
from zerograph.text import text

aten = torch.ops.aten
WORLD = 8


@dataclass(frozen=True)
class Fault:
    stage: int
    says: str
    edit: Callable[[TrainGraph], None]
    after: str = "schedule"
    model: str = "blocks"
    accumulation: int = 1
    number: int = 0
    """Checkpointed regions."""
    groups: str = ""

    def broken(self) -> tuple[TrainGraph, frozenset[str]]:
        kind = self.stage, self.after, self.model, self.accumulation, self.number, self.groups
        graph, provided = good(*kind)
        self.edit(graph)
        return graph, provided


FAULTS: dict[str, Fault] = {}


def fault(stage: int, says: str, **more: Any) -> Callable[..., Any]:
    def register(edit: Callable[[TrainGraph], None]) -> Callable[[TrainGraph], None]:
        FAULTS[edit.__name__] = Fault(stage, says, edit, **more)
        return edit

    return register


GROUPS: dict[str, dict[str, Any]] = {
    "": {},
    "mics": {"mics_shard_size": 4},
    "hpz": {"zero_hpz_partition_size": 4},
    "whole": {"reduce_scatter": False},
    "whole mics": {"reduce_scatter": False, "mics_shard_size": 4},
}
"""Other keys of `zero_optimization`."""
_good: dict[tuple[int, str, str, int, int, str], tuple[TrainGraph, frozenset[str]]] = {}


def good(
    stage: int,
    after: str = "schedule",
    model: str = "blocks",
    accumulation: int = 1,
    number: int = 0,
    groups: str = "",
) -> tuple[TrainGraph, frozenset[str]]:
    """A copy of the finished graph, or of the one after the pass `after`; and what it provides.

    With several backwards a step (`accumulation`) stages 0 and 1 reduce in the step.
    """
    key = (stage, after, model, accumulation, number, groups)
    if key not in _good:
        graph = tiny.trace_of(model, WORLD).graph.copy()
        batch: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
        }
        if number:
            batch["activation_checkpointing"] = {"number_checkpoints": number}
        given = tiny.config(stage, **batch, **tiny.GIVEN.get(model, {}))
        given["zero_optimization"] |= GROUPS[groups]
        config = load_config(given)
        graph.layout = graph.layout.over(config.mesh(WORLD, graph.mesh.model))
        spec = optimizer_of(config, graph.layout)
        passes = passes_for(config, graph, default_arriving(graph), spec)
        names = [each.name for each in passes]
        passes = passes[: names.index(after) + 1]
        pipeline.run(graph, passes)
        _good[key] = graph, frozenset({"traced"}).union(*(each.provides for each in passes))
    graph, provided = _good[key]
    return graph.copy(), provided


# Finding and editing


def find(graph: TrainGraph, target: Any, bucket: str = "", region: str = "") -> fx.Node:
    """The first call of `target`, in one region and about one bucket (or parameter) if said."""
    for node in graph.nodes():
        about = not bucket or bucket in node.args
        if is_call(node, target) and about and region in ("", region_of(node)):
            return node
    raise AssertionError(f"no {target} {bucket} {region}")


def wait_of(node: fx.Node) -> fx.Node:
    return next(user for user in node.users if is_call(user, ops.wait))


def gathered(graph: TrainGraph, bucket: str, region: str = "forward") -> fx.Node:
    """The wait of the first gather of `bucket` that a region waits for, wherever that starts."""
    gathers = [n for n in graph.nodes() if is_call(n, ops.gather) and bucket in n.args]
    return next(full for full in map(wait_of, gathers) if region_of(full) == region)


def gather_of(graph: TrainGraph, bucket: str, region: str) -> fx.Node:
    """The gather that `gathered` waits for."""
    return next(iter(gathered(graph, bucket, region).all_input_nodes))


def save(graph: TrainGraph, node: fx.Node) -> None:
    graph.set_outputs(saved=[*graph.outputs("saved"), node])


def unsave(graph: TrainGraph, node: fx.Node) -> None:
    assert node in graph.outputs("saved")
    graph.set_outputs(saved=[n for n in graph.outputs("saved") if n is not node])


def drop(graph: TrainGraph, node: fx.Node, instead: fx.Node | None = None) -> None:
    """Take a node out; its users read `instead`."""
    if instead is not None:
        node.replace_all_uses_with(instead)
    graph.graph.erase_node(node)


def repeat(graph: TrainGraph, node: fx.Node, before: fx.Node | None = None) -> fx.Node:
    """The same call again, right behind the node or before another one."""
    with graph.graph.inserting_before(before or node.next):
        return graph.graph.node_copy(node)


def move(node: fx.Node, before: fx.Node, region: str = "") -> None:
    before.prepend(node)
    node.meta = {**node.meta, **({"region": region} if region else {})}


def set_arg(node: fx.Node, index: int, value: Any) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def reading(graph: TrainGraph, target: Any, region: str, name: str) -> tuple[fx.Node, fx.Node]:
    """(call of `target`, the view that it reads) for the parameter `name` in a region."""
    view = find(graph, ops.param, name, region)
    for node in graph.nodes(region):
        if is_call(node, target) and view in node.all_input_nodes:
            return node, view
    raise AssertionError(name)


# Order of nodes


@fault(3, "the forward stands behind a later region")
def node_out_of_its_region(graph: TrainGraph) -> None:
    move(find(graph, aten.mse_loss.default), graph.end("backward"))


@fault(3, r"reads wait_default.* before it exists")
def wait_behind_a_use(graph: TrainGraph) -> None:
    full = gathered(graph, "b1")
    move(full, find(graph, ops.param, "blocks.0.norm.weight", "forward").next)


@fault(0, r"update_default.* reads .* before it exists", accumulation=2)
def update_before_the_reductions_wait(graph: TrainGraph) -> None:
    mean = wait_of(find(graph, ops.all_reduce, "b1"))
    move(find(graph, ops.update, "b1"), mean)


# What the backward may read


@fault(3, r"native_dropout.* repeats a random operation")
def random_op_again_in_the_backward(graph: TrainGraph) -> None:
    again = repeat(graph, find(graph, aten.native_dropout.default), graph.first("backward"))
    again.meta = {**again.meta, "region": "backward"}
    graph.set_outputs(saved=[*graph.outputs("saved"), again.args[0]])


def recomputed(graph: TrainGraph, target: Any) -> fx.Node:
    """A call of `target` that the backward computes again."""
    return next(n for n in graph.nodes("backward") if is_recomputed(n) and is_call(n, target))


@fault(3, "native_dropout.* in the backward does again what must be done once", number=1)
def dropout_drawn_again_without_a_trace(graph: TrainGraph) -> None:
    """Another call of the same random operator, which says nothing of the forward's."""
    node = recomputed(graph, aten.gelu.default)
    with graph.inserting(node.next, "backward") as insert:
        again = insert(aten.native_dropout.default, node, 0.1, True)
    again.meta["recomputed"] = "native_dropout"


@fault(3, "native_dropout.* repeats a random operation of the forward", number=2)
def dropout_drawn_again(graph: TrainGraph) -> None:
    drawn = find(graph, aten.native_dropout.default, region="forward")
    again = repeat(graph, drawn, recomputed(graph, aten.addmm.default).next)
    set_arg(again, 0, recomputed(graph, aten.addmm.default))
    again.meta = {**again.meta, "region": "backward"}


@fault(3, "wait.* in the backward does again what must be done once", number=2)
def gather_done_again(graph: TrainGraph) -> None:
    gathered(graph, "b1", "backward").meta["recomputed"] = "wait"


@fault(2, "reduce_scatter.* in the backward does again what must be done once", number=2)
def reduction_done_again(graph: TrainGraph) -> None:
    find(graph, ops.reduce_scatter, "b1").meta["recomputed"] = "reduce_scatter"


@fault(0, "copy_.* in the backward does again what must be done once", number=1)
def buffer_written_again(graph: TrainGraph) -> None:
    node = recomputed(graph, aten.gelu.default)
    with graph.inserting(node.next, "backward") as insert:
        insert(aten.copy_.default, node, node).meta["recomputed"] = "copy_"


@fault(0, "getitem.* updates a buffer a second time", model="normed", after="checkpoint", number=1)
def buffer_updated_by_a_repetition(graph: TrainGraph) -> None:
    """What the module stores is the statistics of the second time."""
    again = recomputed(graph, aten._native_batch_norm_legit_functional.default)
    with graph.inserting(again.next, "backward") as insert:
        mean = insert(operator.getitem, again, 3)
    mean.meta["recomputed"] = "getitem"
    results = list(graph.outputs("forward"))
    index = next(i for i, r in enumerate(graph.results) if r.name.endswith("running_mean"))
    results[index] = mean
    graph.set_outputs(forward=results)


@fault(0, "reads buffer .*running_mean after its update", model="normed", number=1)
def repetition_reads_an_updated_buffer(graph: TrainGraph) -> None:
    again = recomputed(graph, aten._native_batch_norm_legit_functional.default)
    name = next(r.name for r in graph.results if r.name.endswith("running_mean"))
    set_arg(again, 3, graph.placeholder("buffer", name))


@fault(1, "gelu.* of the forward is said to be computed again", number=1)
def forward_said_to_be_a_repetition(graph: TrainGraph) -> None:
    find(graph, aten.gelu.default, region="forward").meta["recomputed"] = "gelu"


@fault(3, "reads wait_default.*, which the forward does not save")
def gathered_bucket_saved_for_the_backward(graph: TrainGraph) -> None:
    find(graph, ops.param, "blocks.0.linear.weight", "backward").replace_input_with(
        gathered(graph, "b1", "backward"), gathered(graph, "b1", "forward")
    )


@fault(3, "reads bucket b1 after its release")
def gathered_bucket_saved_and_released(graph: TrainGraph) -> None:
    gathered_bucket_saved_for_the_backward(graph)
    save(graph, gathered(graph, "b1"))


@fault(3, "saved output wait.* shares storage with a parameter")
def gathered_bucket_saved_for_nothing(graph: TrainGraph) -> None:
    save(graph, gathered(graph, "b1"))


@fault(3, "saved output gather.* shares storage with a parameter")
def gather_saved_that_the_forward_waits_for(graph: TrainGraph) -> None:
    save(graph, gather_of(graph, "b1", "forward"))


@fault(3, "keeps a parameter's storage alive")
def view_of_a_kept_bucket_saved_instead_of_it(graph: TrainGraph) -> None:
    user, view = reading(graph, aten.t.default, "backward", "head.weight")
    again = find(graph, ops.param, "head.weight", "forward")
    user.replace_input_with(view, again)
    save(graph, again)


@fault(3, "saved output param.* shares storage with a parameter")
def view_of_a_kept_bucket_saved_beside_it(graph: TrainGraph) -> None:
    save(graph, find(graph, ops.param, "head.weight", "forward"))


@fault(3, "mul.* in the backward reads wait.*keeps a parameter's storage alive")
def kept_bucket_read_as_a_value(graph: TrainGraph) -> None:
    with graph.inserting(graph.first("backward"), "backward") as insert:
        insert(aten.mul.Tensor, gathered(graph, "b3"), 2.0)


@fault(3, "mul.* in the backward reads gather.*keeps a parameter's storage alive")
def pending_gather_saved_and_read_as_a_value(graph: TrainGraph) -> None:
    pending = gather_of(graph, "b2", "backward")
    assert pending in graph.outputs("saved")
    with graph.inserting(graph.first("backward"), "backward") as insert:
        insert(aten.mul.Tensor, pending, 2.0)


@fault(3, "blocks.0.linear.weight in the backward is read from a pending gather")
def pending_gather_saved_and_read_as_a_bucket(graph: TrainGraph) -> None:
    full = gathered(graph, "b1", "backward")
    view = find(graph, ops.param, "blocks.0.linear.weight", "backward")
    view.replace_input_with(full, gather_of(graph, "b1", "backward"))


@fault(3, "param.* reads wait.*, which the forward does not save")
def kept_bucket_missing_from_the_saved_list(graph: TrainGraph) -> None:
    unsave(graph, gathered(graph, "b3"))


@fault(3, "wait.* reads gather.*, which the forward does not save")
def pending_gather_missing_from_the_saved_list(graph: TrainGraph) -> None:
    unsave(graph, gather_of(graph, "b2", "backward"))


@fault(2, "the forward saves mm.*, which the backward makes")
def value_of_the_backward_saved(graph: TrainGraph) -> None:
    save(graph, find(graph, aten.mm.default, region="backward"))


@fault(1, "keeps a parameter's storage alive")
def view_of_a_parameter_crosses_to_the_backward(graph: TrainGraph) -> None:
    user, view = reading(graph, aten.t.default, "backward", "head.weight")
    user.replace_input_with(view, find(graph, ops.param, "head.weight", "forward"))


@fault(0, "reads t.*keeps a parameter's storage alive", after="normalize")
def transposed_weight_crosses_to_the_backward(graph: TrainGraph) -> None:
    weight = graph.placeholder("param", "head.weight")
    first, second = sorted(user for user in weight.users if is_call(user, aten.t.default))
    second.replace_all_uses_with(first)


@fault(3, "forward output .* shares storage with a parameter")
def output_is_a_view_of_a_gathered_bucket(graph: TrainGraph) -> None:
    loss, _ = graph.outputs("forward")
    graph.set_outputs(forward=[loss, find(graph, ops.param, "head.bias", "forward")])


@fault(0, "saved output .* shares storage with a parameter", after="specialize")
def parameter_in_the_saved_list(graph: TrainGraph) -> None:
    weight = graph.placeholder("param", "head.weight")
    graph.set_outputs(saved=[*graph.outputs("saved"), min(weight.users)])


@fault(2, "gelu_backward.* reads addmm.*, which the forward does not save")
def value_missing_from_the_saved_list(graph: TrainGraph) -> None:
    needed = find(graph, aten.gelu_backward.default).args[1]
    graph.set_outputs(saved=[n for n in graph.outputs("saved") if n is not needed])


@fault(2, "reads .*, which the forward does not save")
def input_missing_from_the_saved_list(graph: TrainGraph) -> None:
    target = graph.placeholder("input", "target")
    graph.set_outputs(saved=[n for n in graph.outputs("saved") if n is not target])


@fault(0, "reads buffer norm.running_mean after its update", model="batch_norm", after="normalize")
def backward_reads_an_updated_buffer(graph: TrainGraph) -> None:
    buffer = graph.placeholder("buffer", "norm.running_mean")
    set_arg(find(graph, aten.native_batch_norm_backward.default), 3, buffer)


# Parameters and their buckets


@fault(0, "head.weight is still a whole parameter")
def parameter_left_whole(graph: TrainGraph) -> None:
    weight = find(graph, ops.param, "head.weight", "forward").meta["val"]
    graph.add_placeholder("param", "head.weight", weight)


@fault(3, "head.bias is read from b1, but lies in b3")
def parameter_read_from_another_bucket(graph: TrainGraph) -> None:
    view = find(graph, ops.param, "head.bias", "forward")
    view.replace_input_with(gathered(graph, "b3"), gathered(graph, "b1"))


@fault(1, "head.bias is read from another place than its own in b3")
def parameter_read_from_a_wrong_offset(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.param, "head.bias", "forward"), 2, 0)


@fault(1, "blocks.0.linear.weight is read from another place than its own in b1")
def parameter_read_transposed(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.param, "blocks.0.linear.weight", "forward"), 4, [1, 8])


@fault(3, "blocks.1.norm.weight in the forward is read from a shard")
def dropped_gather(graph: TrainGraph) -> None:
    gather = find(graph, ops.gather, "b2", "forward")
    full = wait_of(gather)
    drop(graph, find(graph, ops.gather_ahead, "b2"))
    drop(graph, next(u for u in full.users if is_call(u, ops.release)))
    drop(graph, full, graph.placeholder("shard", "b2"))
    drop(graph, gather)


@fault(3, "blocks.1.norm.weight in the forward is read from a pending gather")
def dropped_wait(graph: TrainGraph) -> None:
    gather = find(graph, ops.gather, "b2", "forward")
    drop(graph, wait_of(gather), gather)


# Collectives


@fault(3, "mul.* uses the gather of b1 in the forward without waiting for it")
def pending_gather_is_used(graph: TrainGraph) -> None:
    pending = find(graph, ops.gather, "b1", "forward")
    with graph.inserting(pending.next, "forward") as insert:
        insert(aten.mul.Tensor, pending, 2.0)


@fault(2, "the output uses the reduce_scatter of b1 in the backward without waiting for it")
def pending_reduction_is_returned(graph: TrainGraph) -> None:
    pending = find(graph, ops.reduce_scatter, "b1")
    graph.set_outputs(backward=[*graph.outputs("backward")[:-1], pending])


@fault(3, "mul.* uses the gather_ahead of b1 in the step without waiting for it")
def gather_for_the_next_step_is_used(graph: TrainGraph) -> None:
    with graph.inserting(graph.output, "step") as insert:
        insert(aten.mul.Tensor, find(graph, ops.gather_ahead, "b1"), 2.0)


@fault(1, "blocks.1.norm.weight in the forward is read before its refresh is waited for")
def refresh_never_waited_for(graph: TrainGraph) -> None:
    wait = find(graph, ops.refreshed, "b2")
    drop(graph, wait, wait.args[0])


@fault(2, "blocks.0.norm.weight in the forward is read before its refresh is waited for")
def no_refresh_waited_for(graph: TrainGraph) -> None:
    """The pass forgot them all, and that it is due."""
    graph.notes.pop("refreshes")
    for node in graph.nodes():
        if is_call(node, ops.refreshed):
            drop(graph, node, node.args[0])


@fault(1, "blocks.0.norm.weight in the forward is read before its refresh is waited for")
def parameter_read_before_its_refresh(graph: TrainGraph) -> None:
    view = find(graph, ops.param, "blocks.0.norm.weight", "forward")
    wait = find(graph, ops.refreshed, "b1")
    view.replace_input_with(wait, graph.placeholder("full", "b1"))
    move(wait, view.next)


@fault(2, "blocks.0.norm.weight in the forward is read before its refresh is waited for")
def refresh_waited_for_in_the_backward(graph: TrainGraph) -> None:
    wait, full = find(graph, ops.refreshed, "b1"), graph.placeholder("full", "b1")
    wait.replace_all_uses_with(full)
    move(wait, graph.first("backward"), "backward")


@fault(2, "the refreshed of b1 in the forward works on .* of bucket b2")
def another_buckets_refresh_waited_for(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.refreshed, "b2"), 1, "b1")


@fault(1, "the refresh of b2 in the step has 1 waits, not 0")
def refresh_waited_for_in_the_step(graph: TrainGraph) -> None:
    with graph.inserting(graph.output, "step") as insert:
        insert(ops.wait, find(graph, ops.refresh, "b2"))


@fault(1, "the gather_partials in the step has 2 waits, not 1")
def waited_for_twice(graph: TrainGraph) -> None:
    repeat(graph, wait_of(find(graph, ops.gather_partials)))


@fault(2, "waits for what was never started")
def wait_without_a_start(graph: TrainGraph) -> None:
    find(graph, ops.accumulate, "b1").prepend(
        graph.graph.create_node("call_function", ops.wait, (find(graph, aten.mm.default),))
    )
    node = find(graph, ops.accumulate, "b1").prev
    node.meta.update(region="backward", val=None)


@fault(2, "the reduce_scatter of b1 in the backward is waited for in the step")
def waited_for_in_another_region(graph: TrainGraph) -> None:
    sums, first = find(graph, ops.accumulate, "b1"), graph.first("step")
    move(wait_of(find(graph, ops.reduce_scatter, "b1")), first, "step")
    move(sums, first, "step")


@fault(2, "the forward saves reduce_scatter.*, which the backward makes")
def pending_reduction_is_saved(graph: TrainGraph) -> None:
    """Only a gather may be kept while it is under way."""
    save(graph, find(graph, ops.reduce_scatter, "b1"))


@fault(3, "saved output gather.* shares storage with a parameter")
def pending_gather_kept_for_the_step(graph: TrainGraph) -> None:
    """One that the forward saves is there in the backward, not in the step."""
    again = repeat(graph, gather_of(graph, "b1", "backward"))
    save(graph, again)
    with graph.inserting(graph.output, "step") as insert:
        insert(ops.release, insert(ops.wait, again), "b1")


@fault(3, "the gather of b2 in the forward is for 4 ranks, not 8")
def gather_for_a_wrong_world(graph: TrainGraph) -> None:
    set_arg(gather_of(graph, "b2", "backward"), 2, 4)


@fault(3, "the gather_ahead of b2 in the step is for 4 ranks, not 8")
def gather_for_the_next_step_for_a_wrong_world(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.gather_ahead, "b2"), 2, 4)


@fault(0, "the all_reduce of b2 in the backward is for 16 ranks, not 8")
def reduction_in_the_backward_for_a_wrong_world(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.all_reduce, "b2", "backward"), 4, 16)


@fault(0, "the all_reduce of b2 in the step is for 16 ranks, not 8", accumulation=2)
def reduction_for_a_wrong_world(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.all_reduce, "b2"), 4, 16)


@fault(3, "the gather of b2 in the forward works on .* of bucket b1")
def gather_of_another_buckets_shard(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.gather, "b2", "forward"), 0, graph.placeholder("shard", "b1"))


@fault(3, "the gather_ahead of b2 in the step works on .* of bucket b1")
def gather_for_the_next_step_of_another_buckets_shard(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.gather_ahead, "b2"), 0, graph.placeholder("shard", "b1"))


@fault(2, "the refresh of b2 in the step works on .* of bucket b1")
def refresh_from_another_buckets_shard(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.refresh, "b2"), 1, graph.placeholder("shard", "b1"))


@fault(1, "the reduce_scatter of b2 in the step works on .* of bucket b1", accumulation=2)
def reduction_of_another_buckets_gradients(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.reduce_scatter, "b2"), 0, find(graph, ops.accumulate, "b1"))


@fault(3, "the update of b2 in the step works on .* of bucket b1")
def update_with_another_buckets_state(graph: TrainGraph) -> None:
    update = find(graph, ops.update, "b2")
    set_arg(update, 2, find(graph, ops.update, "b1").args[2])


# What the step starts for the next forward


@fault(3, "the forward takes 1 gathers of b1 .* and the step starts 0")
def gather_taken_that_was_not_started(graph: TrainGraph) -> None:
    drop(graph, find(graph, ops.gather_ahead, "b1"))


@fault(3, "the forward takes 0 gathers of b1 .* and the step starts 1")
def gather_started_that_is_not_taken(graph: TrainGraph) -> None:
    set_arg(gather_of(graph, "b1", "forward"), 3, False)


@fault(3, "the forward takes 2 gathers of b2 .* and the step starts 1")
def gather_taken_twice(graph: TrainGraph) -> None:
    pending = gather_of(graph, "b2", "backward")
    pending.args = (*pending.args[:3], True)


@fault(3, "the forward takes 1 gathers of b1 .* and the step starts 2")
def gather_started_twice(graph: TrainGraph) -> None:
    repeat(graph, find(graph, ops.gather_ahead, "b1"))


@fault(3, "the step starts b0, b2, b1, which the forward takes as b0, b1, b2")
def gathers_started_in_another_order(graph: TrainGraph) -> None:
    move(find(graph, ops.gather_ahead, "b1"), find(graph, ops.gather_ahead, "b2").next)


@fault(3, "the gather_ahead of b2 in the step stands before the update of its bucket")
def gather_started_before_the_update(graph: TrainGraph) -> None:
    move(find(graph, ops.gather_ahead, "b2"), find(graph, ops.update, "b2"))


@fault(3, "the gather_ahead of b0 in the backward is for the next step")
def gather_started_by_the_backward(graph: TrainGraph) -> None:
    move(find(graph, ops.gather_ahead, "b0"), graph.first("step"), "backward")


@fault(3, "the gather of b2 in the backward is taken from the step before")
def gather_taken_by_the_backward(graph: TrainGraph) -> None:
    full, pending = gathered(graph, "b2", "backward"), gather_of(graph, "b2", "backward")
    unsave(graph, pending)
    move(pending, full, "backward")
    pending.args = (*pending.args[:3], True)


# Releases


@fault(3, "reads bucket b1 after its release")
def early_release(graph: TrainGraph) -> None:
    full = gathered(graph, "b1")
    move(find(graph, ops.release, "b1", "forward"), full.next)


@fault(3, "reads bucket b2 after its release")
def release_before_the_last_use_of_a_view_of_a_view(graph: TrainGraph) -> None:
    user, _ = reading(graph, aten.t.default, "forward", "blocks.1.linear.weight")
    move(find(graph, ops.release, "b2", "forward"), user.next)


@fault(3, "the gather of b0 in the forward has 0 releases, not one")
def missing_release(graph: TrainGraph) -> None:
    drop(graph, find(graph, ops.release, "b0"))


@fault(3, "the gather of b2 in the forward has 2 releases, not one")
def double_release(graph: TrainGraph) -> None:
    repeat(graph, find(graph, ops.release, "b2", "backward"))


@fault(3, "the gather of b2 in the forward is released in the step, and not kept for it")
def release_in_another_region(graph: TrainGraph) -> None:
    move(find(graph, ops.release, "b2", "backward"), graph.first("step"), "step")


@fault(3, "the gather of b3 in the forward is released in the step, and not kept for it")
def kept_bucket_released_in_the_step(graph: TrainGraph) -> None:
    """What the forward saves is there in the backward, not in the step."""
    move(find(graph, ops.release, "b3"), graph.first("step"), "step")


@fault(3, "reads bucket b3 after its release")
def kept_bucket_released_in_the_forward(graph: TrainGraph) -> None:
    move(find(graph, ops.release, "b3"), graph.first("backward"), "forward")


@fault(3, "the gather of b3 in the forward has 0 releases, not one")
def kept_bucket_never_released(graph: TrainGraph) -> None:
    drop(graph, find(graph, ops.release, "b3"))


@fault(3, "release.* reads wait.*, which the forward does not save")
def bucket_kept_from_the_forward_for_the_backward(graph: TrainGraph) -> None:
    move(find(graph, ops.release, "b1", "forward"), graph.first("backward"), "backward")


@fault(3, "the gather of b1 in the forward has 0 releases, not one")
def gathered_twice_and_released_once(graph: TrainGraph) -> None:
    again = repeat(graph, find(graph, ops.gather, "b1", "forward"))
    with graph.inserting(again.next, "forward") as insert:
        insert(ops.wait, again)


@fault(3, "step output .* shares storage with a parameter")
def step_output_is_a_view_of_a_gathered_bucket(graph: TrainGraph) -> None:
    graph.set_outputs(step=[find(graph, ops.param, "head.bias", "forward")])


@fault(3, "640 gathered elements are alive at once, more than the bound of 600")
def bound_exceeded(graph: TrainGraph) -> None:
    graph.notes["max_live"] = 600


@fault(3, "768 gathered elements are alive at once, more than the bound of 700")
def bound_exceeded_by_what_the_step_starts(graph: TrainGraph) -> None:
    """One gather more is under way when the forward begins."""
    graph.notes["max_live"] = 700
    pending = gather_of(graph, "b3", "forward")
    pending.args = (*pending.args[:3], True)
    with graph.inserting(graph.output, "step") as insert:
        insert(ops.gather_ahead, *pending.args[:3])


# Gradients


@fault(3, "the buffer of b1, has 2 users, not one")
def reduced_twice(graph: TrainGraph) -> None:
    again = repeat(graph, find(graph, ops.reduce_scatter, "b1"))
    with graph.inserting(again.next, "backward") as insert:
        insert(ops.wait, again)


@fault(0, "bucket b1 is reduced 2 times in the step", accumulation=2)
def reduced_twice_in_the_step(graph: TrainGraph) -> None:
    again = repeat(graph, find(graph, ops.all_reduce, "b1"))
    with graph.inserting(again.next, "step") as insert:
        insert(ops.wait, again)


@fault(3, "the buffer of b1 goes to accumulate.* unreduced")
def missing_reduction(graph: TrainGraph) -> None:
    reduction = find(graph, ops.reduce_scatter, "b1")
    drop(graph, wait_of(reduction), reduction.args[0])
    drop(graph, reduction)


@fault(1, "bucket b1 is reduced 0 times in the step", accumulation=2)
def missing_reduction_in_the_step(graph: TrainGraph) -> None:
    reduction = find(graph, ops.reduce_scatter, "b1")
    drop(graph, wait_of(reduction), reduction.args[0])
    drop(graph, reduction)


@fault(0, "the buffer of b1 goes to accumulate.* unreduced")
def missing_reduction_where_ranks_keep_all(graph: TrainGraph) -> None:
    reduction = find(graph, ops.all_reduce, "b1", "backward")
    drop(graph, wait_of(reduction), reduction.args[0])
    drop(graph, reduction)


@fault(1, "bucket b1 is reduced 1 times in the step")
def reduced_again_in_the_step(graph: TrainGraph) -> None:
    factors = find(graph, ops.reduce_scatter, "b1", "backward").args[1:]
    with graph.inserting(graph.first("step"), "step") as insert:
        mean = find(graph, ops.accumulate, "b1")
        insert(ops.wait, insert(ops.reduce_scatter, mean, *factors))


@fault(2, "the sum of all of b1 goes to accumulate.*, not a slice of it", groups="whole")
def all_of_a_sum_is_kept(graph: TrainGraph) -> None:
    own = slice_of(find(graph, ops.all_reduce, "b1"))
    assert own is not None
    drop(graph, own, own.args[0])


@fault(
    1,
    "the update of b1 in the step takes wait.*, which is not the mean",
    accumulation=2,
    groups="whole",
)
def update_with_all_of_a_sum(graph: TrainGraph) -> None:
    update = find(graph, ops.update, "b1")
    for user in list(update.args[1].users):
        user.replace_input_with(update.args[1], update.args[1].args[0])


@fault(
    2,
    "the reduce_scatter of b1 in the backward averages otherwise than the all_reduce of b3",
    groups="whole",
)
def one_bucket_scattered(graph: TrainGraph) -> None:
    summed = find(graph, ops.all_reduce, "b1")
    own = slice_of(summed)
    assert own is not None
    drop(graph, own, own.args[0])
    with graph.inserting(summed, "backward") as insert:
        drop(graph, summed, insert(ops.reduce_scatter, *summed.args))


@fault(
    3,
    "the all_reduce of b1 in the backward is over dp_replicate, not dp_shard",
    groups="whole mics",
)
def sum_of_a_bucket_over_the_copies(graph: TrainGraph) -> None:
    summed = find(graph, ops.all_reduce, "b1")
    summed.kwargs = {"axis": "dp_replicate"}
    set_arg(summed, 4, 2)


@fault(
    3, "the partition of b1 in the backward is over all ranks, not dp_shard", groups="whole mics"
)
def slice_over_all_ranks(graph: TrainGraph) -> None:
    own = slice_of(find(graph, ops.all_reduce, "b1"))
    assert own is not None
    own.kwargs = {}


@fault(2, "the partition of b1 in the backward works on .* of bucket b2", groups="whole")
def slice_of_another_buckets_sum(graph: TrainGraph) -> None:
    one, other = (slice_of(find(graph, ops.all_reduce, name)) for name in ("b1", "b2"))
    assert one is not None and other is not None
    one.replace_input_with(one.args[0], other.args[0])


@fault(2, "frozen bucket b0 has a gradient buffer")
def frozen_bucket_reduced(graph: TrainGraph) -> None:
    storage = graph.placeholder("full", "b0")
    with graph.inserting(graph.end("backward"), "backward") as insert:
        buffer = insert(ops.grad_buffer, storage, "b0", 128, torch.float32)
        insert(ops.wait, insert(ops.reduce_scatter, buffer, "b0", 1.0, 1 / WORLD, WORLD))


@fault(2, "bucket b1 has 0 gradient buffers, not one")
def trained_bucket_without_a_buffer(graph: TrainGraph) -> None:
    buffer = find(graph, ops.grad_buffer, "b1")
    drop(graph, buffer, find(graph, aten.mm.default, region="backward"))


@fault(2, "the gradient of head.bias is put to a wrong place of b3")
def put_to_a_wrong_offset(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.put, "head.bias"), 3, 0)


@fault(2, "the gradient of head.bias is put to a wrong place of b1")
def put_to_another_bucket(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "head.bias")
    last = find(graph, ops.reduce_scatter, "b1")
    drop(graph, put, put.args[0])
    with graph.inserting(last, "backward") as insert:
        last.replace_input_with(last.args[0], insert(ops.put, last.args[0], *put.args[1:]))


@fault(2, "the gradient of head.bias is reduced 2 times, not 1")
def put_twice(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "head.bias")
    again = repeat(graph, put)
    put.replace_all_uses_with(again)
    set_arg(again, 0, put)


@fault(2, "the gradient of head.bias is reduced 0 times, not 1")
def missing_put(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "head.bias")
    drop(graph, put, put.args[0])


@fault(2, "the buffer of b3, has 2 users, not one")
def put_after_the_reduction_started(graph: TrainGraph) -> None:
    reduction = find(graph, ops.reduce_scatter, "b3")
    put = reduction.args[0]
    reduction.replace_input_with(put, put.args[0])
    move(put, reduction.next)


@fault(2, "put_default.* is written to a buffer that is not its bucket's")
def put_to_no_buffer(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "head.bias")
    buffer = find(graph, ops.grad_buffer, "b3")
    with graph.inserting(put, "backward") as insert:
        insert(ops.put, insert(aten.clone.default, put.args[1]), *put.args[1:])
    drop(graph, put, buffer)


@fault(2, "the gradient of inlet.bias is put to a wrong place of b3")
def frozen_parameter_put(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "head.bias")
    again = repeat(graph, put)
    put.replace_all_uses_with(again)
    again.args = (put, put.args[1], "inlet.bias", *put.args[3:])


@fault(2, "getitem.* cannot write the gradient of blocks.0.norm.bias into its place")
def in_place_by_an_operator_that_cannot(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "blocks.0.norm.bias")
    put.args = (*put.args[:6], True)


@fault(2, "mm.* cannot write the gradient of head.weight into its place")
def gradient_in_place_read_by_another(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "head.weight")
    with graph.inserting(put, "backward") as insert:
        insert(aten.clone.default, put.args[1])


@fault(2, "writes the gradient of head.bias to a buffer that is made later")
def buffer_made_behind_a_gradient_in_place(graph: TrainGraph) -> None:
    put = find(graph, ops.put, "head.bias")
    move(put.args[0], put)


# Accumulation


@fault(1, "the buffer of b1, has 2 users, not one|gradients of b1 are accumulated 2 times")
def accumulated_twice(graph: TrainGraph) -> None:
    first = find(graph, ops.accumulate, "b1")
    again = repeat(graph, first)
    first.replace_all_uses_with(again)
    set_arg(again, 0, first)


@fault(2, "gradients of b1 are accumulated 2 times, not once")
def shard_accumulated_onto_itself(graph: TrainGraph) -> None:
    first = find(graph, ops.accumulate, "b1")
    again = repeat(graph, first)
    first.replace_all_uses_with(again)
    again.args = (graph.placeholder("kept", "b1"), first, "b1", 1.0)


@fault(3, "the gradients of b1 are not accumulated but go to")
def missing_accumulation(graph: TrainGraph) -> None:
    node = find(graph, ops.accumulate, "b1")
    drop(graph, node, node.args[1])


@fault(3, "accumulate.* is kept as the gradients of b3")
def kept_gradients_swapped(graph: TrainGraph) -> None:
    first, second, *rest = graph.outputs("backward")
    graph.set_outputs(backward=[second, first, *rest])


@fault(3, "accumulated with different weights")
def one_bucket_weighs_less(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.accumulate, "b1"), 3, 0.5)


# The step


@fault(2, "bucket b1 is updated 0 times in the step, not once")
def missing_update(graph: TrainGraph) -> None:
    drop(graph, find(graph, ops.update, "b1"))


@fault(3, "bucket b1 is updated 2 times in the step, not once")
def updated_twice(graph: TrainGraph) -> None:
    repeat(graph, find(graph, ops.update, "b1"))


@fault(2, "bucket b1 is refreshed 0 times at stage 2")
def missing_refresh(graph: TrainGraph) -> None:
    drop(graph, find(graph, ops.refresh, "b1"))


@fault(1, "bucket b1 is refreshed 2 times at stage 1")
def refreshed_twice(graph: TrainGraph) -> None:
    repeat(graph, find(graph, ops.refresh, "b1"))


@fault(1, "bucket b1 is refreshed before its update")
def refresh_before_update(graph: TrainGraph) -> None:
    move(find(graph, ops.refresh, "b1"), find(graph, ops.update, "b1"))


@fault(3, "bucket b1 is refreshed 1 times at stage 3")
def refresh_at_stage_3(graph: TrainGraph) -> None:
    shard = graph.placeholder("shard", "b1")
    full = graph.add_placeholder("full", "b1", gathered(graph, "b1").meta["val"])
    with graph.inserting(graph.output, "step") as insert:
        insert(ops.refresh, full, shard, "b1", WORLD)


@fault(3, "norm_partials.* does not cover the gradients that are applied")
def norm_leaves_a_bucket_out(graph: TrainGraph) -> None:
    norm = find(graph, ops.norm_partials)
    set_arg(norm, 0, norm.args[0][:-1])


@fault(2, "norm_partials.* does not cover the gradients that are applied")
def norm_counts_a_bucket_twice(graph: TrainGraph) -> None:
    norm = find(graph, ops.norm_partials)
    set_arg(norm, 0, [*norm.args[0], norm.args[0][0]])


@fault(3, "the update of b1 in the step stands before norm_partials")
def update_before_the_norm(graph: TrainGraph) -> None:
    update = find(graph, ops.update, "b1")
    set_all_updates(graph, None)
    set_arg(find(graph, ops.finish), 2, 0.0)
    move(update, find(graph, ops.norm_partials))


@fault(1, "the update of b2 in the step takes another factor or skip than the update of b")
def update_unclipped(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.update, "b2"), 6, None)


def set_all_updates(graph: TrainGraph, control: Any) -> None:
    for node in graph.nodes("step"):
        if is_call(node, ops.update):
            set_arg(node, 6, control)


@fault(1, "the update of b. in the step does not follow the finish in the step")
def no_update_clipped(graph: TrainGraph) -> None:
    set_all_updates(graph, None)


@fault(3, "the update of b. in the step does not follow the finish in the step", model="half")
def updates_by_the_norm(graph: TrainGraph) -> None:
    finish = find(graph, ops.finish)
    set_all_updates(graph, next(user for user in finish.users if user.args[1] == 0))


@fault(2, "the finish in the step leaves out the scale", model="half")
def clipping_by_the_scaled_norm(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.finish), 1, None)


@fault(0, "the update of b. in the step is not skipped when the norm is not finite", model="half")
def update_that_overflows(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.finish), 3, False)


@fault(3, "the step has 2 finishes, not one")
def finished_twice(graph: TrainGraph) -> None:
    finish = find(graph, ops.finish)
    with graph.graph.inserting_after(finish):
        again = graph.graph.node_copy(finish)
    again.meta.update(finish.meta)


@fault(
    1, "mul.* uses the gradient of loss unscaled|uses the gradient of loss unscaled", model="half"
)
def loss_unscaled(graph: TrainGraph) -> None:
    tangent = graph.placeholder("tangent", "loss")
    scaled = next(user for user in tangent.users if is_call(user, aten.mul.Tensor))
    drop(graph, scaled, tangent)


@fault(1, "the gradient of input x is not scaled back", model="half")
def input_gradient_left_scaled(graph: TrainGraph) -> None:
    outputs = [n for n in graph.outputs("backward") if n is not None]
    graph.set_outputs(backward=[n.args[0] if is_call(n, aten.div.Tensor) else n for n in outputs])


@fault(
    0,
    "the all_reduce of b2 in the step averages otherwise than the all_reduce of b3",
    accumulation=2,
)
def reduction_that_divides_otherwise(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.all_reduce, "b2"), 3, 1.0)


@fault(
    0,
    "the update of b1 in the step takes accumulate.*, which is not the mean over ranks",
    accumulation=2,
)
def update_with_this_ranks_own_gradients(graph: TrainGraph) -> None:
    mean = wait_of(find(graph, ops.all_reduce, "b1"))
    mean.replace_all_uses_with(find(graph, ops.accumulate, "b1"))


@fault(2, "the update of .* does not know which parameters other ranks used", model="partly")
def flags_of_this_rank_alone(graph: TrainGraph) -> None:
    everyone = wait_of(find(graph, ops.any_rank))
    everyone.replace_all_uses_with(graph.placeholder("used", "used"))


# Norms of whole parameters


@fault(3, "the update of b1 in the step takes no norms of whole parameters", model="lamb")
def update_without_norms(graph: TrainGraph) -> None:
    node = find(graph, ops.update, "b1")
    node.args = node.args[:9]


@fault(
    3, "the update of b1 in the step takes measure.*, which is not summed over ranks", model="lamb"
)
def update_by_this_ranks_own_norms(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.update, "b1"), 9, find(graph, ops.measure, "b1"))


@fault(2, "sum_norms.* of b1 sums other rows than one bucket's", model="lamb")
def norms_of_other_rows(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.sum_norms, "b1"), 2, 5)


@fault(
    2, "the update of b2 in the step takes norms of measure.*, which is not its own", model="lamb"
)
def norms_of_another_buckets_rows(graph: TrainGraph) -> None:
    first = find(graph, ops.sum_norms, "b1").args[2]
    set_arg(find(graph, ops.sum_norms, "b2"), 2, first)


@fault(0, "the update of b2 in the step .* b1", model="lamb")
def norms_of_another_bucket(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.update, "b2"), 9, find(graph, ops.measure, "b1"))


@fault(3, "sum_norms.* sums .*, which is not of all ranks", model="lamb")
def norms_that_are_not_exchanged(graph: TrainGraph) -> None:
    own = find(graph, ops.measure, "b1")
    set_arg(find(graph, ops.sum_norms, "b1"), 0, own)


@fault(1, "bucket b1 is measured 2 times, not 1", model="lamb")
def measured_twice(graph: TrainGraph) -> None:
    repeat(graph, find(graph, ops.measure, "b1"))


@fault(2, "bucket b1 is measured 1 times, not 0")
def measured_for_nothing(graph: TrainGraph) -> None:
    update = find(graph, ops.update, "b1")
    master, grad, state, _, hyper, used, control, *named = update.args
    with graph.inserting(update, "step") as insert:
        insert(ops.measure, master, grad, state, hyper, used, control, *named, 4)


@fault(3, "the update of b1 in the step takes norms, which its rule does not have")
def norms_for_a_rule_without(graph: TrainGraph) -> None:
    update = find(graph, ops.update, "b1")
    update.args = (*update.args, find(graph, ops.norm_partials))


@fault(3, "the measure of b1 in the step takes another control than the update of b1", model="lamb")
def measured_where_the_update_is_skipped(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.measure, "b1"), 5, None)


@fault(1, "the gather_norms in the step is for 4 ranks, not 8", model="lamb")
def norms_of_some_ranks(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.gather_norms), 1, 4)


# Updates in the backward


@fault(2, "param.* reads parameters of b3 behind the update of b3 in the backward", model="early")
def parameter_read_behind_its_update(graph: TrainGraph) -> None:
    view = find(graph, ops.param, "head.weight", "backward")
    repeat(graph, view, graph.end("backward"))


@fault(3, "bucket b1 is updated 1 times in the backward, not once", model="early")
def update_left_in_the_step(graph: TrainGraph) -> None:
    move(find(graph, ops.update, "b1"), graph.output, "step")


@fault(1, "the update of b3 in the backward stands before sum_squares.*", model="early")
def squares_behind_the_update(graph: TrainGraph) -> None:
    update, squares = find(graph, ops.update, "b3"), find(graph, ops.squares, "b3")
    move(squares, update.next)


@fault(2, "sum_squares.* does not cover the gradients that are applied", model="early")
def norm_without_a_buckets_squares(graph: TrainGraph) -> None:
    node = find(graph, ops.sum_squares)
    node.args = (node.args[0][1:],)


@fault(
    3,
    "the gather_ahead of b2 in the backward stands before the update of its bucket",
    model="early",
)
def gather_ahead_in_the_backward_before_its_update(graph: TrainGraph) -> None:
    move(find(graph, ops.gather_ahead, "b2"), find(graph, ops.update, "b2"), "backward")


@fault(1, "bucket b3 is refreshed before its update", model="early")
def refresh_in_the_backward_before_its_update(graph: TrainGraph) -> None:
    move(find(graph, ops.refresh, "b3"), find(graph, ops.update, "b3"))


# Axes


@fault(3, "the gather_partials in the step is over dp_replicate, not dp_shard", groups="mics")
def norm_along_the_copies(graph: TrainGraph) -> None:
    partials = find(graph, ops.gather_partials)
    set_arg(partials, 1, 2)
    partials.kwargs = {"axis": "dp_replicate"}


@fault(3, "the gather of b1 in the forward is over all ranks, not dp_shard", groups="mics")
def gathered_from_the_copies_too(graph: TrainGraph) -> None:
    gather = gather_of(graph, "b1", "forward")
    set_arg(gather, 2, WORLD)
    gather.kwargs = {}


@fault(3, "the gather of b1 .* is over nodes, not node", groups="hpz")
def slice_gathered_across_nodes(graph: TrainGraph) -> None:
    gather = gather_of(graph, "b1", "backward")
    set_arg(gather, 2, 2)
    gather.kwargs = {"axis": "nodes"}


@fault(3, "the partition of b1 in the forward is of shard_b1, which is not gathered", groups="hpz")
def slice_of_a_shard(graph: TrainGraph) -> None:
    set_arg(find(graph, ops.partition, "b1"), 0, graph.placeholder("shard", "b1"))


@fault(3, "the partition of b2 in the forward is not kept for the backward", groups="hpz")
def slice_that_is_not_kept(graph: TrainGraph) -> None:
    unsave(graph, find(graph, ops.partition, "b2"))


@fault(3, "reads the partition of b1 .*, which is for gathers of the backward", groups="hpz")
def slice_read_by_the_forward(graph: TrainGraph) -> None:
    made = find(graph, ops.partition, "b1")
    with graph.inserting(made.next, "forward") as insert:
        insert(aten.mul.Tensor, made, 2.0)


@fault(3, "partition.* reads bucket b1 after its release", groups="hpz")
def slice_behind_the_release(graph: TrainGraph) -> None:
    full = gathered(graph, "b1")
    release = next(user for user in full.users if is_call(user, ops.release))
    move(find(graph, ops.partition, "b1"), release.next)


@fault(3, "the gradients of b1 go to .* without those of the other copies", groups="mics")
def copies_that_drift_apart(graph: TrainGraph) -> None:
    start = find(graph, ops.all_reduce, "b1")
    drop(graph, wait_of(start), start.args[0])
    drop(graph, start)


@fault(
    3, "gradients of b1 go to .* without those of the other copies", groups="mics", model="early"
)
def copies_that_are_updated_apart(graph: TrainGraph) -> None:
    start = find(graph, ops.all_reduce, "b1")
    drop(graph, wait_of(start), start.args[0])
    drop(graph, start)


@fault(3, "bucket b1 is reduced 0 times in the step", groups="mics", accumulation=2)
def copies_that_drift_apart_in_the_step(graph: TrainGraph) -> None:
    start = find(graph, ops.all_reduce, "b1")
    drop(graph, wait_of(start), start.args[0])
    drop(graph, start)


# Copies to the host


def copy_of(graph: TrainGraph, target: Any) -> tuple[fx.Node, fx.Node]:
    """(the first offload or reload, its wait)."""
    start = find(graph, target)
    return start, wait_of(start)


def again(graph: TrainGraph, node: fx.Node) -> None:
    """The same copy once more, and a wait for it."""
    _, wait = node, wait_of(node)
    with graph.inserting(wait.next, region_of(node)) as insert:
        insert(ops.wait, insert(node.target, *node.args))


@fault(0, "the offload of addmm in the forward has 0 waits", model="host")
def offload_without_a_wait(graph: TrainGraph) -> None:
    start, wait = copy_of(graph, ops.offload)
    unsave(graph, wait)
    save(graph, start)
    drop(graph, wait, start)


@fault(0, "the reload of wait_default.* in the backward has 0 waits", model="host")
def reload_without_a_wait(graph: TrainGraph) -> None:
    start, wait = copy_of(graph, ops.reload)
    drop(graph, wait, start)


@fault(0, "the reload of .* in the forward is not in the backward", model="host")
def reload_in_the_forward(graph: TrainGraph) -> None:
    start, _ = copy_of(graph, ops.reload)
    move(start, graph.end("forward"), "forward")
    save(graph, start)


@fault(0, "addmm is copied to the host 2 times, not once", model="host")
def offloaded_twice(graph: TrainGraph) -> None:
    again(graph, find(graph, ops.offload))


@fault(0, "addmm is copied to the host, and saved on the device as well", model="host")
def offloaded_and_saved(graph: TrainGraph) -> None:
    save(graph, find(graph, ops.offload).args[0])


@fault(0, "the copy of addmm on the host is saved 2 times", model="host")
def host_copy_saved_twice(graph: TrainGraph) -> None:
    save(graph, copy_of(graph, ops.offload)[1])


@fault(0, "reads addmm, which went to the host before", model="host")
def offloaded_before_its_last_use(graph: TrainGraph) -> None:
    start, _ = copy_of(graph, ops.offload)
    move(start, start.args[0].next)


@fault(0, "comes back from the host 2 times, not once", model="host")
def reloaded_twice(graph: TrainGraph) -> None:
    again(graph, find(graph, ops.reload))


@fault(0, "native_layer_norm.* reads wait_default.*, which is on the host", model="host")
def host_copy_read_in_the_backward(graph: TrainGraph) -> None:
    start, wait = copy_of(graph, ops.reload)
    sorted(wait.users)[0].replace_input_with(wait, start.args[0])


@fault(0, "brings back .*, which is not on the host", model="host")
def reload_of_what_stayed(graph: TrainGraph) -> None:
    start, _ = copy_of(graph, ops.reload)
    kept = next(n for n in graph.outputs("saved") if not is_call(n, ops.wait))
    set_arg(start, 0, kept)


# What model-parallel ranks share


def source(node: fx.Node) -> fx.Node:
    return node.args[0]


def shared(graph: TrainGraph) -> tuple[fx.Node, fx.Node, fx.Node]:
    """(a share, its gather, the view of what is gathered)."""
    share = find(graph, ops.partition_activation)
    gather = next(user for user in share.users if is_call(user, ops.gather_activation))
    return share, gather, next(iter(wait_of(gather).users))


@fault(0, "is shared 2 times, not once", model="shared")
def shared_twice(graph: TrainGraph) -> None:
    repeat(graph, shared(graph)[0])


@fault(0, "is shared, and saved whole as well", model="shared")
def shared_and_saved(graph: TrainGraph) -> None:
    save(graph, shared(graph)[0].args[0])


@fault(0, "the share of .* is saved 2 times, not once", model="shared")
def share_saved_twice(graph: TrainGraph) -> None:
    save(graph, shared(graph)[0])


@fault(0, "the partition_activation of .* is for 4 ranks over mp, not 2", model="shared")
def shared_among_others(graph: TrainGraph) -> None:
    set_arg(shared(graph)[0], 1, 4)


@fault(0, "the gather_activation of .* is for 2 ranks over dp, not 2 over mp", model="shared")
def gathered_along_another_axis(graph: TrainGraph) -> None:
    shared(graph)[1].kwargs = {}


@fault(0, "mm.* is shared, and differs between model-parallel ranks", model="shared")
def a_part_is_shared(graph: TrainGraph) -> None:
    share = sorted(n for n in graph.nodes() if is_call(n, ops.partition_activation))[-1]
    products = [n for n in graph.nodes("forward") if is_call(n, aten.mm.default) and n < share]
    set_arg(share, 0, products[-1])


@fault(0, "reads add.*, of which a share alone is left", model="shared")
def shared_before_its_last_use(graph: TrainGraph) -> None:
    share, *_ = shared(graph)
    move(share, share.args[0].next)


@fault(0, "the gather_activation of .* is of .*, which is no share", model="shared")
def gathered_whole(graph: TrainGraph) -> None:
    kept = [n for n in graph.outputs("saved") if not is_call(n, ops.partition_activation)]
    set_arg(shared(graph)[1], 0, kept[-1])


@fault(0, "is read 1 times, 0 of them by a wait", model="shared")
def activation_read_while_it_is_gathered(graph: TrainGraph) -> None:
    _, gather, _ = shared(graph)
    drop(graph, wait_of(gather), gather)


@fault(0, "the share of .* is gathered 2 times, not once", model="shared")
def activation_gathered_twice(graph: TrainGraph) -> None:
    _, gather, _ = shared(graph)
    again = repeat(graph, gather)
    with graph.inserting(again.next, "backward") as insert:
        insert(ops.wait, again)


@fault(0, "native_layer_norm.* reads the share of add", model="shared")
def share_read_as_if_whole(graph: TrainGraph) -> None:
    share, _, view = shared(graph)
    sorted(view.users)[0].replace_input_with(view, share)


@fault(0, "as_strided.* reads add.* in another form than its own", model="shared")
def shared_value_in_another_form(graph: TrainGraph) -> None:
    _, gather, view = shared(graph)
    with graph.inserting(view, "backward") as insert:
        size, stride = view.args[1:]
        drop(graph, view, insert(aten.as_strided.default, wait_of(gather), size[::-1], stride))


def counted(graph: TrainGraph) -> tuple[fx.Node, fx.Node]:
    """(what joins all partials, the slice of those that count once)."""
    return find(graph, aten.cat.default), find(graph, aten.slice.Tensor, region="step")


@fault(3, "counts all ranks along mp, not one", model="shared")
def norm_counts_alike_gradients_twice(graph: TrainGraph) -> None:
    _, first = counted(graph)
    drop(graph, first, first.args[0])


@fault(3, "counts one rank along mp, not all", model="shared")
def norm_counts_one_rank_s_parts(graph: TrainGraph) -> None:
    joined, first = counted(graph)
    parts = joined.args[0][0]
    with graph.inserting(joined, "step") as insert:
        own = insert(aten.slice.Tensor, parts, *first.args[1:])
    set_arg(joined, 0, [own, first])


@fault(3, "takes other partials than the first rank's", model="shared")
def norm_counts_another_rank(graph: TrainGraph) -> None:
    _, first = counted(graph)
    set_arg(first, 2, 1)


@fault(3, "norm_partials.* is not gathered over model-parallel ranks", model="shared")
def norm_of_own_parts_alone(graph: TrainGraph) -> None:
    joined, first = counted(graph)
    over_model = source(joined.args[0][0])
    set_arg(joined, 0, [over_model.args[0], first])


@fault(3, "norm_partials.* sums parts of parameters and whole ones", model="shared")
def norm_sums_parts_with_the_rest(graph: TrainGraph) -> None:
    parts, rest = (n for n in graph.nodes("step") if is_call(n, ops.norm_partials))
    grad, *others = parts.args[0]
    set_arg(parts, 0, others)
    set_arg(rest, 0, [*rest.args[0], grad])


# Arenas


def placed(graph: TrainGraph, index: int = 0) -> fx.Node:
    return [node for node in graph.nodes() if is_call(node, ops.place)][index]


@fault(0, "add_1 and add both lie in row 1 of arena a0", model="arena")
def values_in_one_row(graph: TrainGraph) -> None:
    set_arg(placed(graph, 2), 2, 1)


@fault(0, "add_1 lies in row 3 of arena a0, which has 3", model="arena")
def value_behind_its_arena(graph: TrainGraph) -> None:
    set_arg(placed(graph, 2), 2, 3)


@fault(0, "lies in arena a1, whose rows are of 64 B, and has 128 B", model="arena")
def value_in_an_arena_of_other_values(graph: TrainGraph) -> None:
    with graph.fake_mode:
        small = graph.add_placeholder("arena", "a1", torch.empty(1, 16))
    set_arg(placed(graph), 1, small)
    set_arg(placed(graph), 2, 0)


@fault(0, "lies in arena a1 of torch.float64 on cpu, and is torch.float32 on cpu", model="arena")
def value_in_an_arena_of_another_dtype(graph: TrainGraph) -> None:
    with graph.fake_mode:
        other = graph.add_placeholder("arena", "a1", torch.empty(1, 32, dtype=torch.float64))
    set_arg(placed(graph), 1, other)
    set_arg(placed(graph), 2, 0)
    placed(graph).args = placed(graph).args[:3]


@fault(0, "add in arena a0 is placed in the forward and saved 2 times, not once", model="arena")
def placed_and_saved_twice(graph: TrainGraph) -> None:
    save(graph, placed(graph, 1))


@fault(0, "checkpoint_default_1 reads add, not its place in an arena", model="arena")
def reading_what_was_copied(graph: TrainGraph) -> None:
    place = placed(graph, 1)
    reader = next(user for user in place.users if user.op != "output")
    reader.replace_input_with(place, place.args[0])


@fault(0, "getitem_3 cannot write getitem_3 into its place", model="arena")
def an_operator_that_cannot_write_its_place(graph: TrainGraph) -> None:
    place = placed(graph, 1)
    add = place.args[0]
    add.replace_all_uses_with(add.args[1])
    drop(graph, add)


@fault(0, "backward output place_default_1 lies in an arena", model="arena", after="arena")
def a_gradient_that_lies_in_an_arena(graph: TrainGraph) -> None:
    graph.set_outputs(backward=[placed(graph, 1), *graph.outputs("backward")[1:]])


@fault(0, "forward output add lies in an arena", model="arena", after="arena")
def a_result_that_lies_in_an_arena(graph: TrainGraph) -> None:
    graph.set_outputs(forward=[placed(graph, 1).args[0], *graph.outputs("forward")[1:]])


# Brackets


@fault(0, "region blocks.1 in the forward does not end", model="arena", after="bracket")
def region_that_does_not_end(graph: TrainGraph) -> None:
    drop(graph, find(graph, ops.leave, "blocks.1", "forward"))


@fault(0, "region blocks.2 in the forward ends where it has not", model="arena", after="bracket")
def region_that_ends_twice(graph: TrainGraph) -> None:
    repeat(graph, find(graph, ops.leave, "blocks.2", "forward"))


@fault(0, "region blocks.1 in the forward begins twice", model="arena", after="bracket")
def region_that_begins_twice(graph: TrainGraph) -> None:
    repeat(graph, find(graph, ops.enter, "blocks.1", "forward"))


@fault(0, "runs before it begins or after it ends", model="arena", after="bracket")
def region_that_ends_early(graph: TrainGraph) -> None:
    leave = find(graph, ops.leave, "blocks.1", "forward")
    move(leave, find(graph, ops.enter, "blocks.1", "forward").next)


# The tests


def require_good(graph: TrainGraph, provided: frozenset[str]) -> None:
    """Every check runs and holds, and checking changes nothing."""
    assert all(needs <= provided for needs, _ in verify.CHECKS)
    before = text(graph, "schedule")
    verify.verify(graph, provided, "nothing")
    assert text(graph, "schedule") == before


@pytest.mark.parametrize("stage", range(4))
def test_good_plan_that_updates_in_the_backward_passes(stage: int) -> None:
    graph, provided = good(stage, model="early")
    assert graph.updates_in_backward
    require_good(graph, provided)


@pytest.mark.parametrize(
    "model", ["blocks", "batch_norm", "partly", "half", "lamb", "host", "shared", "arena"]
)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("accumulation", [1, 2])
def test_good_plan_passes(stage: int, model: str, accumulation: int) -> None:
    graph, provided = good(stage, model=model, accumulation=accumulation)
    require_good(graph, provided)


@pytest.mark.parametrize("model", ["blocks", "partly", "half", "lamb"])
@pytest.mark.parametrize("groups", ["mics", "hpz"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_good_plan_of_groups_passes(groups: str, model: str, accumulation: int) -> None:
    graph, provided = good(3, model=model, accumulation=accumulation, groups=groups)
    require_good(graph, provided)


@pytest.mark.parametrize("groups", ["mics", "hpz"])
@pytest.mark.parametrize(("model", "number"), [("early", 0), ("blocks", 2), ("early", 2)])
def test_good_plan_of_groups_with_the_rest_passes(groups: str, model: str, number: int) -> None:
    graph, provided = good(3, model=model, number=number, groups=groups)
    require_good(graph, provided)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str) -> None:
    graph, provided = FAULTS[name].broken()
    with pytest.raises(VerifyError, match=FAULTS[name].says):
        verify.verify(graph, provided, "seeding a fault")


def test_message_names_the_pass() -> None:
    graph, provided = FAULTS["missing_update"].broken()
    with pytest.raises(VerifyError, match=r"^after pass lose_updates: bucket b1 is updated"):
        verify.verify(graph, provided, "lose_updates")


def test_there_are_many_faults() -> None:
    assert len(FAULTS) >= 24


@pytest.mark.parametrize("check", [check.__name__ for _, check in verify.CHECKS])
def test_no_check_is_dead(check: str) -> None:
    """Without this check some fault would go uncaught."""
    assert {check} in [caught_by(name) for name in FAULTS]


@functools.cache
def caught_by(name: str) -> frozenset[str]:
    """The checks that a fault breaks; one that stumbles over the broken graph counts as well."""
    graph, provided = FAULTS[name].broken()
    found = set()
    for needs, check in verify.CHECKS:
        if needs <= provided:
            try:
                problems = list(check(graph))
            except Exception:
                problems = ["stumbled"]
            found.update([check.__name__] if problems else [])
    return frozenset(found)


def test_swapped_collectives_are_a_difference_of_signatures() -> None:
    """What no rank can see alone: its collectives stand in another order than the others'."""
    plan = tiny.planned(tiny.trace_of("blocks", WORLD), 3)
    mine = ["step", *plan.signature()]
    swapped = tiny.planned(tiny.trace_of("blocks", WORLD), 3)
    first, second = (find(swapped.graph, ops.gather, b, "forward") for b in ("b1", "b2"))
    move(second, first)
    first, second = (find(swapped.graph, ops.gather_ahead, b) for b in ("b1", "b2"))
    move(first, second.next)
    theirs = ["step", *swapped.signature()]
    verify.verify(swapped.graph, good(3)[1], "swapping")  # a good graph, for itself
    message = first_difference(0, mine, 5, theirs)
    assert "ranks 0 and 5 differ in entry 2 of step" in message
    assert "rank 0: forward gather b1 1024 bytes f32" in message
    assert "rank 5: forward gather b2 1024 bytes f32" in message
    assert not issubclass(AgreementError, VerifyError)


def test_signature_is_in_the_order_of_the_graph() -> None:
    signature = tiny.planned(tiny.trace_of("blocks", WORLD), 3).signature()
    assert [" ".join(line.split()[:3]) for line in signature] == [
        *(f"forward gather b{i}" for i in (0, 1, 2, 3)),
        "forward gather b2",  # for the backward, which keeps b3
        "backward gather b1",
        *(f"backward reduce_scatter b{i}" for i in (3, 2, 1)),
        "step gather_partials -",
    ]
