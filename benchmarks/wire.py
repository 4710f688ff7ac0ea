"""What the link between the ranks carries: bytes sent round a ring over plain TCP sockets.

Every rank sends to the next and receives from the one before at the same time, so each link is busy both
ways, as in a gather or a reduce-scatter of ZeRO; without torch, this is the line rate that TCP reaches.
Needs a process group, to exchange addresses and to begin together.
"""

import os
import socket
import statistics
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

CHUNK = 1 << 20
PILOT = 4 << 20
SECONDS = 0.4
"""How long one measured exchange takes, about."""
MOST = 256 << 20
LATE = 120.0
"""Seconds after which a silent neighbour is an error."""


def address() -> str:
    """This rank's own address on the link to MASTER_ADDR; on one machine the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        found: str = probe.getsockname()[0]
    return found


def slowest(seconds: float) -> float:
    """The most that any rank says; the same on all ranks."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


class Ring:
    """Connections to the next rank and from the one before."""

    def __init__(self) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        with socket.create_server((address(), 0)) as server:
            server.settimeout(LATE)
            places: list[Any] = [None] * world
            dist.all_gather_object(places, server.getsockname())
            self.next = socket.create_connection(places[(rank + 1) % world], timeout=LATE)
            self.before, _ = server.accept()
        self.before.settimeout(LATE)

    def exchange(self, nbytes: int) -> float:
        """Seconds in which every rank sends and receives `nbytes`; the slowest rank's."""
        block, room = bytes(min(CHUNK, nbytes)), bytearray(CHUNK)
        dist.barrier()
        start = time.perf_counter()
        sender = threading.Thread(target=self._send, args=(block, nbytes), daemon=True)
        sender.start()
        left = nbytes
        while left:
            got = self.before.recv_into(room, min(left, CHUNK))
            if not got:
                raise ConnectionError(f"the rank before {dist.get_rank()} closed its connection")
            left -= got
        sender.join()
        return slowest(time.perf_counter() - start)

    def _send(self, block: bytes, nbytes: int) -> None:
        for left in range(nbytes, 0, -len(block)):
            self.next.sendall(block[:left] if left < len(block) else block)

    def close(self) -> None:
        self.next.close()
        self.before.close()


def line_rate(repeats: int = 5) -> float:
    """Bytes a second each way, the median of some exchanges of about `SECONDS`; the same on all ranks."""
    ring = Ring()
    ring.exchange(PILOT)
    nbytes = min(MOST, int(PILOT * SECONDS / ring.exchange(PILOT)))
    rate = nbytes / statistics.median(ring.exchange(nbytes) for _ in range(repeats))
    ring.close()
    return rate
