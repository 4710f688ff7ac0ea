"""The precision policy: which dtype each value of a training step has.

fp32 (the default)   parameters, gradients and optimizer states are float32
bf16.enabled         parameters and activations bf16; gradients are reduced in bf16 and accumulated
                     in fp32; the optimizer works on fp32 master shards (ZeRO section 3.1's
                     "mixed precision": 2 + 2 + 12 bytes a parameter, here 2 + 4 + 12, since
                     gradients are kept in fp32)
fp16.enabled         the same in fp16, with the loss scaled (arXiv:1710.03740 section 3.2)

With bf16 and fp16 a step whose gradients are not finite is skipped on every rank (for bf16 unless
`bf16.check_grad_overflow` is false). `communication_data_type` and `data_types.grad_accum_dtype` say
in which dtype gradients are reduced and kept instead. `torch_autocast` puts the forward under
`torch.autocast`, and leaves parameters, gradients and states as they are.

The policy is decided once, from the config and the module, and printed with every plan.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from zerograph.config import ZeroConfig


@dataclass(frozen=True)
class Precision:
    """What dtype a step computes, reduces, accumulates and updates in."""

    compute: torch.dtype | None
    """Dtype that trainable and frozen floating parameters are cast to; None keeps the model's."""
    pinned: frozenset[str]
    """Parameters that keep float32 although `compute` is lower."""
    communicate: torch.dtype | None = None
    """Dtype in which gradients are reduced; None for that of their bucket."""
    keep: torch.dtype | None = None
    """Dtype in which gradients are kept between backward and step; None for at least float32."""
    autocast: torch.dtype | None = None
    """Dtype of the `torch.autocast` that the forward runs under; None for that of the caller."""
    skips: bool = False
    """Whether a step whose gradient norm is not finite changes nothing."""

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled, so that small gradients do not underflow."""
        return self.compute is torch.float16

    def around_forward(self, device: torch.device) -> AbstractContextManager[object]:
        """The autocast of the forward."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)

    def parameter(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which parameter `name`, stored as `dtype` in the model, is gathered."""
        if self.compute is None or not dtype.is_floating_point:
            return dtype
        return torch.float32 if name in self.pinned else self.compute

    def input(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to which a tensor input of `dtype` is cast before the forward."""
        if self.compute is None or not dtype.is_floating_point:
            return dtype
        return self.compute

    def reduce(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of a bucket of `dtype` are reduced over ranks."""
        return self.communicate or dtype

    def accumulate(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients are kept between backward and step."""
        return self.keep or self.master(dtype)

    def master(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the shard that the optimizer updates."""
        return torch.float32 if dtype.itemsize < 4 else dtype

    def describe(self) -> str:
        """One line for the head of a plan."""
        kept = short(self.keep or torch.float32)
        cast = f", autocast to {short(self.autocast)}" if self.autocast else ""
        if self.compute is None and self.communicate is None and self.keep is None:
            return f"as the model{cast}; gradients and optimizer states at least fp32"
        if self.compute is None:
            reduced = f"reduced in {short(self.communicate)}, " if self.communicate else ""
            how = f"gradients {reduced}kept in {kept}"
            return f"as the model{cast}; {how}; optimizer states at least fp32"
        reduced = short(self.communicate or self.compute)
        pinned = f", {len(self.pinned)} parameters pinned to fp32" if self.pinned else ""
        scaled = ", scaled loss" if self.scaled else ""
        skips = "skipped" if self.skips else "applied"
        return (
            f"{short(self.compute)} compute{scaled}, gradients reduced in {reduced} and kept in {kept}, "
            f"fp32 master{pinned}; steps that are not finite are {skips}"
        )


SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
"""How canonical text spells each dtype."""


def short(dtype: torch.dtype) -> str:
    """The dtype's name in canonical text: `f32`, `bf16`, `i64`."""
    return SHORT.get(dtype, str(dtype).removeprefix("torch."))


_NAMED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision_of(model: nn.Module, config: ZeroConfig) -> Precision:
    """The policy that `config` asks for on `model`."""
    low = None if config.precision == "fp32" else _NAMED[config.precision]
    return Precision(
        compute=low,
        pinned=frozenset(_pinned(model)) if low else frozenset(),
        communicate=_named(config.communication_data_type),
        keep=_named(config.data_types.grad_accum_dtype),
        autocast=torch.bfloat16 if config.torch_autocast.enabled else None,
        skips=config.fp16.enabled or (config.bf16.enabled and config.bf16.check_grad_overflow),
    )


def _named(name: str | None) -> torch.dtype | None:
    return None if name is None else _NAMED[name]


def _pinned(model: nn.Module) -> Iterator[str]:
    """Parameters kept in fp32 under bf16 and fp16.

    BatchNorm, whose running statistics are fp32 and whose kernels refuse a lower dtype beside them,
    and what a transformers model lists in `_keep_in_fp32_modules_strict`.
    """
    strict = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for module_name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        listed = any(part in strict for part in module_name.split("."))
        if batch_norm or listed:
            for name, _ in module.named_parameters(prefix=module_name, recurse=listed):
                yield name
