"""The `optimizer` section: which update rule, and its parameters.

`Adam` and `AdamW` are one section: as in DeepSpeed, `Adam` means decoupled weight decay (AdamW)
unless `adam_w_mode` is false; ask `optimizer.decoupled`. `SGD` and `Adagrad` are torch's, `Lion` and
`Lamb` have DeepSpeed's defaults. The type is read in any case and kept in the spelling of CANONICAL.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from zerograph.config.base import NotNegative, Number, Section

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]

CANONICAL = {
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "lion": "Lion",
    "lamb": "Lamb",
}
TORCH_ADAMW_WEIGHT_DECAY = 0.01


def _canonical(value: object) -> object:
    return CANONICAL.get(value.lower(), value) if isinstance(value, str) else value


class AdamParams(Section):
    """Adam's parameters, with the defaults of DeepSpeed's fused Adam."""

    lr: NotNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.0
    adam_w_mode: bool = True
    torch_adam: bool = False
    bias_correction: bool = True
    amsgrad: bool = False
    maximize: bool = False
    differentiable: bool = False
    set_grad_none: bool = True
    fp32_optimizer_states: bool = True
    capturable: bool = False
    foreach: bool | None = None
    fused: bool | None = None


class SgdParams(Section):
    """The parameters of torch's SGD, with torch's defaults."""

    lr: NotNegative = 1e-3
    momentum: NotNegative = 0.0
    dampening: Number = 0.0
    weight_decay: NotNegative = 0.0
    nesterov: bool = False
    maximize: bool = False
    differentiable: bool = False
    foreach: bool | None = None
    fused: bool | None = None

    @model_validator(mode="after")
    def _nesterov(self) -> "SgdParams":
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov=true needs momentum above 0 and dampening 0, got "
                f"momentum={self.momentum} and dampening={self.dampening}"
            )
        return self


class AdagradParams(Section):
    """The parameters of torch's Adagrad, which DeepSpeed makes, with its defaults."""

    lr: NotNegative = 1e-2
    lr_decay: NotNegative = 0.0
    eps: NotNegative = 1e-10
    weight_decay: NotNegative = 0.0
    initial_accumulator_value: NotNegative = 0.0
    maximize: bool = False
    differentiable: bool = False
    fp32_optimizer_states: bool = True
    foreach: bool | None = None
    fused: bool | None = None


class LionParams(Section):
    """Lion's parameters, with the defaults of DeepSpeed's fused Lion."""

    lr: NotNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    set_grad_none: bool = True
    fp32_optimizer_states: bool = True


class LambParams(Section):
    """LAMB's parameters, with the defaults of DeepSpeed's fused Lamb.

    Moments are corrected before the norms are taken, as in arXiv:1904.00962 algorithm 2; DeepSpeed's
    corrects the step after them. They agree where `bias_correction` is false.
    """

    lr: NotNegative = 1e-3
    bias_correction: bool = True
    betas: Betas = (0.9, 0.999)
    eps: Above0 = 1e-8
    eps_inside_sqrt: bool = False
    weight_decay: NotNegative = 0.0
    max_coeff: Above0 = 10.0
    min_coeff: NotNegative = 0.01

    @model_validator(mode="after")
    def _bounds(self) -> "LambParams":
        if self.min_coeff > self.max_coeff:
            raise ValueError(
                f"the trust ratio is kept within min_coeff and max_coeff, so min_coeff must be at most "
                f"max_coeff, got min_coeff={self.min_coeff} and max_coeff={self.max_coeff}"
            )
        return self


class AdamOptimizer(Section):
    """The `optimizer` section when its type is Adam or AdamW."""

    type: Annotated[Literal["Adam", "AdamW"], BeforeValidator(_canonical)]
    params: AdamParams = AdamParams()
    legacy_fusion: bool = False

    @property
    def decoupled(self) -> bool:
        """Whether weight decay acts on the parameter (AdamW), not on the gradient (L2)."""
        return self.type == "AdamW" or self.params.adam_w_mode

    @model_validator(mode="before")
    @classmethod
    def _torch_weight_decay(cls, data: object) -> object:
        """`torch_adam` makes DeepSpeed use torch's AdamW, whose weight decay defaults to 0.01."""
        params = data.get("params") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(params, dict):
            return data
        decoupled = _canonical(data.get("type")) == "AdamW" or params.get("adam_w_mode", True)
        if params.get("torch_adam") is True and decoupled and "weight_decay" not in params:
            return data | {"params": params | {"weight_decay": TORCH_ADAMW_WEIGHT_DECAY}}
        return data

    @model_validator(mode="after")
    def _one_mode(self) -> "AdamOptimizer":
        if self.type == "AdamW" and not self.params.adam_w_mode:
            raise ValueError(
                "type 'AdamW' has decoupled weight decay, so params.adam_w_mode=false has no "
                "effect; for L2 regularization give type 'Adam' with adam_w_mode false"
            )
        return self


class SgdOptimizer(Section):
    """The `optimizer` section when its type is SGD."""

    type: Annotated[Literal["SGD"], BeforeValidator(_canonical)]
    params: SgdParams = SgdParams()
    legacy_fusion: bool = False


class AdagradOptimizer(Section):
    """The `optimizer` section when its type is Adagrad."""

    type: Annotated[Literal["Adagrad"], BeforeValidator(_canonical)]
    params: AdagradParams = AdagradParams()
    legacy_fusion: bool = False


class LionOptimizer(Section):
    """The `optimizer` section when its type is Lion."""

    type: Annotated[Literal["Lion"], BeforeValidator(_canonical)]
    params: LionParams = LionParams()
    legacy_fusion: bool = False


class LambOptimizer(Section):
    """The `optimizer` section when its type is Lamb."""

    type: Annotated[Literal["Lamb"], BeforeValidator(_canonical)]
    params: LambParams = LambParams()
    legacy_fusion: bool = False


def _tag(data: object) -> str | None:
    """Pick the class by type; an unknown type is its own tag, which pydantic then refuses."""
    kind = data.get("type") if isinstance(data, dict) else getattr(data, "type", None)
    if not isinstance(kind, str):
        return None
    canonical = str(_canonical(kind))
    return {"AdamW": "adam"}.get(
        canonical, canonical.lower() if canonical in CANONICAL.values() else kind
    )


Optimizer = Annotated[
    Annotated[AdamOptimizer, Tag("adam")]
    | Annotated[SgdOptimizer, Tag("sgd")]
    | Annotated[AdagradOptimizer, Tag("adagrad")]
    | Annotated[LionOptimizer, Tag("lion")]
    | Annotated[LambOptimizer, Tag("lamb")],
    Discriminator(_tag),
]
OPTIMIZER_TAGS: dict[str, type[Section]] = {
    "adam": AdamOptimizer,
    "sgd": SgdOptimizer,
    "adagrad": AdagradOptimizer,
    "lion": LionOptimizer,
    "lamb": LambOptimizer,
}
