"""State-space models and hybrids of them with attention."""

from functools import partial
from typing import Any

from tests.zoo.experts import MOE
from tests.zoo.family import TEXT, Family, from_config, text


def _model(name: str, shape: dict[str, Any], note: str = "", **changes: Any) -> Family:
    return Family(name, partial(from_config, "CausalLM", name, shape, **changes), text, note)


MAMBA = {**TEXT, "state_size": 8, "conv_kernel": 4, "expand": 2, "use_mambapy": False}

FAMILIES = [
    _model("mamba", MAMBA, "a sequential scan", time_step_rank=4),
    _model("falcon_mamba", MAMBA, time_step_rank=4),
    _model("mamba2", MAMBA, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    _model(
        "jamba",
        MOE,
        "mamba, attention and experts",
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
]
