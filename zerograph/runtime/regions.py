"""Checkpointed regions in a run: what `zero.enter` and `zero.leave` do on a rank.

    enter    wait for the device; note the time
    leave    wait for the device; log how long the region took

They are the keys `synchronize_checkpoint_boundary` (wait) and `profile` (wait and log, by rank 0, once a
region in each forward and each backward). On a CPU there is nothing to wait for.
"""

import logging
import time
from dataclasses import dataclass, field

import torch

_log = logging.getLogger("zerograph")


@dataclass
class Regions:
    """The regions of one engine's programs."""

    device: torch.device
    logs: bool
    """Whether this rank is the one that logs."""
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    """By region and "forward" or "backward" what it took the last time."""
    _began: dict[tuple[str, str], float] = field(default_factory=dict)

    def enter(self, name: str, section: str, profiles: bool) -> None:
        """Region `name` begins in the forward or the backward, which `section` says."""
        self._wait()
        if profiles:
            self._began[name, section] = time.perf_counter()

    def leave(self, name: str, section: str, profiles: bool) -> None:
        """It ends."""
        self._wait()
        if profiles:
            took = time.perf_counter() - self._began.pop((name, section))
            self.seconds[name, section] = took
            if self.logs:
                _log.info("checkpointed region %s: %s %.3f ms", name, section, took * 1e3)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
