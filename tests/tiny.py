"""Small deterministic models and their plans, shared by the tests. One process, no ranks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import parallel
from zerograph.collectives import Algorithm
from zerograph.config import load_config
from zerograph.layout import layout_of
from zerograph.plan import Plan
from zerograph.planning import call_of, plan_of
from zerograph.precision import precision_of
from zerograph.trace import Trace, trace

WIDTH = 8


class Block(nn.Module):
    """A linear layer behind a norm, with dropout: two parameters of a matrix, two of a norm."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.gelu(self.linear(self.norm(x))))


class Blocks(nn.Module):
    """Repeated blocks between a frozen first layer and a head; answers {"loss", "logits"}."""

    def __init__(self, depth: int = 2, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.inlet = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": F.mse_loss(logits, target), "logits": logits}


class Mlp(nn.Module):
    """Two linear layers and a norm between them; answers the loss alone."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.second(self.norm(torch.relu(self.first(x)))), target)


class BatchNorm(nn.Module):
    """A norm whose running statistics the forward updates."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.norm(self.first(x)), target)


class Normed(nn.Module):
    """Repeated layers whose running statistics the forward updates."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())
            for _ in range(2)
        )

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, target)


class Partly(nn.Module):
    """Two heads and two losses; the backward of "loss" alone leaves `other` without a gradient."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.trunk = nn.Linear(width, width)
        self.head = nn.Linear(width, width)
        self.other = nn.Linear(width, width)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        aside = self.other(hidden).square().mean()
        return {"loss": F.mse_loss(self.head(hidden), target), "aside": aside}


class Tied(nn.Module):
    """One matrix at the start and at the end, layers in between."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(Block(width, 0.0) for _ in range(2))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(F.linear(x, self.embed.weight), target)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": Blocks,
    "mlp": Mlp,
    "batch_norm": BatchNorm,
    "normed": Normed,
    "partly": Partly,
    "half": Blocks,
    "lamb": Blocks,
    "early": Blocks,
    "host": functools.partial(Blocks, 3),
    "shared": functools.partial(parallel.Parallel, 3, 2, "mp"),
    "arena": functools.partial(Blocks, 3),
}
GIVEN: dict[str, dict[str, Any]] = {
    "half": {"fp16": {"enabled": True}},
    "lamb": {"optimizer": {"type": "Lamb"}},
    "host": {"activation_checkpointing": {"number_checkpoints": 3, "cpu_checkpointing": True}},
    "shared": {
        "activation_checkpointing": {"number_checkpoints": 3, "partition_activations": True}
    },
    "arena": {
        "activation_checkpointing": {
            "number_checkpoints": 3,
            "contiguous_memory_optimization": True,
            "synchronize_checkpoint_boundary": True,
        }
    },
    "early": {"gradient_clipping": 0.0, "compile": {"update_in_backward": True}},
}
"""What the config of a model says beside `config(stage)`."""


def batch(size: int = 4, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(size, width, generator=generator),
        "target": torch.randn(size, width, generator=generator),
    }


def config(stage: int, **more: Any) -> dict[str, Any]:
    """A config with everything on that a small plan can show; `more` replaces top-level keys.

    The backward gathers again what the forward gathered.
    """
    made: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "stage3_max_reuse_distance": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
    }
    return made | more


def traced(
    model: nn.Module,
    inputs: Any,
    world: int,
    given: Mapping[str, Any] | None = None,
    model_parallel: int = 1,
) -> Trace:
    """Trace `model` for `world` ranks. It serves all stages: the config decides dtypes."""
    precision = precision_of(model, load_config(given or config(0)))
    layout = layout_of(model, world, precision, model_parallel=model_parallel)
    args, kwargs = call_of(inputs)
    device = torch.device("cpu")
    return trace(model, args, kwargs, layout=layout, precision=precision, device=device)


@functools.cache
def trace_of(name: str, world: int = 8) -> Trace:
    """The trace of one of MODELS. Copy its graph before changing it."""
    torch.manual_seed(0)
    shared = name == "shared"
    inputs = batch(64, parallel.WIDTH) if shared else batch(128 if name == "host" else 4)
    inputs["x"].requires_grad_(name == "half")
    return traced(MODELS[name](), inputs, world, config(0, **GIVEN.get(name, {})), 1 + shared)


def planned(trace: Trace, stage: int, algorithm: Algorithm = "point-to-point", **more: Any) -> Plan:
    return plan_of(trace, load_config(config(stage, **more)), algorithm=algorithm)
