"""Check of where checkpointed regions begin and end."""

from collections.abc import Iterator

from torch import fx

from zerograph import ops
from zerograph.ir import TrainGraph
from zerograph.nodes import checkpoint_of, is_call, region_of


def regions_are_bracketed(graph: TrainGraph) -> Iterator[str]:
    """If any is: each region that begins ends, once in a section, and its nodes are between the two."""
    begun: dict[tuple[str, str], fx.Node] = {}
    ended: set[tuple[str, str]] = set()
    brackets = any(is_call(node, *ops.BRACKETS) for node in graph.nodes())
    for node in graph.nodes() if brackets else ():
        is_bracket = is_call(node, *ops.BRACKETS)
        name = str(node.args[0]) if is_bracket else checkpoint_of(node)
        key = name, region_of(node)
        where = f"region {name} in the {region_of(node)}"
        if is_call(node, ops.enter):
            if key in begun:
                yield f"{where} begins twice"
            begun[key] = node
        elif is_call(node, ops.leave):
            if key not in begun or key in ended:
                yield f"{where} ends where it has not begun"
            ended.add(key)
        elif name and (key not in begun or key in ended):
            yield f"{node.name} of {where} runs before it begins or after it ends"
    for name, section in begun.keys() - ended:
        yield f"region {name} in the {section} does not end"
