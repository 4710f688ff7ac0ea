"""Models that are not transformers': convolutions, a recurrence, diffusion, adapters."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import ConvNet
from tests.zoo.family import TEXT, Batch, Family, from_config, generator, images, text


class Recurrent(nn.Module):
    """An LSTM language model; the embedding is the head's weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 128, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden, _ = self.lstm(self.embed(input_ids))
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Block(nn.Module):
    """GroupNorm and convolution twice, the time embedding between, and attention over the pixels."""

    def __init__(self, inside: int, outside: int, time: int, attend: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inside), nn.GroupNorm(4, outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        self.attention = nn.MultiheadAttention(outside, 4, batch_first=True) if attend else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        hidden = self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))
        if self.attention is not None:
            pixels = hidden.flatten(2).transpose(1, 2)
            mixed, _ = self.attention(pixels, pixels, pixels, need_weights=False)
            hidden = hidden + mixed.transpose(1, 2).reshape(hidden.shape)
        return hidden


class UNet(nn.Module):
    """Predicts the noise in an image at a time of the diffusion."""

    def __init__(self, widths: tuple[int, ...] = (8, 16), time: int = 16) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.exp(-math.log(1e4) * torch.arange(8) / 8))
        self.embed = nn.Sequential(nn.Linear(16, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = list(zip(widths, (*widths[1:], widths[-1])))
        self.down = nn.ModuleList(Block(a, b, time, b == widths[-1]) for a, b in pairs)
        self.shrink = nn.ModuleList(nn.Conv2d(b, b, 3, stride=2, padding=1) for _, b in pairs)
        self.middle = Block(widths[-1], widths[-1], time, True)
        self.up = nn.ModuleList(Block(2 * b, a, time, False) for a, b in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, noisy: Tensor, time: Tensor, noise: Tensor) -> dict[str, Tensor]:
        angles = time[:, None] * self.frequencies
        when = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        hidden, skips = self.stem(noisy), []
        for block, shrink in zip(self.down, self.shrink):
            skips.append(block(hidden, when))
            hidden = shrink(skips[-1])
        hidden = self.middle(hidden, when)
        for block in self.up:
            hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
            hidden = block(torch.cat([hidden, skips.pop()], 1), when)
        guess = self.head(hidden)
        return {"loss": F.mse_loss(guess, noise), "noise": guess}


def _diffusion(seed: int) -> Batch:
    source = generator(seed)
    noisy, noise = (torch.randn(2, 3, 16, 16, generator=source) for _ in range(2))
    return {"noisy": noisy, "time": torch.rand(2, generator=source) * 1000, "noise": noise}


def _channels_last() -> nn.Module:
    return ConvNet().to(memory_format=torch.channels_last)


def _pixels(seed: int) -> Batch:
    batch = images()(seed)
    pixels = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
    return {"pixels": pixels, "labels": batch["labels"]}


def _adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    base: Any = from_config("CausalLM", "llama", TEXT, num_key_value_heads=2)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(base, config)


FAMILIES = [
    Family("convnet channels_last", _channels_last, _pixels, "BatchNorm, channels_last weights"),
    Family("lstm", Recurrent, text, "`nn.LSTM`, tied embedding"),
    Family("unet", UNet, _diffusion, "diffusion: GroupNorm, attention, time embedding"),
    Family("peft lora", _adapted, text, "LoRA on a frozen llama"),
]
