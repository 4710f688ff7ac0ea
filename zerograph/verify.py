"""verify: the invariants that hold after every pass. To break one is a defect, not bad input.

Each check reads the graph alone, is linear in it, and runs from the moment the property that it is
about has been provided. A VerifyError says which invariant, at which node, and after which pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

from zerograph import ops
from zerograph.cost import name_of, peak_gathered
from zerograph.errors import VerifyError
from zerograph.ir import REGIONS, TrainGraph, is_call, region_of, role_of, view_root
from zerograph.passes.release import users_of_aliases

Check = Callable[[TrainGraph], Iterator[str]]


def verify(graph: TrainGraph, provided: frozenset[str], after: str) -> None:
    """Raise VerifyError if an invariant that holds once `provided` is broken."""
    for needs, check in CHECKS:
        if needs <= provided:
            for problem in check(graph):
                raise VerifyError(f"after pass {after}: {problem}")


_BUCKET_ARGUMENT = {
    ops.gather: 1,
    ops.release: 1,
    ops.grad_buffer: 1,
    ops.reduce_scatter: 1,
    ops.all_reduce: 1,
    ops.accumulate: 2,
    ops.refresh: 2,
    ops.update: 8,
}


def _bucket_of(node: fx.Node) -> str | None:
    """The bucket that a zero.* node is about, if it is about one."""
    index = _BUCKET_ARGUMENT.get(cast(OpOverload, node.target))
    return None if index is None else cast(str, node.args[index])


def _say(node: fx.Node) -> str:
    """`the gather of b1 in the forward`."""
    bucket = _bucket_of(node)
    return f"the {name_of(node)}{f' of {bucket}' if bucket else ''} in the {region_of(node)}"


def _regions_in_order(graph: TrainGraph) -> Iterator[str]:
    reached = 0
    for node in graph.nodes():
        index = REGIONS.index(region_of(node))
        if index < reached:
            yield f"{node.name} of the {region_of(node)} stands behind a later region"
        reached = max(reached, index)


def _values_in_order(graph: TrainGraph) -> Iterator[str]:
    for node in graph.nodes():
        for source in node.all_input_nodes:
            if not source < node:
                yield f"{node.name} reads {source.name} before it exists"


def _no_repeated_effects(graph: TrainGraph) -> Iterator[str]:
    """The backward draws no random numbers of the forward's again."""
    drawn = Counter(
        n.meta.get("seq_nr")
        for n in graph.nodes()
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        and n.meta.get("seq_nr") is not None
    )
    for node in graph.nodes("backward"):
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random and drawn[node.meta.get("seq_nr")] > 1:
            yield f"{node.name} repeats a random operation of the forward"


def _saved_is_no_parameter(graph: TrainGraph) -> Iterator[str]:
    kinds = ("param", "full", "shard")
    for node in graph.nodes("backward"):
        for source in node.all_input_nodes:
            crosses = source.op == "call_function" and region_of(source) == "forward"
            if crosses and _comes_from(source, kinds):
                yield (
                    f"{node.name} in the backward reads {source.name}, which the forward made and "
                    "which keeps a parameter's storage alive"
                )


def _results_are_no_parameter(graph: TrainGraph) -> Iterator[str]:
    for section in ("forward", "saved", "backward", "step"):
        for node in graph.outputs(section):
            if node is not None and _comes_from(node, ("param", "full", "shard")):
                yield f"{section} output {node.name} shares storage with a parameter"


def _old_buffers_are_kept(graph: TrainGraph) -> Iterator[str]:
    """The backward reads no buffer that the forward has updated by then."""
    updated = {r.name for r in graph.results if r.kind == "update"}
    for node in graph.placeholders("buffer"):
        if role_of(node).name in updated:
            for user in node.users:
                if user.op != "output" and region_of(user) == "backward":
                    yield f"{user.name} reads buffer {role_of(node).name} after its update"


def _comes_from(node: fx.Node, kinds: tuple[str, ...]) -> bool:
    root = view_root(node)
    if is_call(root, ops.gather):
        return True
    return root.op == "placeholder" and role_of(root).kind in kinds


def _saved_is_complete(graph: TrainGraph) -> Iterator[str]:
    saved = set(graph.outputs("saved"))
    kinds = ("buffer", "constant", "input", "size")
    for node in graph.nodes("backward"):
        for source in node.all_input_nodes:
            forward = source.op != "placeholder" and region_of(source) == "forward"
            outside = source.op == "placeholder" and role_of(source).kind in kinds
            if (forward or outside) and source not in saved:
                yield f"{node.name} reads {source.name}, which the forward does not save"


def _params_lie_in_their_bucket(graph: TrainGraph) -> Iterator[str]:
    for node in graph.placeholders("param"):
        yield f"{role_of(node).name} is still a whole parameter"
    for node in graph.nodes():
        if is_call(node, ops.param):
            param = graph.layout.params[cast(str, node.args[1])]
            place = (param.offset, list(param.shape), list(param.stride))
            if (node.args[2], list(node.args[3]), list(node.args[4])) != place:  # type: ignore[arg-type]
                yield f"{param.name} is read from another place than its own in {param.bucket}"
            root = view_root(node)
            source = root.args[1] if is_call(root, ops.gather) else role_of(root).name
            if source != param.bucket:
                yield f"{param.name} is read from {source}, but lies in {param.bucket}"


def _params_are_gathered(graph: TrainGraph) -> Iterator[str]:
    """At stage 3 a parameter is a view of a waited gather."""
    for node in graph.nodes():
        if graph.stage < 3 or not is_call(node, ops.param):
            continue
        full = cast(fx.Node, node.args[0])
        if not is_call(full, ops.wait):
            what = "a pending gather" if is_call(full, ops.gather) else "a shard"
            yield f"{node.args[1]} in the {region_of(node)} is read from {what}"


def _collectives_are_waited_for(graph: TrainGraph) -> Iterator[str]:
    for node in graph.nodes():
        if is_call(node, *ops.COLLECTIVES):
            waits = [user for user in node.users if is_call(user, ops.wait)]
            if len(waits) != 1:
                yield f"{_say(node)} has {len(waits)} waits, not one"
            elif region_of(waits[0]) != region_of(node):
                yield f"{_say(node)} is waited for in the {region_of(waits[0])}"
            for user in node.users:
                if user not in waits:
                    what = "the output" if user.op == "output" else user.name
                    yield f"{what} uses {_say(node)} without waiting for it"
            if graph.world != _world_of(node):
                yield f"{_say(node)} is for {_world_of(node)} ranks, not {graph.world}"
        if is_call(node, ops.wait) and not is_call(cast(fx.Node, node.args[0]), *ops.COLLECTIVES):
            yield f"{node.name} waits for what was never started"


def _world_of(node: fx.Node) -> int:
    return cast(int, node.args[-1])


def _gathers_are_released(graph: TrainGraph) -> Iterator[str]:
    for node in graph.nodes():
        if not is_call(node, ops.gather):
            continue
        full = next((u for u in node.users if is_call(u, ops.wait)), node)
        releases = [user for user in full.users if is_call(user, ops.release)]
        if len(releases) != 1:
            yield f"{_say(node)} has {len(releases)} releases, not one"
            continue
        if region_of(releases[0]) != region_of(node):
            yield f"{_say(node)} is released in another region"
        for user in users_of_aliases(full):
            if releases[0] < user:
                yield f"{user.name} reads bucket {node.args[1]} after its release"


def _bound_holds(graph: TrainGraph) -> Iterator[str]:
    bound = graph.notes.get("max_live")
    peak = peak_gathered(graph)
    if bound is not None and peak > bound:
        yield f"{peak:,} gathered elements are alive at once, more than the bound of {bound:,}"


def _gradients_are_reduced_once(graph: TrainGraph) -> Iterator[str]:
    buffers = [n for n in graph.nodes("backward") if is_call(n, ops.grad_buffer)]
    per_bucket = Counter(cast(str, n.args[1]) for n in buffers)
    expected = {b.name for b in graph.layout.trainable_buckets()} if graph.training else set()
    for bucket in sorted(expected | set(per_bucket)):
        if bucket not in expected:
            yield f"frozen bucket {bucket} has a gradient buffer"
        elif per_bucket[bucket] != 1:
            yield f"bucket {bucket} has {per_bucket[bucket]} gradient buffers, not one"
    puts: Counter[str] = Counter()
    for buffer in buffers:
        yield from _chain(graph, buffer, puts)
    for node in graph.nodes():
        if is_call(node, ops.put) and puts[cast(str, node.args[2])] == 0:
            yield f"{node.name} is written to a buffer that is not its bucket's"
    for name, param in graph.layout.params.items():
        due = int(graph.training and param.trainable and name not in graph.unused)
        if puts[name] != due:
            yield f"the gradient of {name} is reduced {puts[name]} times, not {due}"


def _chain(graph: TrainGraph, buffer: fx.Node, puts: Counter[str]) -> Iterator[str]:
    """Follow a buffer through its puts to its reduction and accumulation."""
    bucket, node = cast(str, buffer.args[1]), buffer
    while True:
        users = list(node.users)
        if len(users) != 1:
            yield f"{node.name}, the buffer of {bucket}, has {len(users)} users, not one"
            return
        (user,) = users
        if not is_call(user, ops.put):
            break
        param = graph.layout.params[cast(str, user.args[2])]
        if param.bucket != bucket or user.args[3] != param.offset:
            yield f"the gradient of {param.name} is put to a wrong place of {bucket}"
        puts[param.name] += 1
        node = user
    if graph.stage >= 2:
        if not is_call(user, ops.reduce_scatter) or user.args[1] != bucket:
            yield f"the buffer of {bucket} goes to {user.name} unreduced"
            return
        user = next(iter(next(iter(user.users), user).users), user)
    if not is_call(user, ops.accumulate) or user.args[2] != bucket:
        yield f"the gradients of {bucket} are not accumulated but go to {user.name}"


def _accumulated_once(graph: TrainGraph) -> Iterator[str]:
    found = [n for n in graph.nodes() if is_call(n, ops.accumulate)]
    counts = Counter(map(_bucket_of, found))
    pairs = zip(graph.gradients, graph.outputs("backward"), strict=True)
    kept = {g.name: cast(fx.Node, node) for g, node in pairs if g.kind == "kept"}
    for bucket in dict.fromkeys([*kept, *counts]):
        if counts[bucket] != 1 or bucket not in kept:
            yield f"gradients of {bucket} are accumulated {counts[bucket]} times, not once"
    for bucket, node in kept.items():
        if not is_call(node, ops.accumulate) or _bucket_of(node) != bucket:
            yield f"{node.name} is kept as the gradients of {bucket}"
    if len({n.args[3] for n in found}) > 1:
        yield "buckets are accumulated with different weights"


def _buckets_stay_apart(graph: TrainGraph) -> Iterator[str]:
    """What moves, keeps or updates a bucket works on that bucket's storage and gradients alone."""
    for node in graph.nodes():
        if bucket := _bucket_of(node):
            for source in map(_source, node.all_input_nodes):
                if source.op == "placeholder":
                    own = role_of(source).name.partition("/")[0]
                    other = own if role_of(source).kind in _STORAGES else None
                else:
                    other = _bucket_of(source)
                if other not in (None, bucket):
                    yield f"{_say(node)} works on {source.name} of bucket {other}"


_STORAGES = ("full", "shard", "kept", "master", "state")


def _source(node: fx.Node) -> fx.Node:
    """What a value was before it was waited for and cast."""
    while is_call(node, ops.wait, torch.ops.aten._to_copy.default):
        node = cast(fx.Node, node.args[0])
    return node


def _updated_once(graph: TrainGraph) -> Iterator[str]:
    if not graph.training or "optimizer" not in graph.notes:
        return
    step = graph.nodes("step")
    trained = [b.name for b in graph.layout.trainable_buckets()]
    updates = {_bucket_of(n): n for n in step if is_call(n, ops.update)}
    refreshes = {_bucket_of(n): n for n in step if is_call(n, ops.refresh)}
    counts = Counter((n.target, _bucket_of(n)) for n in graph.nodes())
    reduced = Counter(_bucket_of(n) for n in step if is_call(n, ops.all_reduce, ops.reduce_scatter))
    due_reductions, due_refreshes = int(graph.stage < 2), int(graph.stage in (1, 2))
    for bucket in dict.fromkeys([*trained, *updates, *refreshes]):
        times = counts[ops.update, bucket]
        if times != 1 or bucket not in trained or bucket not in updates:
            yield f"bucket {bucket} is updated {times} times in the step, not once"
        if reduced[bucket] != due_reductions:
            yield f"bucket {bucket} is reduced {reduced[bucket]} times in the step"
        if (times := counts[ops.refresh, bucket]) != due_refreshes:
            yield f"bucket {bucket} is refreshed {times} times at stage {graph.stage}"
        elif due_refreshes and refreshes[bucket] < updates[bucket]:
            yield f"bucket {bucket} is refreshed before its update"


def _updates_agree(graph: TrainGraph) -> Iterator[str]:
    """Every update takes its bucket's mean gradient, and the same flags, factor and skip."""
    mean = {0: ops.all_reduce, 1: ops.reduce_scatter}.get(graph.stage, ops.accumulate)
    updates = [n for n in graph.nodes("step") if is_call(n, ops.update)]
    for node in updates:
        grad, used, factor, finite = (cast(fx.Node, node.args[i]) for i in (1, 5, 6, 7))
        if not is_call(_source(grad), mean):
            yield f"{_say(node)} takes {grad.name}, which is not the mean over ranks"
        if factor is not updates[0].args[6] or finite is not updates[0].args[7]:
            yield f"{_say(node)} takes another factor or skip than {_say(updates[0])}"
        if graph.unused and not is_call(_source(used), ops.any_rank):
            yield f"{_say(node)} does not know which parameters other ranks used"
    for node in updates[:1]:
        yield from _factor_is_whole(graph, node)


def _factor_is_whole(graph: TrainGraph, update: fx.Node) -> Iterator[str]:
    """Clipping, scale and weights are in the factor, the latter two also in the norm that is clipped."""
    clips = {n for n in graph.nodes("step") if is_call(n, ops.clip)}
    norms = {n for n in graph.nodes("step") if is_call(n, ops.grad_norm)}
    factor, finite = update.args[6], update.args[7]
    if clips and not _derives(factor, clips, norms):
        yield f"the factor of {_say(update)} leaves out the clipping"
    for what in ("scale", "weight"):
        source = set(graph.placeholders(what))
        if source and not _derives(factor, source, norms | clips):
            yield f"the factor of {_say(update)} leaves out the {what}"
        if source and any(not _derives(clip, source, norms) for clip in clips):
            yield f"the clipping leaves out the {what}"
    if graph.precision.skips and not _derives(finite, norms, set()):
        yield f"{_say(update)} is not skipped when the norm is not finite"


def _derives(value: object, sources: set[fx.Node], not_through: set[fx.Node]) -> bool:
    """Whether `value` is one of `sources`, or is computed from one past the nodes `not_through`."""
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if node in sources:
            return True
        if isinstance(node, fx.Node) and node not in seen and node not in not_through:
            seen.add(node)
            stack += node.all_input_nodes
    return False


def _reductions_agree(graph: TrainGraph) -> Iterator[str]:
    """All gradients are averaged in the same way."""
    kinds = (ops.reduce_scatter, ops.all_reduce)
    found = [n for n in graph.nodes() if is_call(n, *kinds)]
    for node in found:
        if node.args[2:] != found[0].args[2:]:
            yield f"{_say(node)} averages otherwise than {_say(found[0])}"


def _gradients_are_scaled(graph: TrainGraph) -> Iterator[str]:
    """With a scaled loss every gradient that arrives is scaled once, and inputs' are scaled back."""
    if not (graph.training and graph.precision.scaled):
        return
    (scale,) = graph.placeholders("scale")
    for tangent in graph.placeholders("tangent"):
        for user in tangent.users:
            if not is_call(user, torch.ops.aten.mul.Tensor) or user.args[1] is not scale:
                yield f"{user.name} uses the gradient of {role_of(tangent).name} unscaled"
    for gradient, node in zip(graph.gradients, graph.outputs("backward"), strict=True):
        source = _source(cast(fx.Node, node))
        back = is_call(source, torch.ops.aten.div.Tensor) and source.args[1] is scale
        if gradient.kind == "input" and not back:
            yield f"the gradient of input {gradient.name} is not scaled back"


def _norm_covers_all(graph: TrainGraph) -> Iterator[str]:
    updates = [n for n in graph.nodes("step") if is_call(n, ops.update)]
    for node in graph.nodes("step"):
        if is_call(node, ops.norm_partials):
            grads = Counter(cast(list[fx.Node], node.args[0]))
            if grads != Counter(n.args[1] for n in updates):
                yield f"{node.name} does not cover the gradients that are applied"
            for update in updates:
                if update < node:  # an update may overwrite its gradient
                    yield f"{_say(update)} stands before {node.name}"


_HAS = frozenset
CHECKS: tuple[tuple[frozenset[str], Check], ...] = (
    (_HAS(), _regions_in_order),
    (_HAS(), _values_in_order),
    (_HAS(), _no_repeated_effects),
    (_HAS({"normal"}), _saved_is_no_parameter),
    (_HAS({"normal"}), _results_are_no_parameter),
    (_HAS({"normal"}), _old_buffers_are_kept),
    (_HAS({"specialized"}), _saved_is_complete),
    (_HAS({"scaled"}), _gradients_are_scaled),
    (_HAS({"sharded"}), _params_lie_in_their_bucket),
    (_HAS({"gathered"}), _params_are_gathered),
    (_HAS({"gathered"}), _collectives_are_waited_for),
    (_HAS({"gathered"}), _buckets_stay_apart),
    (_HAS({"released"}), _gathers_are_released),
    (_HAS({"reduced"}), _gradients_are_reduced_once),
    (_HAS({"reduced"}), _accumulated_once),
    (_HAS({"updated"}), _reductions_agree),
    (_HAS({"updated"}), _updated_once),
    (_HAS({"updated"}), _updates_agree),
    (_HAS({"updated"}), _norm_covers_all),
    (_HAS({"scheduled"}), _bound_holds),
)
"""What must have been provided, and the check that then holds. The order is that of the passes."""
