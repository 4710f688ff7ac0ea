"""Encoder-decoders of text."""

from functools import partial
from typing import Any

import torch

from tests.zoo.family import Family, from_config, text

BART = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def _pair(name: str, shape: dict[str, Any], note: str = "", **changes: Any) -> Family:
    return Family(name, partial(from_config, "Seq2SeqLM", name, shape, **changes), text, note)


FAMILIES = [
    _pair("bart", BART),
    _pair("mbart", BART),
    _pair("pegasus", BART),
    _pair("marian", BART),
    _pair("m2m_100", BART),
    _pair("mt5", T5),
    _pair("umt5", T5),
    Family(
        "longt5",
        partial(from_config, "Seq2SeqLM", "longt5", T5, local_radius=4),
        lambda seed: {**text(seed), "attention_mask": torch.ones(2, 16, dtype=torch.long)},
        "with `attention_mask`: the forward makes none while it is compiled",
    ),
]
