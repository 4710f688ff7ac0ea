"""What gloo sends, counted exactly.

The kernel counts for every TCP connection the bytes of its stream that the other end has acknowledged
(`tcpi_bytes_acked` of `TCP_INFO`): no TCP or IP headers, nothing that was sent twice. On top of the payload
gloo's TCP transport sends three records of 48 bytes for each message: that a sender is ready, that a receiver
is, and one before the data. How many messages a collective is cut into follows from its size. So a count
is right if it equals payload and records to the byte.
"""

import os
import socket
import struct
import time
from math import ceil

from zerograph.collectives import CHUNK

TCP_INFO, ACKED_AT = 11, 120
RECORDS = 3 * 48
SEGMENT = 1 << 20
"""gloo's largest segment of an all-reduce, in bytes."""


def sent() -> int:
    """Bytes that this process has sent on all of its TCP connections, once nothing is under way."""
    before, now = -1, _acknowledged()
    while before != now:
        time.sleep(0.2)
        before, now = now, _acknowledged()
    return now


def _acknowledged() -> int:
    return sum(_of_descriptor(int(name)) for name in os.listdir("/proc/self/fd"))


def _of_descriptor(descriptor: int) -> int:
    """Acknowledged bytes of one open file; 0 if it is no TCP connection."""
    if not os.path.realpath(f"/proc/self/fd/{descriptor}").rpartition("/")[2].startswith("socket:"):
        return 0
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
            return 0
        info = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, ACKED_AT + 8)
    acked: int = struct.unpack_from("Q", info, ACKED_AT)[0]
    return acked


def messages(rounds: int, nbytes: int, itemsize: int, world: int) -> int:
    """Messages of all ranks together, of a collective in gloo's ring.

    A gather sends every rank's part round its ring once, in two halves; an all-reduce sends segments round it
    twice, and none that is empty.
    """
    if rounds == 1:
        return 2 * world * (world - 1)
    segments = max(ceil(nbytes / SEGMENT), 2 * world)
    segments = ceil(segments / world) * world
    segment = ceil(nbytes / segments / itemsize) * itemsize
    return 2 * (world - 1) * ceil(nbytes / segment)


def direct_messages(nbytes: int, world: int) -> int:
    """Messages of all ranks together, of a collective on a channel of zerograph's."""
    return world * (world - 1) * ceil(nbytes / world / CHUNK)
