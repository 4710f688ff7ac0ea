"""Checks of what model-parallel ranks share: each value once, whole again before it is read, and alike."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from zerograph import ops
from zerograph.alike import every, own_values
from zerograph.ir import TrainGraph
from zerograph.mesh import MODEL
from zerograph.nodes import axis_of, is_call, is_view, region_of, view_root
from zerograph.passes.release import aliases
from zerograph.verify.common import say


def shared_once(graph: TrainGraph) -> Iterator[str]:
    """One share of a storage, over all model-parallel ranks, which is what the forward saves of it."""
    shares = _calls(graph, ops.partition_activation)
    times = Counter(view_root(_source(node)) for node in shares)
    saved = graph.outputs("saved")
    kept = {view_root(n) for n in saved if n is not None}
    for node in shares:
        root, name = view_root(_source(node)), _source(node).name
        if region_of(node) != "forward":
            yield f"{_say(node)} is not in the forward"
        if times[root] != 1:
            yield f"{name} is shared {times[root]} times, not once"
        if root in kept:
            yield f"{name} is shared, and saved whole as well"
        if (count := sum(saved.count(form) for form in _forms(node))) != 1:
            yield f"the share of {name} is saved {count} times, not once"
    for node in (*shares, *_calls(graph, ops.gather_activation)):
        if axis_of(node) != MODEL or node.args[1] != graph.mesh.model:
            over = f"{node.args[1]} ranks over {axis_of(node) or 'dp'}"
            yield f"{_say(node)} is for {over}, not {graph.mesh.model} over {MODEL}"


def shared_are_alike(graph: TrainGraph) -> Iterator[str]:
    """What is shared is the same on all model-parallel ranks."""
    shares = _calls(graph, ops.partition_activation)
    own = own_values(graph, graph.notes.get("joins", every)) if shares else set()
    for node in shares:
        if _source(node) in own:
            yield f"{_source(node).name} is shared, and differs between model-parallel ranks"


def shared_end(graph: TrainGraph) -> Iterator[str]:
    """What is shared is read no more: in the forward it was, in the backward what is gathered is."""
    for node in _calls(graph, ops.partition_activation):
        root = view_root(_source(node))
        for user in {user for alias in aliases(root) for user in alias.users}:
            if user.op != "output" and node < user:
                yield f"{user.name} reads {root.name}, of which a share alone is left"


def gathered_once(graph: TrainGraph) -> Iterator[str]:
    """What the backward reads of a share is one gather of it, waited for, in the form of the value."""
    for node in _calls(graph, ops.gather_activation):
        if _share_of(node) is None:
            yield f"{_say(node)} is of {_source(node).name}, which is no share"
        waits = [user for user in node.users if is_call(user, ops.wait)]
        if len(waits) != 1 or len(node.users) != 1:
            yield f"{_say(node)} is read {len(node.users)} times, {len(waits)} of them by a wait"
        for each in (node, *waits):
            if region_of(each) != "backward":
                yield f"{each.name} of {_say(node)} is not in the backward"
    for share in _calls(graph, ops.partition_activation):
        readers = [u for form in _forms(share) for u in form.users if u.op != "output"]
        gathers = [u for u in readers if is_call(u, ops.gather_activation)]
        if len(gathers) > 1:
            yield f"the share of {_source(share).name} is gathered {len(gathers)} times, not once"
        for user in readers:
            if user not in gathers and not is_call(user, *ops.COPIES) and not is_view(user):
                yield f"{user.name} reads the share of {_source(share).name}"
        for gather in gathers:
            yield from _whole(share, gather)


def _whole(share: fx.Node, gather: fx.Node) -> Iterator[str]:
    """Who reads a gather reads it with the size and the strides of the value."""
    value = _source(share).meta["val"]
    for wait in gather.users:
        for view in wait.users:
            seen = view.meta["val"]
            right = is_call(view, torch.ops.aten.as_strided.default) and len(view.args) == 3
            if not right or (seen.shape, seen.stride()) != (value.shape, value.stride()):
                yield f"{view.name} reads {_source(share).name} in another form than its own"


def _forms(share: fx.Node) -> Iterator[fx.Node]:
    """A share, its views, its copies to the host and back, and what these are once they are waited for."""
    yield share
    for user in share.users:
        if is_call(user, *ops.COPIES) or is_view(user):
            yield from _forms(user)


def _share_of(gather: fx.Node) -> fx.Node | None:
    node = _source(gather)
    while is_call(node, *ops.COPIES) or is_view(node):
        node = _source(node)
    return node if is_call(node, ops.partition_activation) else None


def _calls(graph: TrainGraph, target: Any) -> list[fx.Node]:
    return [node for node in graph.nodes() if is_call(node, target)]


def _source(node: fx.Node) -> fx.Node:
    return cast(fx.Node, node.args[0])


def _say(node: fx.Node) -> str:
    """`the partition_activation of add in the forward`."""
    kind, _, place = say(node).partition(" in ")
    return f"{kind} of {_source(node).name} in {place}"
