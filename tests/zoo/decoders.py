"""Decoders that predict the next token."""

from functools import partial
from typing import Any

from tests.zoo.family import TEXT, Family, from_config, text


def _decoder(name: str, note: str = "", **changes: Any) -> Family:
    return Family(name, partial(from_config, "CausalLM", name, TEXT, **changes), text, note)


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

FAMILIES = [
    _decoder("qwen2", num_key_value_heads=2),
    _decoder("qwen3", **GROUPED),
    _decoder("gemma2", "soft-capped logits, sliding windows", sliding_window=8, **GROUPED),
    _decoder("gemma3_text", sliding_window=8, **GROUPED),
    _decoder("mistral", "sliding windows", sliding_window=8, **GROUPED),
    _decoder("phi"),
    _decoder("phi3"),
    _decoder("opt", ffn_dim=64, word_embed_proj_dim=32),
    _decoder("bloom", "ALiBi", n_layer=2, n_head=4),
    _decoder("gpt_neox"),
    _decoder("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    _decoder("falcon"),
    _decoder("olmo2"),
    _decoder("smollm3", num_key_value_heads=2),
    _decoder("granite", num_key_value_heads=2),
    _decoder("glm", **GROUPED),
    _decoder("cohere", num_key_value_heads=2),
    _decoder("starcoder2", num_key_value_heads=2),
    _decoder("stablelm", num_key_value_heads=2),
]
