"""Checks of buckets and collectives: gathers, releases, waits, and the bound on what is gathered."""

from collections import Counter
from collections.abc import Iterator
from typing import cast

from torch import fx

from zerograph import ops
from zerograph.cost import peak_gathered
from zerograph.ir import TrainGraph
from zerograph.nodes import axis_of, is_ahead, is_call, region_of, role_of, view_root
from zerograph.passes.release import users_of_aliases
from zerograph.verify.common import bucket_of, say, source_of


def params_lie_in_their_bucket(graph: TrainGraph) -> Iterator[str]:
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


def params_are_gathered(graph: TrainGraph) -> Iterator[str]:
    """At stage 3 a parameter is a view of a waited gather, unless it is persistent."""
    for node in graph.nodes():
        if not is_call(node, ops.param):
            continue
        full, param = cast(fx.Node, node.args[0]), graph.layout.params[cast(str, node.args[1])]
        if not graph.layout.buckets[param.bucket].sliced(graph.stage):
            continue
        if not is_call(full, ops.wait):
            what = "a pending gather" if is_call(full, ops.gather) else "a shard"
            yield f"{node.args[1]} in the {region_of(node)} is read from {what}"


def collectives_are_waited_for(graph: TrainGraph) -> Iterator[str]:
    """Once, where they start, or in the backward a gather that the forward keeps for it.

    The next forward waits for what the step starts for it: a refresh, a gather ahead.
    """
    saved = graph.outputs("saved")
    for node in graph.nodes():
        if is_call(node, *ops.COLLECTIVES, ops.gather_ahead):
            waits = [user for user in node.users if is_call(user, ops.wait)]
            due = int(not is_call(node, ops.refresh, ops.gather_ahead))
            kept = is_call(node, ops.gather) and node in saved
            if len(waits) != due:
                yield f"{say(node)} has {len(waits)} waits, not {due}"
            elif due and not _reaches(node, waits[0], kept):
                yield f"{say(node)} is waited for in the {region_of(waits[0])}, and not kept for it"
            for user in node.users:
                if user not in waits and not (user.op == "output" and kept):
                    what = "the output" if user.op == "output" else user.name
                    yield f"{what} uses {say(node)} without waiting for it"
            if (size := graph.mesh.size(axis_of(node))) != _world_of(node):
                yield f"{say(node)} is for {_world_of(node)} ranks, not {size}"
        started = (*ops.COLLECTIVES, *ops.COPIES)
        if is_call(node, ops.wait) and not is_call(cast(fx.Node, node.args[0]), *started):
            yield f"{node.name} waits for what was never started"


def _reaches(node: fx.Node, user: fx.Node, kept: bool) -> bool:
    """Whether a value is there where it is used; `kept`: whether the forward saves it."""
    regions = region_of(node), region_of(user)
    return regions[0] == regions[1] or (kept and regions == ("forward", "backward"))


def _world_of(node: fx.Node) -> int:
    return cast(int, node.args[2] if is_call(node, ops.gather) else node.args[-1])


def the_step_starts_what_the_forward_takes(graph: TrainGraph) -> Iterator[str]:
    """A gather with `ahead` has one start, in the region of the update of its bucket or later, behind it.

    Both are in one order in the step: what ranks agree on (`Plan.signature`) has the forward's.
    """
    takes = [bucket_of(n) for n in graph.nodes("forward") if is_ahead(n)]
    found = [n for n in graph.nodes() if is_call(n, ops.gather_ahead)]
    taken, started = Counter(takes), Counter(map(bucket_of, found))
    early = {bucket_of(n) for n in found if region_of(n) == "backward"}
    starts = [bucket_of(n) for n in found if bucket_of(n) not in early]
    takes = [bucket for bucket in takes if bucket not in early]
    if taken == started and takes != starts:
        yield f"the step starts {_joined(starts)}, which the forward takes as {_joined(takes)}"
    for bucket in dict.fromkeys([*taken, *started]):
        if (taken[bucket], started[bucket]) != (1, 1):
            yield (
                f"the forward takes {taken[bucket]} gathers of {bucket} that the step has started, and the "
                f"step starts {started[bucket]}"
            )
    updates = {bucket_of(n): n for n in graph.nodes() if is_call(n, ops.update)}
    due = ("backward", "step") if graph.updates_in_backward else ("step",)
    for node in graph.nodes():
        if is_ahead(node) and region_of(node) != "forward":
            yield f"{say(node)} is taken from the step before"
        if is_call(node, ops.gather_ahead):
            update = updates.get(bucket_of(node))
            if region_of(node) not in due:
                yield f"{say(node)} is for the next step"
            elif update is not None and node < update:
                yield f"{say(node)} stands before the update of its bucket"


def _joined(buckets: list[str | None]) -> str:
    return ", ".join(map(str, buckets))


def refreshes_are_waited_for(graph: TrainGraph) -> Iterator[str]:
    """A parameter that the step refreshes is read from a bucket that is waited for, there or in the step."""
    refreshes = any(is_call(n, ops.refresh) for n in graph.nodes())
    due = refreshes or graph.notes.get("refreshes", False)
    waits = {bucket_of(n): n for n in reversed(graph.nodes()) if is_call(n, ops.refreshed)}
    starts = {bucket_of(n): n for n in graph.nodes("step") if is_call(n, ops.refresh)}
    for node in graph.nodes():
        if not (due and is_call(node, ops.param)):
            continue
        param = graph.layout.params[cast(str, node.args[1])]
        wait, bucket = waits.get(param.bucket), graph.layout.buckets[param.bucket]
        start = starts.get(param.bucket)
        at_once = wait is not None and start is not None and start < wait
        if bucket.refreshed(graph.stage) and not at_once and (wait is None or node < wait):
            yield f"{param.name} in the {region_of(node)} is read before its refresh is waited for"


def gathers_are_released(graph: TrainGraph) -> Iterator[str]:
    for node in graph.nodes():
        if not is_call(node, ops.gather):
            continue
        full = next((u for u in node.users if is_call(u, ops.wait)), node)
        releases = [user for user in full.users if is_call(user, ops.release)]
        if len(releases) != 1:
            yield f"{say(node)} has {len(releases)} releases, not one"
            continue
        if not _reaches(full, releases[0], full in graph.outputs("saved")):
            yield f"{say(node)} is released in the {region_of(releases[0])}, and not kept for it"
        for user in users_of_aliases(full):
            if releases[0] < user:
                yield f"{user.name} reads bucket {node.args[1]} after its release"


def bound_holds(graph: TrainGraph) -> Iterator[str]:
    bound = graph.notes.get("max_live")
    peak = peak_gathered(graph)
    if bound is not None and peak > bound:
        yield f"{peak:,} gathered elements are alive at once, more than the bound of {bound:,}"


def buckets_stay_apart(graph: TrainGraph) -> Iterator[str]:
    """What moves, keeps or updates a bucket works on that bucket's storage and gradients alone."""
    for node in graph.nodes():
        if bucket := bucket_of(node):
            for source in map(source_of, node.all_input_nodes):
                if source.op == "placeholder":
                    own = role_of(source).name.partition("/")[0]
                    other = own if role_of(source).kind in _STORAGES else None
                else:
                    other = bucket_of(source)
                if other not in (None, bucket):
                    yield f"{say(node)} works on {source.name} of bucket {other}"


_STORAGES = ("full", "shard", "kept", "master", "state")
