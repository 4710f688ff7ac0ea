"""Text encoders with a head for masked tokens."""

from functools import partial
from typing import Any

from tests.zoo.family import TEXT, Family, from_config, text


def _encoder(name: str, note: str = "", **changes: Any) -> Family:
    return Family(name, partial(from_config, "MaskedLM", name, TEXT, **changes), text, note)


FAMILIES = [
    _encoder("roberta"),
    _encoder("distilbert", n_layers=2, n_heads=4, dim=32, hidden_dim=64),
    _encoder("albert", "one layer's weights used twice", embedding_size=16),
    _encoder("electra", embedding_size=16),
    _encoder("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("modernbert", global_attn_every_n_layers=2, local_attention=8),
    _encoder("xlm-roberta"),
    _encoder("mpnet"),
    _encoder("fnet", "Fourier transforms instead of attention"),
    _encoder("esm", "proteins", mask_token_id=3, position_embedding_type="rotary"),
]
