"""verify: the invariants that hold after every pass. A pass that breaks one is a defect, not bad input.

Each check reads the graph alone, is linear in it, and runs from the moment the property that it is
about has been provided. A VerifyError says which invariant, at which node, and after which pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import fx

from zerograph import ops
from zerograph.cost import peak_gathered
from zerograph.errors import VerifyError
from zerograph.ir import REGIONS, TrainGraph, is_call, region_of, role_of, view_root
from zerograph.passes.release import aliases, users_of_aliases

Check = Callable[[TrainGraph], Iterator[str]]


def verify(graph: TrainGraph, provided: frozenset[str], after: str) -> None:
    """Raise VerifyError if an invariant that holds once `provided` is broken."""
    for needs, check in CHECKS:
        if needs <= provided:
            for problem in check(graph):
                raise VerifyError(f"after pass {after}: {problem}")


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
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            if drawn[node.meta.get("seq_nr")] > 1:
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
    for section in ("forward", "saved", "backward"):
        for node in graph.outputs(section):
            if node is not None and _comes_from(node, ("param", "full", "shard")):
                yield f"{section} output {node.name} shares storage with a parameter"


def _comes_from(node: fx.Node, kinds: tuple[str, ...]) -> bool:
    root = view_root(node)
    if is_call(root, ops.gather):
        return True
    return root.op == "placeholder" and role_of(root).kind in kinds


def _saved_is_complete(graph: TrainGraph) -> Iterator[str]:
    saved = set(graph.outputs("saved"))
    kinds = ("buffer", "constant", "input")
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
    """At stage 3 a parameter is a view of a waited gather of its own region."""
    for node in graph.nodes():
        if graph.stage < 3 or not is_call(node, ops.param):
            continue
        full = cast(fx.Node, node.args[0])
        if not is_call(full, ops.wait):
            what = "a pending gather" if is_call(full, ops.gather) else "a shard"
            yield f"{node.args[1]} in the {region_of(node)} is read from {what}"
        elif region_of(full) != region_of(node):
            yield f"{node.args[1]} in the {region_of(node)} is read from another region's gather"


def _collectives_are_waited_for(graph: TrainGraph) -> Iterator[str]:
    for node in graph.nodes():
        if is_call(node, *ops.COLLECTIVES):
            waits = [user for user in node.users if is_call(user, ops.wait)]
            if len(waits) != 1:
                yield f"{node.name} has {len(waits)} waits, not one"
            for user in node.users:
                if user not in waits:
                    what = "the output" if user.op == "output" else user.name
                    yield f"{what} uses {node.name} without waiting for it"
            if graph.world != _world_of(node):
                yield f"{node.name} is for {_world_of(node)} ranks, not {graph.world}"
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
            yield f"{node.name} has {len(releases)} releases, not one"
            continue
        if region_of(releases[0]) != region_of(node):
            yield f"{node.name} is released in another region"
        for user in users_of_aliases(full):
            if releases[0] < user:
                yield f"{user.name} reads bucket {node.args[1]} after its release"
            if region_of(user) != region_of(node):
                yield f"{user.name} reads bucket {node.args[1]} in another region than its gather"
        for alias in aliases(full):
            if any(user.op == "output" for user in alias.users):
                yield f"{alias.name}, a view of bucket {node.args[1]}, leaves the program"


def _bound_holds(graph: TrainGraph) -> Iterator[str]:
    bound = graph.notes.get("max_live")
    peak = peak_gathered(graph)
    if bound is not None and peak > bound:
        yield f"{peak:,} gathered elements are alive at once, more than the bound of {bound:,}"


def _gradients_are_reduced_once(graph: TrainGraph) -> Iterator[str]:
    buffers = [n for n in graph.nodes("backward") if is_call(n, ops.grad_buffer)]
    per_bucket = Counter(cast(str, n.args[1]) for n in buffers)
    expected = {b.name for b in graph.layout.trainable_buckets()} if graph.training else set()
    for bucket in expected | set(per_bucket):
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
    counts = Counter(n.args[2] for n in graph.nodes() if is_call(n, ops.accumulate))
    kept = {g.name for g in graph.gradients if g.kind == "kept"}
    for bucket in kept | set(counts):
        if counts[bucket] != 1 or bucket not in kept:
            yield f"gradients of {bucket} are accumulated {counts[bucket]} times, not once"


def _updated_once(graph: TrainGraph) -> Iterator[str]:
    if not graph.training or "optimizer" not in graph.notes:
        return
    trained = [b.name for b in graph.layout.trainable_buckets()]
    updates = {n.args[7]: n for n in graph.nodes("step") if is_call(n, ops.update)}
    counts = Counter(n.args[7] for n in graph.nodes() if is_call(n, ops.update))
    for bucket in {*trained, *cast(set[str], set(counts))}:
        if counts[bucket] != 1 or bucket not in trained:
            yield f"bucket {bucket} is updated {counts[bucket]} times, not once"
    reduced = Counter(
        n.args[1]
        for n in graph.nodes("step")
        if is_call(n, ops.all_reduce, ops.reduce_scatter)
    )
    refreshed = {n.args[2]: n for n in graph.nodes("step") if is_call(n, ops.refresh)}
    for bucket in trained:
        if reduced[bucket] != (1 if graph.stage < 2 else 0):
            yield f"bucket {bucket} is reduced {reduced[bucket]} times in the step"
        if (bucket in refreshed) != (graph.stage in (1, 2)):
            yield f"bucket {bucket} is {'not ' * (graph.stage in (1, 2))}refreshed at stage {graph.stage}"
        elif bucket in refreshed and refreshed[bucket] < updates[bucket]:
            yield f"bucket {bucket} is refreshed before its update"


def _norm_covers_all(graph: TrainGraph) -> Iterator[str]:
    for node in graph.nodes("step"):
        if is_call(node, ops.norm_partials):
            grads = cast(list[fx.Node], node.args[0])
            updated = [n.args[1] for n in graph.nodes("step") if is_call(n, ops.update)]
            if set(grads) != set(updated) or len(grads) != len(updated):
                yield f"{node.name} does not cover the gradients that are applied"


_HAS = frozenset
CHECKS: tuple[tuple[frozenset[str], Check], ...] = (
    (_HAS(), _regions_in_order),
    (_HAS(), _values_in_order),
    (_HAS(), _no_repeated_effects),
    (_HAS({"normal"}), _saved_is_no_parameter),
    (_HAS({"normal"}), _results_are_no_parameter),
    (_HAS({"specialized"}), _saved_is_complete),
    (_HAS({"sharded"}), _params_lie_in_their_bucket),
    (_HAS({"gathered"}), _params_are_gathered),
    (_HAS({"gathered"}), _collectives_are_waited_for),
    (_HAS({"released"}), _gathers_are_released),
    (_HAS({"released"}), _bound_holds),
    (_HAS({"reduced"}), _gradients_are_reduced_once),
    (_HAS({"reduced"}), _accumulated_once),
    (_HAS({"updated"}), _updated_once),
    (_HAS({"updated"}), _norm_covers_all),
)
"""What must have been provided, and the check that then holds. The order is that of the passes."""
