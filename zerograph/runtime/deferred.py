"""A number on its way from a device to the host."""

import torch
from torch import Tensor


class Deferred:
    """The value of a scalar tensor, read when it is needed and not when it is made.

    On CUDA it is copied to the host behind the work before it; reading waits for that work alone, and
    not at all if it is done. Elsewhere the tensor is read as it is.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._copied: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @property
    def known(self) -> bool:
        """Whether reading waits for nothing."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
