"""What lowered programs communicate with: channels for gloo, and waits that name what failed.

A channel gathers and reduce-scatters by chunked point-to-point messages:

    gather           every rank sends its shard to each other rank, and receives theirs into the full buffer
    reduce_scatter   every rank sends each other rank that one's slice, and sums what it receives of its own
    all_reduce       a reduce_scatter, whose wait gathers the slices, in place

Each pair of ranks exchanges chunks of `CHUNK` bytes, so both directions of a link are busy, and nothing is
sent twice: (world - 1) / world of the buffer leaves a rank. gloo's own reduce-scatter moves twice that, and
one large message each way over one pair takes turns (docs/architecture.md has the figures). Sums are taken
in rank order, whichever message arrives first, in fp32 for 16-bit gradients: the same bits in every run.

A collective is started, works in the background, and is waited for once. What it sends and receives stays
alive until then. One that fails, or does not end within the process group's timeout, raises
CommunicationError.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from zerograph import compat
from zerograph.errors import CommunicationError
from zerograph.mesh import ALL, named

Algorithm = Literal["point-to-point", "native"]
"""How a program gathers and reduce-scatters buckets: over channels, or as the backend does."""

ALGORITHMS: dict[Algorithm, str] = {
    "point-to-point": "point-to-point in chunks of 1 MiB, sums in rank order",
    "native": "the backend's own",
}
"""Each as a plan says it."""

CHUNK = 1 << 20
"""Bytes of a message. Of 256 KiB to 8 MiB the fastest on loopback, and line rate on a 1 Gbit/s link."""
_TAGS = 1 << 30
"""Tags are counted modulo this; gloo takes non-negative 32-bit numbers."""


def algorithm_for(device: torch.device) -> Algorithm:
    """The algorithm on the backend that a device has by default: gloo on the CPU, else NCCL."""
    return "point-to-point" if device.type == "cpu" else "native"


@dataclass(eq=False)
class Channel:
    """A process group of its own, for collectives that all ranks start in the same order."""

    group: dist.ProcessGroup
    rank: int
    size: int
    axis: str = ALL
    """Of the mesh, along which its ranks are."""
    broken: bool = False
    """Whether any collective of this process has failed: what nobody waits for is then left alone."""
    _tags: Iterator[int] = field(default_factory=count)
    _all: ClassVar["WeakSet[Channel]"] = WeakSet()
    watch: "Watcher | None" = None
    """Told of every collective that is started, while a profile runs (runtime/watch.py)."""

    def __post_init__(self) -> None:
        self._all.add(self)

    @classmethod
    def broke(cls) -> None:
        """A collective has failed: a rank that ends must not stand still for the others again."""
        for channel in cls._all:
            channel.broken = True

    @classmethod
    def beside(cls, group: dist.ProcessGroup, axis: str = ALL) -> "Channel":
        """A new channel between the ranks of `group`, with its timeout; call it on all of them."""
        ranks = dist.get_process_group_ranks(group)
        made = compat.group_beside(group, ranks, backend="gloo")
        return cls(made, dist.get_rank(group), len(ranks), axis)

    def gather(self, shard: Tensor, full: Tensor, bucket: str) -> "Gathering":
        """Start gathering all ranks' shards [n] into `full` [size * n], of which `shard` may be a part."""
        begin = time.perf_counter()
        places = list(full.view(self.size, -1))
        pending = Gathering(self, self.called("gather", bucket), bucket, shard, places, full)
        pending.start([shard] * self.size)
        if places[self.rank].data_ptr() != shard.data_ptr():
            places[self.rank].copy_(shard)
        if self.watch is not None:
            self.watch(pending, begin)
        return pending

    def reduce_scatter(
        self, buffer: Tensor, bucket: str, mean: bool, factor: float = 1.0
    ) -> "Reducing":
        """Start the sum over ranks of `buffer` [size * n], of which each rank is given its slice [n].

        `mean` divides the sum by the number of ranks; otherwise it is multiplied by `factor`.
        """
        return self._reduce(Reducing, buffer, bucket, mean, factor)

    def all_reduce(
        self, buffer: Tensor, bucket: str, mean: bool, factor: float = 1.0
    ) -> "Reducing":
        """Start the same sum, of which each rank is given all, in `buffer` itself."""
        return self._reduce(AllReducing, buffer, bucket, mean, factor)

    def _reduce(
        self, kind: "type[Reducing]", buffer: Tensor, bucket: str, mean: bool, factor: float
    ) -> "Reducing":
        begin = time.perf_counter()
        slices = list(buffer.view(self.size, -1))
        own = slices[self.rank]
        terms = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        what, divisor = self.called("reduction", bucket), self.size if mean else 1
        pending = kind(self, what, bucket, own, terms, buffer, divisor, factor)
        pending.start(slices)
        if self.watch is not None:
            self.watch(pending, begin)
        return pending

    def peers(self) -> Iterator[int]:
        """The other ranks, the next one first, so that not all send to the same one at once."""
        return ((self.rank + step) % self.size for step in range(1, self.size))

    def called(self, kind: str, bucket: str) -> str:
        """As an error says it, and a program's `starts`."""
        return named(f"the {kind} of bucket {bucket}", self.axis)

    def tag(self) -> int:
        return next(self._tags) % _TAGS


@dataclass
class Exchange:
    """A collective under way: rank r's part [n] arrives in `places[r]`."""

    channel: Channel
    what: str
    """For errors, and to a profile its name."""
    bucket: str
    own: Tensor
    """This rank's part."""
    places: list[Tensor]
    seen: Any = field(default=None, init=False)
    """What a watcher keeps of it."""
    _sent: list[dist.Work] = field(default_factory=list, init=False)
    _arriving: list[tuple[slice, list[dist.Work]]] = field(default_factory=list, init=False)

    def start(self, parts: list[Tensor]) -> None:
        """Send `parts[r]` [n] to each other rank r, and receive from it, chunk by chunk."""
        group = self.channel.group
        with self._named(), compat.unrecorded():
            for chunk in _chunks(self.own):
                tag, arriving = self.channel.tag(), []
                for peer in self.channel.peers():
                    arriving.append(group.recv([self.places[peer][chunk]], peer, tag))
                    self._sent.append(group.send([parts[peer][chunk]], peer, tag))
                self._arriving.append((chunk, arriving))

    def through(self, wrap: Callable[[dist.Work], dist.Work]) -> None:
        """Wait for `wrap(work)` in place of each message's work: in the order of the waits."""
        self._arriving = [(chunk, list(map(wrap, works))) for chunk, works in self._arriving]
        self._sent = list(map(wrap, self._sent))

    def arrivals(self) -> Iterator[slice]:
        """Each chunk, once it is there from all ranks; at the end everything is sent as well."""
        for chunk, arriving in self._arriving:
            self._finish(arriving)
            yield chunk
        self._finish(self._sent)
        self._arriving.clear()
        self._sent.clear()

    def _finish(self, works: list[dist.Work]) -> None:
        with self._named():
            for work in works:
                work.wait()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise failed(dist.get_rank(), self.what, error) from error

    def __del__(self) -> None:
        """One that nobody waited for is finished all the same: its buffers are still written to."""
        if (self._arriving or self._sent) and not self.channel.broken and dist.is_initialized():
            with suppress(CommunicationError):
                for _ in self.arrivals():
                    pass


Watcher = Callable[[Exchange, float], None]
"""Told of an exchange, and when its start began (time.perf_counter)."""


@dataclass
class Gathering(Exchange):
    full: Tensor

    def wait(self) -> Tensor:
        """The full buffer [size * n]."""
        for _ in self.arrivals():
            pass
        return self.full


@dataclass
class Reducing(Exchange):
    buffer: Tensor | None
    divisor: int
    factor: float

    def wait(self) -> Tensor:
        """This rank's slice [n] of the sum. Chunks are summed while later ones arrive."""
        result = self.places[0 if self.channel.rank else 1]
        for chunk in self.arrivals():
            self._sum([place[chunk] for place in self.places], result[chunk])
        self.places, self.own, self.buffer = [], result, None
        return result

    def _sum(self, terms: list[Tensor], out: Tensor) -> None:
        """Sum the terms in their order into `out`, which is one of the first two."""
        wide = torch.float32 if out.dtype.itemsize == 2 else out.dtype
        total = out if wide == out.dtype else torch.empty_like(out, dtype=wide)
        torch.add(terms[0].to(wide), terms[1].to(wide), out=total)
        for term in terms[2:]:
            total.add_(term)
        if self.divisor != 1:
            total.div_(self.divisor)
        if self.factor != 1.0:
            total.mul_(self.factor)
        if total is not out:
            out.copy_(total)


class AllReducing(Reducing):
    def wait(self) -> Tensor:
        """The buffer [size * n], with the sum."""
        buffer, channel = self.buffer, self.channel
        assert buffer is not None
        own, places = super().wait(), list(buffer.view(channel.size, -1))
        gathering = Gathering(channel, self.what, self.bucket, own, places, buffer)
        begin, gathering.seen = time.perf_counter(), self.seen
        gathering.start([own] * channel.size)
        places[channel.rank].copy_(own)
        if channel.watch is not None:
            channel.watch(gathering, begin)
        return gathering.wait()


@dataclass(frozen=True)
class Native:
    """One of torch's functional collectives under way."""

    pending: Tensor
    what: str

    def wait(self) -> Tensor:
        return wait(self.pending, self.what)


def start_gather(shard: Tensor, full: Tensor, what: str, world: int, group: str) -> Native:
    """Gather as the backend does: all ranks' shards [n] into `full` [world * n]; `what` is for errors."""
    op = torch.ops._c10d_functional.all_gather_into_tensor_out
    with compat.unrecorded():
        return Native(op(shard, world, group, out=full), what)


def wait(pending: Tensor, what: str) -> Tensor:
    """The value of one of torch's functional collectives; `what` names it in an error."""
    try:
        done: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    except RuntimeError as error:
        raise failed(dist.get_rank(), what, error) from error
    return done


def failed(rank: int, what: str, error: RuntimeError) -> CommunicationError:
    """The error of a rank whose collective `what` ended with the backend's `error`."""
    Channel.broke()
    reason = str(error).strip().splitlines()[0]
    return CommunicationError(
        f"rank {rank}: {what} failed: {reason}. Another rank has died, or stands still, or runs another "
        "kind of step (its own log says); start the ranks again. The time that a rank waits is the process "
        "group's timeout, zerograph.init_distributed(timeout=...)"
    )


def _chunks(part: Tensor) -> Iterator[slice]:
    """What of a part [n] goes into each message."""
    length = CHUNK // part.dtype.itemsize
    return (slice(at, min(at + length, len(part))) for at in range(0, len(part), length))
