"""Full values as dicts: state dicts, gradients; and back to the model. Each call is for all ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zerograph.errors import PlanError
from zerograph.runtime.state import State, named_buffers


def gradients(
    state: State, means: Mapping[str, Tensor | None], used: set[str], divisor: float
) -> dict[str, Tensor | None]:
    """Full gradients by name: buckets' `means` over `divisor`; None where there is none."""
    found: dict[str, Tensor | None] = {}
    for bucket, flat in means.items():
        if flat is not None and divisor != 1.0:
            flat.div_(divisor)
        for param in state.layout.bucket_params(bucket):
            none = flat is None or param.name not in used
            found[param.name] = None if none else state.view(flat, param).clone()  # type: ignore[arg-type]
    return {name: found[name] for name in state.layout.params if name in found}


def state_dict(state: State, rank0_only: bool) -> dict[str, Any]:
    """The module's state dict with full CPU tensors in the place of its parameters and buffers."""
    full = _full_parameters(state, keep=not rank0_only or state.world.rank == 0)
    buffers = _rank0_buffers(state)
    if rank0_only and state.world.rank != 0:
        return {}
    by_id = {id(p): full[name] for name, p in state.parameters.items()}
    by_id.update({id(buffer): value for buffer, value in buffers})
    own = state.module.state_dict(keep_vars=True)
    made = {
        name: by_id.get(id(v), v.detach().cpu() if isinstance(v, Tensor) else v)
        for name, v in own.items()
    }
    return made


def _full_parameters(state: State, keep: bool) -> dict[str, Tensor]:
    full: dict[str, Tensor] = {}
    for bucket in state.layout.buckets.values():
        flat = state.full_values(bucket)
        for param in state.layout.bucket_params(bucket.name) if keep else ():
            view = state.view(flat, param).to(param.model_dtype)
            full[param.name] = view.clone(memory_format=torch.preserve_format).cpu()
    return full


def _rank0_buffers(state: State) -> list[tuple[Tensor, Tensor]]:
    found, seen = [], set()
    for _, _, buffer in named_buffers(state.module):
        if id(buffer) not in seen:
            seen.add(id(buffer))
            value = buffer.detach().clone(memory_format=torch.contiguous_format)
            if value.numel():
                state.world.broadcast(value)
            found.append((buffer, value.cpu()))
    return found


@torch.no_grad()
def load_state_dict(state: State, given: Mapping[str, Any], strict: bool) -> None:
    """Check names and shapes of the whole dict first; then write bucket by bucket."""
    own = state.module.state_dict(keep_vars=True)
    _check(own, given, strict)
    name_of = {id(p): name for name, p in state.parameters.items()}
    incoming: dict[str, Tensor] = {}
    for key, value in own.items():
        if key not in given:
            continue
        if id(value) in name_of:
            incoming[name_of[id(value)]] = given[key]
        elif isinstance(value, Tensor):
            value.copy_(given[key])
    for bucket in state.layout.buckets.values():
        present = [p for p in state.layout.bucket_params(bucket.name) if p.name in incoming]
        if present:
            flat = state.full_values(bucket)
            for param in present:
                state.view(flat, param).copy_(incoming[param.name])
            state.write(bucket, flat, present)


def _check(own: Mapping[str, Any], given: Mapping[str, Any], strict: bool) -> None:
    problems = []
    missing, unexpected = [k for k in own if k not in given], [k for k in given if k not in own]
    if strict and missing:
        problems.append(f"missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    if strict and unexpected:
        problems.append(
            f"unexpected: {', '.join(unexpected[:5])}{' ...' if len(unexpected) > 5 else ''}"
        )
    for key in own:
        ours, theirs = own[key], given.get(key)
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape != theirs.shape:
            problems.append(f"{key} has shape {list(theirs.shape)}, the model {list(ours.shape)}")
    if problems:
        raise PlanError(
            "the state dict does not fit the model; nothing was loaded\n  " + "\n  ".join(problems)
        )


@torch.no_grad()
def give_back(state: State) -> None:
    """Give every parameter a full storage of its own again, with its values."""
    state.ahead.settle()
    for bucket in state.layout.buckets.values():
        flat = state.full_values(bucket)
        for param in state.layout.bucket_params(bucket.name):
            view = state.view(flat, param).to(param.model_dtype)
            parameter = state.parameters[param.name]
            parameter.data = view.clone(memory_format=torch.preserve_format)
            del parameter._zerograph_state  # type: ignore[attr-defined]
