"""Real text that every machine has: the source of Python's own standard library, as bytes.

text = read()                          # about 4 MB, the same for the same Python
train, held_out = split(text)
dataset = Windows(train, length=128)   # {"input_ids", "labels"}, one token per byte
"""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = 256


def read(limit: int = 4_000_000) -> Tensor:
    """The top-level modules of the standard library, in order of name, at most `limit` bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes().replace(b"\r\n", b"\n")
        if len(text) >= limit:
            break
    if len(text) < 100_000:
        raise RuntimeError(
            f"{folder} holds {len(text)} bytes of Python source, too few to train on"
        )
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def split(text: Tensor, share: float = 0.05) -> tuple[Tensor, Tensor]:
    """The first part to train on, and the last `share` to measure with."""
    cut = int(len(text) * (1 - share))
    return text[:cut], text[cut:]


def decode(tokens: Tensor) -> str:
    """Tokens back to text; what is not UTF-8, and control codes, show as a replacement character."""
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of `length` bytes. Labels are the inputs; a causal model shifts them."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.text = text
        self.length = length

    def __len__(self) -> int:
        return len(self.text) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = self.text[index * self.length : (index + 1) * self.length].long()
        return {"input_ids": tokens, "labels": tokens}
