"""Mixtures of experts, with and without the losses of their routers."""

from functools import partial
from typing import Any

from tests.zoo.family import TEXT, Family, from_config, text
from tests.zoo.seq2seq import T5

MOE = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
LATENT = {
    **TEXT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}


def _experts(
    name: str, shape: dict[str, Any], note: str = "", label: str = "", **changes: Any
) -> Family:
    build = partial(from_config, "CausalLM", name, shape, **changes)
    return Family(label or name, build, text, note)


def _routed(name: str, shape: dict[str, Any], **changes: Any) -> Family:
    note = "`output_router_logits=True`: the routers' balancing loss is in the loss"
    return _experts(
        name, shape, note, f"{name} with router loss", output_router_logits=True, **changes
    )


OLMOE = {**MOE, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {**MOE, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {**OLMOE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}

FAMILIES = [
    _routed("mixtral", LOCAL),
    _experts("olmoe", OLMOE),
    _routed("olmoe", OLMOE),
    _experts("qwen2_moe", QWEN, "a shared expert"),
    _routed("qwen3_moe", QWEN),
    _experts("deepseek_v2", LATENT, "latent attention"),
    _experts("deepseek_v3", LATENT, "latent attention"),
    _experts("phimoe", LOCAL),
    _routed("phimoe", LOCAL),
    _experts("gpt_oss", LOCAL, "attention sinks", sliding_window=8),
    _routed("gpt_oss", LOCAL, sliding_window=8),
    _experts("granitemoe", LOCAL),
    Family(
        "switch_transformers",
        partial(from_config, "Seq2SeqLM", "switch_transformers", T5, num_experts=4),
        text,
        "a Python loop over the experts that have tokens",
    ),
]
