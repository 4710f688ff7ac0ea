"""The peers of torch, as contestants: no communication, DDP, `fully_shard`; all with torch's fused AdamW.

In bf16 everybody keeps fp32 masters and moments, and computes and communicates in bf16, as zerograph does
with `bf16.enabled`: `fully_shard` by its MixedPrecisionPolicy, on its slice; DDP with a model in bf16,
whose update casts all gradients up and all parameters down.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from contest import BETAS, DTYPES, EPS, LR, WEIGHT_DECAY, llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


def adamw(parameters: list[Tensor]) -> torch.optim.AdamW:
    """The optimizer of all contestants but zerograph, whose kernel follows the same rule."""
    return torch.optim.AdamW(
        parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )


class Plain:
    """A step of a model whose parameters are what the optimizer updates."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = adamw(list(model.parameters()))

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        loss.backward()
        self.update()
        self.model.zero_grad()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()

    def held(self) -> list[Tensor]:
        """What lives from step to step."""
        states = (s for state in self.optimizer.state.values() for s in state.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *states]
        return [t for t in tensors if isinstance(t, Tensor)]


class WithMasters(Plain):
    """A step of a low-precision model whose optimizer updates fp32 masters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.low = list(model.parameters())
        self.masters = [p.detach().float() for p in self.low]
        self.gradients = [torch.empty_like(master) for master in self.masters]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer = adamw(self.masters)

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_copy_(self.gradients, [p.grad for p in self.low])
        self.optimizer.step()
        torch._foreach_copy_(self.low, self.masters)

    def held(self) -> list[Tensor]:
        return [*super().held(), *self.masters, *self.gradients]


class Alone(Plain):
    """Forward, backward, and the update of one rank's share, as under ZeRO: a slice of each parameter.

    The other slices stay as they are, so its losses are its own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.slices = [_slice(p.detach()) for p in model.parameters()]
        self.masters = [s.float() for s in self.slices]  # in fp32 the slices themselves
        self.optimizer = adamw(self.masters)

    @torch.no_grad()
    def update(self) -> None:
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = _slice(parameter.grad).float()
        self.optimizer.step()
        for own, master in zip(self.slices, self.masters, strict=True):
            if own is not master:
                own.copy_(master)


def _slice(full: Tensor) -> Tensor:
    """This rank's part of `full`, flat: a view."""
    return full.view(-1).tensor_split(dist.get_world_size())[dist.get_rank()]


def alone_step(dtype: str = "fp32") -> Plain:
    """No communication at all: what computing costs while the other ranks compute as well."""
    return Alone(llama().to(DTYPES[dtype]))


def ddp_step(dtype: str = "fp32") -> Plain:
    """Replicated: DistributedDataParallel, its gradients views of its buckets."""
    model = DistributedDataParallel(llama().to(DTYPES[dtype]), gradient_as_bucket_view=True)
    return Plain(model) if dtype == "fp32" else WithMasters(model)


def fully_shard_step(dtype: str = "fp32") -> Plain:
    """FSDP2: `fully_shard` on each layer and on the root.

    Layers are freed after the forward and gathered again; the root (embedding and head) stays gathered until
    its backward, as is `fully_shard`'s default.
    """
    model = llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    low = None if dtype == "fp32" else DTYPES[dtype]
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return Plain(model)
