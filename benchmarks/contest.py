"""A contest of training steps: the model, the batches, taking turns, and what is compared.

Contestants live in the same processes, one thread a rank, start from the same weights and see the same
batches. They take turns, a few steps at a time, in an order that rotates, so that whatever else the machine
does falls on all of them alike. A turn begins with a step that is not timed: what one step leaves to be sent
behind the next is paid for by the steps that are. A step's time is that of the slowest rank; its CPU time is
the mean over ranks of all threads' work, gloo's included. Ratios are medians of the ratios within a round,
where contestants ran next to each other. Nothing here knows zerograph, so that peers can use it in
environments of their own.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, SEQUENCE, LAYERS = 4, 128, 7
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
WARM_UP = 1
LEAD, TIMED = 1, 2
"""Steps of a turn: not timed, and timed."""
DIGITS = {"fp32": 5, "bf16": 3}
"""How many digits of the losses agree. In bf16 peers round gradients at other places."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Run = Callable[[argparse.Namespace], None]
Step = Callable[[Mapping[str, Tensor]], Tensor]
"""Trains on one batch and answers the loss."""


@dataclass
class Times:
    """One contestant: seconds of every measured step, and the loss of every step on this rank."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def llama() -> LlamaForCausalLM:
    """A Llama of 29.4 million fp32 parameters, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1440,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def batch_of(step: int, rank: int) -> dict[str, Tensor]:
    """The batch of one rank at one step, the same for every contestant."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    ids = torch.randint(0, 8192, (BATCH, SEQUENCE), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def measure(steps: Mapping[str, Step], rounds: int) -> dict[str, Times]:
    """Take turns for `rounds` rounds behind `WARM_UP` rounds that are not timed."""
    times = {name: Times(name) for name in steps}
    names = list(steps)
    for index in range(WARM_UP + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            timed = times[name] if index >= WARM_UP else Times(name)
            times[name].losses += _turn(steps[name], index, timed)
        if dist.get_rank() == 0:
            print(f"round {index + 1} of {WARM_UP + rounds}", end="\r", file=sys.stderr)
    if dist.get_rank() == 0:
        print(file=sys.stderr, flush=True)
    return times


def _turn(step: Step, turn: int, times: Times) -> list[float]:
    """`LEAD` steps, then `TIMED` ones behind them: their mean seconds (of the slowest rank) and CPU seconds.

    What a step leaves under way for the next is there when the timed ones begin, as when they end; the turn
    ends once nothing is (`drain`, if the contestant has one). A contestant that computes in another
    process has a clock of its own (`process_time`). Answers the losses on this rank.
    """
    process_time: Callable[[], float] = getattr(step, "process_time", time.process_time)
    batches = [batch_of(turn * (LEAD + TIMED) + i, dist.get_rank()) for i in range(LEAD + TIMED)]
    dist.barrier()
    losses = [step(batch) for batch in batches[:LEAD]]
    start, cpu_start = time.perf_counter(), process_time()
    losses += [step(batch) for batch in batches[LEAD:]]
    slowest = torch.tensor((time.perf_counter() - start) / TIMED, dtype=torch.float64)
    worked = torch.tensor((process_time() - cpu_start) / TIMED, dtype=torch.float64)
    getattr(step, "drain", lambda: None)()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(worked)
    times.seconds.append(float(slowest))
    times.cpu_seconds.append(float(worked) / dist.get_world_size())
    return [float(loss) for loss in losses]


def require_agreement(times: Mapping[str, Times], dtype: str = "fp32") -> None:
    """Every contestant that communicates has the same losses, to `DIGITS` digits, at every step."""
    expected = times["ddp"].losses
    bound = 0.5 * 10 ** (1 - DIGITS[dtype])
    for name, own in times.items():
        for index, (loss, other) in enumerate(zip(own.losses, expected, strict=True)):
            if name != "alone" and not abs(loss - other) <= bound * abs(other):
                raise SystemExit(f"{name} has loss {loss} at step {index}, ddp {other}")


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of the ratio of two contestants' steps of the same round."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def launch(run: Run, options: argparse.Namespace) -> None:
    """`run(options)` in the process group of torchrun, else on `options.ranks` spawned ranks."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        run(options)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_spawned, (f"{folder}/store", run, options), nprocs=options.ranks)
        except mp.ProcessExitedException as error:  # a rank called sys.exit, and said why
            sys.exit(error.exit_code)


def _spawned(rank: int, store: str, run: Run, options: argparse.Namespace) -> None:
    init = f"file://{store}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=options.ranks)
    run(options)
    dist.destroy_process_group()
