"""The `scheduler` section: the shape of the learning rate over steps, and its parameters.

Only the parameters are here; the functions that turn a step into a learning rate are not.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from zerograph.config.base import Integer, NotNegative, Positive, Section

WarmupType = Literal["log", "linear"]


class WarmupLRParams(Section):
    """From `warmup_min_lr` up to `warmup_max_lr` (the optimizer's own when null), then flat."""

    warmup_min_lr: NotNegative = 0.0
    warmup_max_lr: NotNegative | None = None
    warmup_num_steps: Positive = 1000
    warmup_type: WarmupType = "log"
    last_batch_iteration: Integer = -1


class WarmupDecayLRParams(Section):
    """From `warmup_min_lr` up to `warmup_max_lr`, then a line down to 0 at `total_num_steps`."""

    total_num_steps: Positive
    warmup_min_lr: NotNegative = 0.0
    warmup_max_lr: NotNegative | None = 0.001
    warmup_num_steps: Positive = 1000
    warmup_type: WarmupType = "log"
    last_batch_iteration: Integer = -1


class WarmupCosineLRParams(Section):
    """Ratios of the optimizer's own rate: up from `warmup_min_ratio` to 1, then a cosine down."""

    total_num_steps: Positive
    warmup_min_ratio: NotNegative = 0.0
    warmup_num_steps: Positive = 1000
    cos_min_ratio: NotNegative = 0.0001
    warmup_type: WarmupType = "log"
    last_batch_iteration: Integer = -1


class WarmupLR(Section):
    """The `scheduler` section when its type is WarmupLR."""

    type: Literal["WarmupLR"]
    params: WarmupLRParams = WarmupLRParams()


class WarmupDecayLR(Section):
    """The `scheduler` section when its type is WarmupDecayLR."""

    type: Literal["WarmupDecayLR"]
    params: WarmupDecayLRParams


class WarmupCosineLR(Section):
    """The `scheduler` section when its type is WarmupCosineLR."""

    type: Literal["WarmupCosineLR"]
    params: WarmupCosineLRParams


def _tag(data: object) -> str | None:
    kind = data.get("type") if isinstance(data, dict) else getattr(data, "type", None)
    return kind if isinstance(kind, str) else None


Scheduler = Annotated[
    Annotated[WarmupLR, Tag("WarmupLR")]
    | Annotated[WarmupDecayLR, Tag("WarmupDecayLR")]
    | Annotated[WarmupCosineLR, Tag("WarmupCosineLR")],
    Discriminator(_tag),
]
SCHEDULER_TAGS: dict[str, type[Section]] = {
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
}
