"""What is particular to models of transformers when they are captured.

`output_hidden_states=True`, `output_attentions=True` and `output_router_logits=True` are served by
forward hooks that transformers installs inside the first forward that asks for them, under a lock
that dynamo cannot enter. They are installed ahead of the capture instead, as one eager forward would.
"""

import sys
from typing import Any

from torch import nn

from zerograph import compat

_LOCK = "_hook_installation_lock"


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> compat.Captured:
    """`compat.capture`; once more, with the hooks of recorded outputs, if the forward asks for them."""
    try:
        return compat.capture(model, args, kwargs)
    except compat.DynamoError as error:
        if _LOCK not in str(error) or not install_recorders(model):
            raise
    return compat.capture(model, args, kwargs)


def install_recorders(model: nn.Module) -> bool:
    """Install the hooks that record outputs on every model of transformers in `model`.

    Hooks that nobody asks record nothing. Answers whether any was installed: a model that has them
    already, or holds one that has, is left as it is.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False
    from transformers.utils import output_capturing

    installed = False
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(
            map(_installed, module.modules())
        ):
            output_capturing.maybe_install_capturing_hooks(module)
            installed = True
    return installed


def _installed(module: nn.Module) -> bool:
    return getattr(module, "_output_capturing_hooks_installed", False)
