"""Access to full values: gathered parameters, state dicts, gradients. Each call is for all ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zerograph.errors import PlanError
from zerograph.runtime.state import State, clear, named_buffers


@contextmanager
def gathered(state: State, names: set[str], modifier_rank: int | None = None) -> Iterator[None]:
    """The named parameters with their full values in the module; changes are kept at the end.

    Every rank must make the same changes, unless `modifier_rank` names the one whose values are taken.
    """
    buckets = [b for b in state.layout.buckets.values() if names & set(b.params)]
    flats = {bucket.name: state.full_values(bucket) for bucket in buckets}
    shown: dict[str, Tensor] = {}
    for bucket in buckets:
        for param in state.layout.bucket_params(bucket.name):
            if param.name in names:
                view = state.view(flats[bucket.name], param)
                value = view.to(param.model_dtype)
                parameter = state.parameters[param.name]
                shown[param.name] = value.clone() if value is not view else value
                with torch.no_grad():
                    parameter.data = value.to(parameter.device)
    try:
        yield
    finally:
        for bucket in buckets:
            _write_back(state, bucket.name, flats[bucket.name], shown, modifier_rank)
        for name in names:
            clear(state.parameters[name], state.layout.params[name])


@torch.no_grad()
def _write_back(
    state: State, bucket: str, flat: Tensor, shown: Mapping[str, Tensor], modifier: int | None
) -> None:
    for param in state.layout.bucket_params(bucket):
        if param.name not in shown:
            continue
        now = state.parameters[param.name].detach()
        if tuple(now.shape) != param.shape:
            raise PlanError(
                f"{param.name} was given shape {list(now.shape)} inside gathered(); it must keep "
                f"{list(param.shape)}"
            )
        view = state.view(flat, param)
        if now.data_ptr() == view.data_ptr() and now.dtype == view.dtype:
            continue
        now = now.to(view.device)
        if now.dtype == view.dtype:
            view.copy_(now)
        else:  # shown in a lower precision than it is kept in: take what was changed alone
            changed = now != shown[param.name].to(now.device)
            view.copy_(torch.where(changed, now.to(view.dtype), view))
    if modifier is not None:
        state.world.broadcast(flat, modifier)
    state.write(state.layout.buckets[bucket], flat)


def gradients(state: State, used: set[str], divisor: float) -> dict[str, Tensor | None]:
    """Full mean gradients over `divisor` by name; None where there is none."""
    found: dict[str, Tensor | None] = {}
    for bucket in state.layout.trainable_buckets():
        flat = state.full_gradient(bucket)
        if flat is not None and divisor != 1.0:
            flat.div_(divisor)
        for param in state.layout.bucket_params(bucket.name):
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
            state.write(bucket, flat)


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
    for bucket in state.layout.buckets.values():
        flat = state.full_values(bucket)
        for param in state.layout.bucket_params(bucket.name):
            view = state.view(flat, param).to(param.model_dtype)
            parameter = state.parameters[param.name]
            parameter.data = view.clone(memory_format=torch.preserve_format)
            del parameter._zerograph_state  # type: ignore[attr-defined]
