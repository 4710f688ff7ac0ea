"""A small model that is cut over model-parallel ranks, as Megatron cuts it, and its groups.

    x + all_reduce(down(gelu(up(norm(x)))))     up has rows, down has columns of the whole matrices

Its collectives are torch's functional ones. The same class, cut into one part, is the whole model.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

c10d = torch.ops._c10d_functional
WIDTH = 32


class Copied(torch.autograd.Function):
    """The value; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class Summed(torch.autograd.Function):
    """The sum over ranks; its gradient is each term's."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        return _summed(value, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _summed(value: Tensor, group: str) -> Tensor:
    if not group:
        return value
    done: Tensor = c10d.wait_tensor(c10d.all_reduce(value.contiguous(), "sum", group))
    return done


class Layer(nn.Module):
    """A feed-forward layer, of which each of `parts` ranks has as many hidden units."""

    def __init__(self, parts: int = 1, group: str = "", dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH // parts)
        self.down = nn.Linear(2 * WIDTH // parts, WIDTH, bias=False)
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.group, self.dropout = group, dropout
        for part in (self.up.weight, self.up.bias, self.down.weight):
            part.tensor_model_parallel = parts > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(Copied.apply(self.norm(x), self.group))
        made = Summed.apply(self.down(F.gelu(hidden)), self.group) + self.bias
        return x + F.dropout(made, self.dropout, self.training and self.dropout > 0)


class Parallel(nn.Module):
    """Layers and a head that is not cut."""

    def __init__(
        self, depth: int = 3, parts: int = 1, group: str = "", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(parts, group, dropout) for _ in range(depth))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.head(x), target)


def whole(depth: int = 3) -> Parallel:
    """The whole model, with the same values in every process."""
    torch.manual_seed(0)
    made = Parallel(depth)
    for layer in made.layers:
        nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return made


def part_of(name: str, value: Tensor, parts: int, index: int) -> Tensor:
    """Of a parameter of the whole model what rank `index` of `parts` has."""
    kind = name.partition(".up.")[1] or name.partition(".down.")[1]
    if not kind:
        return value
    return value.chunk(parts, dim=0 if kind == ".up." else 1)[index].contiguous()


def cut(model: Parallel, parts: int, index: int, group: str, dropout: float = 0.0) -> Parallel:
    """Rank `index`'s part of the whole `model`."""
    made = Parallel(len(model.layers), parts, group, dropout)
    state = {n: part_of(n, v, parts, index) for n, v in model.state_dict().items()}
    made.load_state_dict(state)
    return made


class Mpu:
    """Groups of a world, `model` ranks that follow each other being model parallel; as Megatron's object."""

    def __init__(self, rank: int, world: int, model: int) -> None:
        rows = [list(range(first, first + model)) for first in range(0, world, model)]
        columns = [list(range(first, world, model)) for first in range(model)]
        for ranks in rows:
            group = dist.new_group(ranks)
            self.model = group if rank in ranks else getattr(self, "model", None)
        for ranks in columns:
            group = dist.new_group(ranks)
            self.data = group if rank in ranks else getattr(self, "data", None)

    def get_model_parallel_group(self) -> Any:
        return self.model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.model)

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)
