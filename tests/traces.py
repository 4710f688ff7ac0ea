"""One capture for several engines, in tests of what comes behind it.

A capture is most of a compile's time, and engines of the same model at other stages capture the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from zerograph.runtime import planner
from zerograph.template import dissect
from zerograph.trace import Trace, trace


@contextmanager
def captured_once() -> Iterator[None]:
    """Engines of models that are made alike capture each kind of call once while this is open.

    What tells calls apart: the model's class and mode, the layout, precision and the shapes of what is given.
    A model whose code holds tensors of its own is captured each time.
    """
    kept: dict[str, Trace] = {}

    def known(
        model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
    ) -> Trace:
        tensors, _ = dissect((args, kwargs))
        given = [(path, tuple(t.shape), t.dtype, t.requires_grad) for path, t in tensors]
        modes = [module.training for module in model.modules()]
        key = repr((type(model), modes, given, options))
        found = kept.get(key) or trace(model, args, kwargs, **options)
        if not found.constants:
            kept[key] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "trace", known)
        yield
