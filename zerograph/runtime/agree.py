"""Agreement of ranks, before a collective that would otherwise hang.

Each rank puts its signature (ordered lines) into the process group's key-value store; rank 0 compares
them and posts a verdict that everybody reads. A difference is an error on every rank, and names the
first line that differs and both ranks. Nothing here is a collective.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, zip_longest
from typing import Any

from zerograph import compat
from zerograph.codegen.targets import choices
from zerograph.errors import AgreementError, KernelError
from zerograph.runtime.world import World

_engines = count()
MEND = "all ranks must run the same model, config and kind of step, in the same order"
MEND_KERNELS = (
    "sums would differ in their last bits, and parameters drift apart: give all ranks the same compiler and "
    "Triton, or one ZEROGRAPH_KERNELS, and the same table of launch settings (ZEROGRAPH_LAUNCH)"
)


@dataclass
class Agreement:
    """The agreements of one engine, in order; the same engine on all ranks."""

    world: World
    timeout: timedelta = timedelta(minutes=5)
    engine: int = field(default_factory=lambda: next(_engines))
    _rounds: int = 0
    _agreed: set[str] = field(default_factory=set)
    _across: "Agreement | None" = None

    def agree(self, what: str, signature: Sequence[str], mend: str = MEND) -> None:
        """Return once all ranks have the same `signature`; raise AgreementError on all otherwise.

        A signature that was agreed before is known to be the same everywhere, and costs nothing. `mend` ends
        the error.
        """
        text = "\n".join((what, *signature))
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in self._agreed or self.world.size == 1:
            self._agreed.add(digest)
            return
        prefix = f"zerograph/{self.world.label}{self.engine}/{self._rounds}"
        self._rounds += 1
        store = compat.default_store()
        store.set(f"{prefix}/text/{self.world.rank}", text)
        store.set(f"{prefix}/digest/{self.world.rank}", digest)
        if self.world.rank == 0:
            store.set(f"{prefix}/verdict", self._compare(store, prefix, text, digest, mend))
        verdict = self._read(store, f"{prefix}/verdict", 0, what)
        if verdict != "agreed":
            raise AgreementError(verdict)
        self._agreed.add(digest)

    def agree_on_model(self, what: str, signature: Sequence[str]) -> None:
        """The same among the ranks that compute one batch together; with their parts sizes may differ."""
        if self.world.model is not None:
            if self._across is None:
                self._across = Agreement(self.world.model, self.timeout, self.engine)
            self._across.agree(f"what model-parallel ranks share of {what}", signature)

    def agree_on_kernels(self, model: str) -> None:
        """Ranks must run kernels by the same target, and launch them alike, or last bits of sums differ.

        Raises KernelError where this rank's variables or table are wrong, once the others know.
        """
        lines, wrong = [], None
        try:
            lines = choices(self.world.device)
        except KernelError as error:
            lines, wrong = [str(error)], error
        self.agree(f"how kernels of {model} run", lines, MEND_KERNELS)
        if wrong is not None:
            raise wrong

    def _compare(self, store: Any, prefix: str, text: str, digest: str, mend: str) -> str:
        for rank in range(1, self.world.size):
            try:
                theirs = self._read(store, f"{prefix}/digest/{rank}", rank, text.split("\n")[0])
            except AgreementError as missing:
                return str(missing)
            if theirs != digest:
                other = store.get(f"{prefix}/text/{rank}").decode()
                return first_difference(0, text.split("\n"), rank, other.split("\n"), mend)
        return "agreed"

    def _read(self, store: Any, key: str, rank: int, what: str) -> str:
        try:
            store.wait([key], self.timeout * (2 if key.endswith("verdict") else 1))
        except (RuntimeError, ValueError) as error:
            raise AgreementError(
                f"rank {rank} did not reach the agreement on {what} within "
                f"{self.timeout.total_seconds():.0f} s: it failed, or runs another kind of step"
            ) from error
        return str(store.get(key).decode())


def first_difference(
    one: int, mine: Sequence[str], other: int, theirs: Sequence[str], mend: str = MEND
) -> str:
    """A message that names the first line in which two signatures differ."""
    pairs = zip_longest(mine, theirs, fillvalue="(nothing)")
    index, (left, right) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
    where = "what is compared" if index == 0 else f"entry {index} of {mine[0]}"
    return (
        f"ranks {one} and {other} differ in {where}:\n"
        f"  rank {one}: {left}\n"
        f"  rank {other}: {right}\n"
        f"{mend}"
    )
