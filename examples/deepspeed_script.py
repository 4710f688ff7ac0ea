"""A DeepSpeed training script with one name changed.

    python examples/deepspeed_script.py --deepspeed_config examples/zero3.json
    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/deepspeed_script.py \\
        --deepspeed_config examples/zero3.json
"""

import argparse

import corpus
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import zerograph


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on bytes of Python source.")
    parser.add_argument("--steps", type=int, default=20)
    parser = zerograph.add_config_arguments(parser)
    args = parser.parse_args()

    zerograph.init_distributed()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=corpus.VOCABULARY,
            n_positions=128,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    dataset = corpus.Windows(corpus.read(), length=64)

    engine, _, loader, scheduler = zerograph.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=dataset
    )

    for step, batch in zip(range(1, args.steps + 1), loader, strict=False):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        if engine.world.rank == 0 and (step == 1 or step % 5 == 0):
            rate = f"  rate {scheduler.get_last_lr()[0]:.2e}" if scheduler else ""
            print(f"step {step:>3}  loss {loss.item():.3f}{rate}", flush=True)


if __name__ == "__main__":
    main()
