"""Bytes of real storages: what a run holds at each operator, told from the tensors themselves.

Tests use it, and benchmarks/live.py. Storages are followed from the operator that makes them until they
are freed; one that is resized on the way, as `fully_shard` does with gathered parameters, counts with the
size that it has at each operator. A DTensor counts as its local tensor. What an operator uses inside, and
frees before it returns, is not seen.
"""

import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BOUND = 0.05
"""How far a planned peak may be from a measured one, of the latter. Seen: under 0.01 on an idle machine."""
SETTLE = 0.005
"""Seconds after a collective's wait in which gloo's thread lets go of the tensors that it holds."""


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that are alive; `held` are those from before the run."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        """Most bytes alive at the end of an operator, whose inputs are alive as well."""
        self._seen: dict[int, Any] = {}
        for tensor in held:
            self.see(tensor)

    @property
    def alive(self) -> int:
        """Bytes of the storages that are alive now."""
        storages = (found() for found in list(self._seen.values()))
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def see(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` from now on, once."""
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._seen.pop(key))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        self.peak = max(self.peak, self.alive)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            time.sleep(SETTLE)
        return result


def held_by(engine: Any) -> list[Tensor]:
    """What an engine holds from step to step."""
    flat = [
        tensor
        for s in engine.state.storages.values()
        for tensor in (s.full, s.shard, s.master, s.kept, *s.states.values())
        if tensor is not None
    ]
    return [*flat, *engine.module.buffers()]


def close(held: int, planned: int) -> bool:
    """Whether the planned peak is near enough to what a run held."""
    return abs(planned - held) <= BOUND * held
