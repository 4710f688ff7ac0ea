"""Activation checkpointing as torch traces it: what `torch.utils.checkpoint` leaves on a joint graph.

Dynamo turns a call into the operator tag_activation_checkpoint, and AOTAutograd traces through it: the
joint graph is that of the function without checkpointing, and each of the function's nodes carries the
number of its call in `meta["ac_graph_id"]` and, in `meta["recompute"]`, what the policy says of it.
"""

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

_KEEPS = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def checkpoint_call(node: fx.Node) -> int | None:
    """Which call of torch's checkpoint a node was traced in: a number, which grows from call to call."""
    found = node.meta.get("ac_graph_id")
    return found if isinstance(found, int) else None


def policy_keeps(node: fx.Node) -> bool:
    """Whether the policy of a selective checkpoint (`context_fn`) has a node's results kept."""
    return node.meta.get("recompute") in _KEEPS
