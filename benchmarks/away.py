"""A contestant in processes of its own, one for each rank, which takes its turn with the others.

    rank's process                     its child, another Python
      Away(python, script, options)      serve(make_step)
        step              -- stdin -->     trains on its next batch
        loss, CPU seconds <-- stdout --    and waits, idle, for the next line

The children have a process group of their own, on another port. What else a child prints goes to a log,
whose end is shown if it fails.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import wire
from torch import Tensor

HERE = Path(__file__).resolve().parent
SHOWN = 20
"""Lines of a failed child's log."""


class Away:
    """A step that a child does; `process_time` is the child's CPU clock."""

    def __init__(self, python: str, script: str, *options: str) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the child
        self.child = subprocess.Popen(
            [python, str(HERE / script), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | _rendezvous(),
        )
        self.script = script
        self.cpu_seconds = 0.0

    def ready(self) -> None:
        """Wait until the child has made its contestant: once, before its first step."""
        self.cpu_seconds = self._answer()[1]

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The child makes the same batch, by its own count of steps."""
        assert self.child.stdin is not None
        self.child.stdin.write("step\n")
        self.child.stdin.flush()
        loss, self.cpu_seconds = self._answer()
        return torch.tensor(loss, dtype=torch.float64)

    def process_time(self) -> float:
        return self.cpu_seconds

    def close(self) -> None:
        """End the child."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            self.child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def _answer(self) -> tuple[float, float]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if line:
            loss, cpu_seconds = (float.fromhex(word) for word in line.split())
            return loss, cpu_seconds
        self.child.kill()
        self.log.seek(0)
        end = "".join(self.log.readlines()[-SHOWN:])
        raise SystemExit(f"{self.script} ended with status {self.child.wait()}:\n{end}")


def _rendezvous() -> dict[str, str]:
    """Where the children of all ranks meet: rank 0's address, and a port that is free there."""
    found: list[object] = [None]
    if dist.get_rank() == 0:
        with socket.create_server((wire.address(), 0)) as server:
            found = [server.getsockname()]
    dist.broadcast_object_list(found)
    host, port = found[0]  # type: ignore[misc]
    return {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "OMP_NUM_THREADS": "1",
    }


def serve(make: Callable[[], Callable[[int], float]]) -> None:
    """The child's side: make the contestant, then train whenever told; `step(index)` answers the loss."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = make()

    def answer(loss: float) -> None:
        answers.write(f"{loss.hex()} {time.process_time().hex()}\n")
        answers.flush()

    answer(0.0)
    for index, _ in enumerate(sys.stdin):
        answer(step(index))
