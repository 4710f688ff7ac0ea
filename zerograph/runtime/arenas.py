"""Lending arenas: the memory for what forwards keep, from step to step the same.

    forward     lends the arenas of its program         what it keeps is in them, and nowhere else
    backward    reads them; behind it they are free
    forward     has the same memory again

A forward that is called while the backward of another is still to come (or may: its outputs are held) has
arenas of its own, which are kept as well from then on. Programs share arenas of one name, dtype and device,
so a call with other sizes has the same memory as long as it fits. Where larger sizes come larger memory
takes its place; it never shrinks, and goes by `release` alone.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from zerograph.arenas import empty, lies_in
from zerograph.errors import ZerographError
from zerograph.ir import TrainGraph
from zerograph.nodes import role_of

Key = tuple[str, torch.dtype, torch.device]
_MADE: "weakref.WeakSet[Arenas]" = weakref.WeakSet()


class Lent(dict[str, Tensor]):
    """The arenas [values, elements of each] of one forward, by name; free once nobody holds this."""


@dataclass(eq=False)
class _Memory:
    """One arena's memory, and who has it."""

    flat: Tensor
    holder: "weakref.ref[Lent] | None" = None

    @property
    def free(self) -> bool:
        return self.holder is None or self.holder() is None


@dataclass(eq=False)
class Arenas:
    """All arenas of one engine."""

    memories: dict[Key, list[_Memory]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _MADE.add(self)

    def lend(self, graph: TrainGraph, sizes: tuple[int, ...]) -> Lent:
        """The arenas that a forward of `graph` needs, at these values of its symbols."""
        lent = Lent()
        for node in graph.placeholders("arena"):
            rows, length = graph.sizes.evaluate(node.meta["val"].shape, sizes)
            memory = self._take(node, rows * length, graph.device)
            memory.holder = weakref.ref(lent)
            lent[role_of(node).name] = memory.flat[: rows * length].view(rows, length)
        return lent

    def tensors(self) -> list[Tensor]:
        """The memory of all arenas, lent or not."""
        return [memory.flat for own in self.memories.values() for memory in own]

    def release(self) -> None:
        """Let go of the arenas that nobody has at the moment."""
        for key, own in self.memories.items():
            self.memories[key] = [memory for memory in own if not memory.free]

    def _take(self, node: fx.Node, count: int, device: torch.device) -> _Memory:
        """Free memory of at least `count` elements: what is there, larger in its place, or more."""
        value = node.meta["val"]
        own = self.memories.setdefault((role_of(node).name, value.dtype, value.device), [])
        free = [memory for memory in own if memory.free]
        found = next((memory for memory in free if memory.flat.numel() >= count), None)
        if found is not None:
            return found
        if free:
            own.remove(free.pop())  # its memory goes before the larger is made
        pinned = value.device.type == "cpu" and device.type == "cuda"
        made = _Memory(empty(count, value.dtype, value.device, pinned))
        own.append(made)
        return made


def release_all() -> None:
    """Let go of every engine's arenas that nobody has at the moment."""
    for arenas in list(_MADE):
        arenas.release()


def require_placed(
    placed: Mapping[str, tuple[str, int]], saved: Mapping[str, Tensor], lent: Lent, model: str
) -> None:
    """Raise ZerographError if a value that a forward saves is elsewhere than in its place."""
    for name, (arena, row) in placed.items():
        if not lies_in(saved[name], lent[arena], row):
            raise ZerographError(
                f"activation_checkpointing.contiguous_memory_optimization: {name} of {model}, which is kept "
                f"for the backward, was to lie in row {row} of arena {arena}, and an operator made it "
                "elsewhere; this is a defect of zerograph: leave the key out"
            )
