"""Plan a Llama for 64 ranks on one machine without any of them, and see what the stage changes.

python examples/inspect_plan.py [--layers 2] [--ranks 64]
"""

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zerograph


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan a Llama without ranks, devices or weights.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=64)
    args = parser.parse_args()

    stage2, stage3 = (plan(stage, args.layers, args.ranks) for stage in (2, 3))
    print(stage3.short(), end="\n\n")
    print(stage3.text(skeleton=True), end="\n\n")
    print("What stage 3 changes against stage 2")
    print(stage2.diff(stage3, skeleton=True))


def plan(stage: int, layers: int, ranks: int) -> zerograph.Plan:
    """The plan of one training step. Nothing is allocated: the model is on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=1024,
                intermediate_size=2816,
                num_hidden_layers=layers,
                use_cache=False,
            )
        )
        tokens = torch.empty(1, 512, dtype=torch.long)
    return zerograph.plan(
        model,
        config(stage),
        example_inputs={"input_ids": tokens, "labels": tokens},
        world_size=ranks,
    )


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "zero_optimization": {"stage": stage},
    }


if __name__ == "__main__":
    main()
