"""How fast a disk is: one short write and read around the page cache."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

BLOCK = 8 * 2**20
BLOCKS = 8


@dataclass(frozen=True)
class Speed:
    """Bytes per second."""

    write: float
    read: float
    direct: bool
    """Whether the file system took O_DIRECT; otherwise the page cache was measured."""


def measure(folder: str, blocks: int = BLOCKS) -> Speed:
    """Write and read `blocks` blocks of 8 MiB in a file of its own in `folder`. Raises OSError."""
    handle, path = tempfile.mkstemp(prefix="zerograph-", dir=folder)
    os.close(handle)
    try:
        try:
            return _measure(path, blocks, os.O_DIRECT)
        except (OSError, AttributeError):
            return _measure(path, blocks, 0)
    finally:
        os.unlink(path)


def _measure(path: str, blocks: int, flag: int) -> Speed:
    with mmap.mmap(-1, BLOCK) as buffer:  # its pages are aligned, as O_DIRECT needs
        buffer.write(os.urandom(2**20) * (BLOCK // 2**20))
        write = _timed(path, os.O_WRONLY | flag, lambda file: os.write(file, buffer), blocks)
        read = _timed(path, os.O_RDONLY | flag, lambda file: os.readv(file, [buffer]), blocks)
    return Speed(blocks * BLOCK / write, blocks * BLOCK / read, bool(flag))


def _timed(path: str, flags: int, move: Callable[[int], int], blocks: int) -> float:
    """Seconds for all blocks and the flush."""
    file = os.open(path, flags)
    try:
        start = time.perf_counter()
        for _ in range(blocks):
            move(file)
        os.fsync(file)
        return time.perf_counter() - start
    finally:
        os.close(file)
