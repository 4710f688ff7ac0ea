"""Run a function on several ranks: real processes, one thread each, gloo over a file store.

Every run has a deadline; at its end no process is left.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

TIMEOUT = 280.0
COLLECTIVES = 120.0
"""Seconds that one collective may take."""

# What the server imports once, before any rank is forked from it. It has no threads and no process group
# that a fork could break.
PRELOAD = ["tests.warm"]
ROOT = Path(__file__).parent.parent


class RankError(Exception):
    """A rank raised; the message holds every failed rank's traceback."""


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """`function(rank, world, *args)` on `world` ranks; their return values in rank order.

    `function` must be importable (a module-level function); what it returns must pickle. Ranks have the
    caller's ZEROGRAPH_ variables.
    """
    outcomes = outcomes_of(world, function, *args, timeout=timeout)
    failures = [f"rank {r}:\n{text}" for r, (kind, text) in enumerate(outcomes) if kind != "value"]
    if failures:
        raise RankError("\n".join(failures))
    return [value for _, value in outcomes]


def outcomes_of(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    collectives: float = COLLECTIVES,
    lost: Collection[int] = (),
) -> list[tuple[str, Any]]:
    """What became of each rank: ("value", what it returned), ("error", traceback) or ("timeout", "").

    A collective may take `collectives` seconds. Ranks that are meant to be `lost` are not waited for.
    """
    settings = {name: os.environ[name] for name in os.environ if name.startswith("ZEROGRAPH_")}
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, collectives, settings, function, args)
        processes = [
            context.Process(target=_rank, args=(rank, world, *given), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            others = [process for rank, process in enumerate(processes) if rank not in lost]
            _join(others, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [_read(Path(folder) / f"{rank}.pickle") for rank in range(world)]


def _server() -> Any:
    """The process that ranks are forked from; one for all runs, started where it finds `tests`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
    return context


def _join(processes: list[Any], deadline: float) -> None:
    """Wait for all; once one fails, the others get a few seconds to fail by themselves."""
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 20)
        time.sleep(0.05)


def _read(path: Path) -> tuple[str, Any]:
    if not path.exists():
        return ("timeout", "no answer before the deadline")
    return pickle.loads(path.read_bytes())


def _rank(
    rank: int,
    world: int,
    folder: str,
    seconds: float,
    settings: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    for name in [name for name in os.environ if name.startswith("ZEROGRAPH_")]:
        del os.environ[name]  # the server has those of the test that started it
    os.environ.update(settings, OMP_NUM_THREADS="1")
    assert PRELOAD[0] in sys.modules, "import tests.warm fails: see python -c 'import tests.warm'"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answer: tuple[str, Any]
    try:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
        )
        answer = ("value", function(rank, world, *args))
        if seconds == COLLECTIVES:
            dist.barrier()  # otherwise a rank is meant to be lost
    except BaseException:
        answer = ("error", traceback.format_exc())
    part = Path(folder) / f"{rank}.part"
    part.write_bytes(pickle.dumps(answer))
    part.rename(Path(folder) / f"{rank}.pickle")
    os._exit(0 if answer[0] == "value" else 1)
