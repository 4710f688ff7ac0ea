"""A real training step of a small transformer, recorded, as a mix of the operators that training runs.

How fast memory is depends on what an operator does with it (a sum, an exponential, a result whose
pages are new), so bytes per second are those of all of a step's operators together.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from zerograph.calibrate.timing import mean
from zerograph.config import load_config
from zerograph.cost import Work, work_of
from zerograph.engine import Engine
from zerograph.runtime.record import record
from zerograph.runtime.world import World

WIDTH, HEADS, LAYERS, WORDS, BATCH, LENGTH = 384, 6, 3, 6144, 4, 128
STEPS = 5
CACHE = 1 << 22
"""Operators that touch at most so many bytes are fitted apart from those that touch more."""
LEAST = 1 << 16
"""Operators that touch fewer bytes show what starting them takes, not memory."""


class Block(nn.Module):
    """Causal attention and a gated multilayer perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.mixing = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mixing(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden = self.norms[1](x)
        mixed = self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        return cast(Tensor, x + mixed)


class Reference(nn.Module):
    """A language model of about 10 million fp32 parameters; answers the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embed(ids)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


@dataclass(frozen=True)
class StepRates:
    """FLOPs per second of products; bytes per second of other operators, within `cache` bytes and beyond."""

    products: float
    cached: float
    streamed: float
    cache: int = CACHE


def step_rates(launch: float) -> StepRates:
    """Rates of a real step that each rank runs alone, at the same time; the mean over ranks.

    `launch` seconds of every operator are not counted.
    """
    pairs = [(work, max(took - launch, took / 10)) for work, took in _recorded()]
    products = [(work.flops, took) for work, took in pairs if work.flops]
    others = [(work.nbytes, took) for work, took in pairs if work.nbytes >= LEAST > work.flops]
    return StepRates(
        products=mean(_rate(products)),
        cached=mean(_rate(pair for pair in others if pair[0] <= CACHE)),
        streamed=mean(_rate(pair for pair in others if pair[0] > CACHE)),
    )


def _rate(pairs: Iterable[tuple[int, float]]) -> float:
    amounts, times = zip(*pairs, strict=True)
    return float(sum(amounts) / sum(times))


def _recorded() -> list[tuple[Work, float]]:
    """Each operator's work, and its seconds: the median over the steps, but for the first."""
    config = {"optimizer": {"type": "AdamW"}, "train_micro_batch_size_per_gpu": BATCH}
    alone = World(0, 1, torch.device("cpu"), None)
    engine = Engine(Reference(), load_config(config), alone)
    ids = torch.randint(0, WORDS, (BATCH, LENGTH))
    took: dict[int, list[float]] = {}
    for step in range(1 + STEPS):
        dist.barrier()
        with record(engine) as run:
            engine.backward(engine(ids))
            engine.step()
        for span in run.recording.spans if step else ():
            took.setdefault(span.node, []).append(span.seconds)
    nodes = engine.plan.graph.nodes()
    return [(work_of(nodes[index]), median(times)) for index, times in took.items()]
