"""Parameters shown with their full values for a while: what `zerograph.gathered` does on one engine.

    fresh names      their buckets are gathered; at the end what was changed is written to the slices
    names shown already by an outer `gathered`      left to it; it writes them back

If the body raises, nothing is written. While any is shown, what would change the slices under it
(`engine.step()`, loading, another layout) is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from zerograph.errors import PlanError
from zerograph.layout import Bucket, Param
from zerograph.runtime.state import State, clear


@contextmanager
def shown(state: State, names: set[str], modifier_rank: int | None = None) -> Iterator[None]:
    """The named parameters with their full values in the module; changes are kept at the end.

    Every rank must make the same changes, unless `modifier_rank` names the one whose values are taken.
    """
    fresh, again = names - state.shown, names & state.shown
    buckets = [b for b in state.layout.buckets.values() if fresh & set(b.params)]
    flats = {bucket.name: state.full_values(bucket) for bucket in buckets}
    before = {name: _show(state, param, flats) for name, param in _params(state, fresh).items()}
    state.shown |= fresh
    try:
        yield
        for bucket in buckets:
            _write_back(state, bucket, flats[bucket.name], before, modifier_rank)
        if modifier_rank is not None:
            for name in _params(state, again):
                _take(state, name, modifier_rank)
    finally:
        state.shown -= fresh
        for name, param in _params(state, fresh).items():
            clear(state.parameters[name], param)


def require_hidden(state: State, what: str) -> None:
    """Raise PlanError if parameters are shown: `what` would be undone, or would undo their changes."""
    if state.shown:
        raise PlanError(f"{what} within zerograph.gathered; leave the `with` block first")


def _params(state: State, names: set[str]) -> dict[str, Param]:
    """The parameters of these names, in the order of the layout: the same on every rank."""
    return {name: param for name, param in state.layout.params.items() if name in names}


@torch.no_grad()
def _show(state: State, param: Param, flats: dict[str, Tensor]) -> Tensor:
    """Put a parameter's value into the module; answers it, as a copy if it is no view of the bucket."""
    parameter = state.parameters[param.name]
    view = state.view(flats[param.bucket], param)
    value = view.to(param.model_dtype)
    parameter.data = value.to(parameter.device)
    return value.clone() if value is not view else value


@torch.no_grad()
def _write_back(
    state: State, bucket: Bucket, flat: Tensor, before: dict[str, Tensor], modifier: int | None
) -> None:
    params = [p for p in state.layout.bucket_params(bucket.name) if p.name in before]
    for param in params:
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
            changed = now != before[param.name].to(now.device)
            view.copy_(torch.where(changed, now.to(view.dtype), view))
    if modifier is not None:
        state.world.broadcast(flat, modifier)
    state.write(bucket, flat, params)


@torch.no_grad()
def _take(state: State, name: str, modifier: int) -> None:
    """Give a parameter that an outer block shows the values of one rank."""
    parameter = state.parameters[name]
    value = parameter.detach().to(state.world.device).contiguous()
    state.world.broadcast(value, modifier)
    parameter.copy_(value)
