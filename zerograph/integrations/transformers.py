"""What is particular to models of transformers when they are captured.

`output_hidden_states=True`, `output_attentions=True` and `output_router_logits=True` are served by
forward hooks that transformers installs inside the first forward that asks for them, under a lock
that dynamo cannot enter. They are installed ahead of the capture instead, as one eager forward would.

The feature encoders of speech models ask for the gradient of their input, for the sake of gradient
checkpointing; no parameter's gradient depends on it, and it is left out.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zerograph import compat

_LOCK = "_hook_installation_lock"


_CHANGES = (
    (
        "labels.max() >= self.config.vocab_size",
        "call the model without `labels`, and compute torch.nn.functional.ctc_loss from its logits",
    ),
    (
        "_split_into_blocks(attention_mask",
        "give the model an `attention_mask` (of ones): it makes none while it is compiled",
    ),
    (
        "config_to_return = copy.deepcopy",
        "set model.config.use_cache = False, which training does not need, or take a torch that can trace "
        "this copy (2.11 cannot)",
    ),
    (
        "position_bias.requires_grad = True",
        "call the model's gradient_checkpointing_disable(); with it this family (t5, mt5, longt5, udop, ...) "
        "asks for the gradient of a tensor inside the forward",
    ),
)
"""A phrase in what dynamo says of a model of transformers, and what to change."""


def changes(model: nn.Module, said: str) -> list[str]:
    """What to change in a model of transformers of whose capture dynamo said `said`."""
    looped = any(
        isinstance(module, nn.ModuleDict) and type(module).__name__.endswith("Experts")
        for module in model.modules()
    )
    found = [change for phrase, change in _CHANGES if phrase in said]
    if looped and not found:
        found.append(
            "its experts are a Python loop over those that have tokens, which depends on the data; take a "
            "family whose experts are one tensor (mixtral, olmoe, qwen3_moe, deepseek_v3, gpt_oss, ...)"
        )
    return found


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> compat.Captured:
    """`compat.capture`; once more, with the hooks of recorded outputs, if the forward asks for them."""
    with _without_input_gradients(model):
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


@contextmanager
def _without_input_gradients(model: nn.Module) -> Iterator[None]:
    """Within, feature encoders (wav2vec2, hubert, wavlm) leave `requires_grad` of their input alone."""
    asking = [
        module
        for module in model.modules()
        if type(module).__module__.startswith("transformers.")
        and vars(module).get("_requires_grad") is True
    ]
    for module in asking:
        vars(module)["_requires_grad"] = False
    try:
        yield
    finally:
        for module in asking:
            vars(module)["_requires_grad"] = True


def _installed(module: nn.Module) -> bool:
    return getattr(module, "_output_capturing_hooks_installed", False)
