"""Checks of copies to the host and back: each once, waited for, and nothing is left on the device."""

from collections import Counter
from collections.abc import Iterator
from typing import cast

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.nodes import is_call, region_of, view_root
from zerograph.passes.release import aliases
from zerograph.verify.common import say


def copies_are_waited_for(graph: TrainGraph) -> Iterator[str]:
    """Each has one wait, where it starts, and who reads it reads that."""
    due = {ops.offload: "forward", ops.reload: "backward"}
    for node in graph.nodes():
        if not is_call(node, *ops.COPIES):
            continue
        region = due[node.target]  # type: ignore[index]
        waits = [user for user in node.users if is_call(user, ops.wait)]
        if region_of(node) != region:
            yield f"{_say(node)} is not in the {region}"
        if len(waits) != 1:
            yield f"{_say(node)} has {len(waits)} waits, not one"
        for wait in waits:
            if region_of(wait) != region_of(node):
                yield f"{_say(node)} is waited for in the {region_of(wait)}"
        for user in node.users:
            if user not in waits:
                yield f"{user.name} uses {_say(node)} without waiting for it"


def offloaded_once(graph: TrainGraph) -> Iterator[str]:
    """One copy of a storage, which is what the forward saves in the place of it."""
    moved = [n for n in graph.nodes() if is_call(n, ops.offload)]
    times = Counter(view_root(_source(node)) for node in moved)
    saved = graph.outputs("saved")
    kept = {view_root(n) for n in saved if n is not None}
    for node in moved:
        root = view_root(_source(node))
        if times[root] != 1:
            yield f"{_source(node).name} is copied to the host {times[root]} times, not once"
        if root in kept:
            yield f"{_source(node).name} is copied to the host, and saved on the device as well"
        count = sum(saved.count(user) for user in node.users)
        if count != 1:
            yield f"the copy of {_source(node).name} on the host is saved {count} times, not once"


def offloaded_ends(graph: TrainGraph) -> Iterator[str]:
    """What was copied to the host is read no more: in the forward it was, in the backward its reload is."""
    for node in graph.nodes():
        if is_call(node, ops.offload):
            root = view_root(_source(node))
            for user in {user for alias in aliases(root) for user in alias.users}:
                if user.op != "output" and node < user:
                    yield f"{user.name} reads {root.name}, which went to the host before"


def reloaded_once(graph: TrainGraph) -> Iterator[str]:
    """What the backward reads of a copy on the host is one reload of it."""
    for node in graph.nodes():
        if is_call(node, ops.reload) and not _is_host(_source(node)):
            yield f"{_say(node)} brings back {_source(node).name}, which is not on the host"
        if not _is_host(node):
            continue
        users = [user for user in node.users if user.op != "output"]
        reloads = [user for user in users if is_call(user, ops.reload)]
        if len(reloads) > 1:
            yield f"{node.name} comes back from the host {len(reloads)} times, not once"
        for user in users:
            if user not in reloads:
                yield f"{user.name} reads {node.name}, which is on the host"


def _is_host(node: fx.Node) -> bool:
    """Whether a value is a copy on the host that was waited for."""
    return is_call(node, ops.wait) and is_call(_source(node), ops.offload)


def _source(node: fx.Node) -> fx.Node:
    return cast(fx.Node, node.args[0])


def _say(node: fx.Node) -> str:
    """`the offload of add in the forward`."""
    kind, _, place = say(node).partition(" in ")
    return f"{kind} of {_source(node).name} in {place}"
