"""Loss curves in fp16 and bf16 beside fp32, and beside fully_shard with the same policy.

    python benchmarks/precision.py [--steps 200] [--json FILE]

A Llama of 0.9 million parameters learns the demo's text on two ranks at stage 3, from the same weights
and batches in every run: fp32, then fp16 and bf16, each here and under fully_shard. In fp16 both start from
a loss scale of 2^10, which is dynamic here and fixed there. A run's band is how far its curve, in
means of ten steps, goes from the fp32 one of the same system. Exits 1 if a band of ours is wider than
fully_shard's by more than `SLACK`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import zerograph

HERE = Path(__file__).resolve().parent

LENGTH, ROWS, POWER, WINDOW = 64, 4, 10, 10
SLACK = 0.02
"""Nats: half a per cent of the loss at the start, and less than two runs of other seeds differ by."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def batches(rank: int, steps: int) -> list[torch.Tensor]:
    sys.path.append(str(HERE.parent / "examples"))
    import corpus

    text, _ = corpus.split(corpus.read())
    generator = torch.Generator().manual_seed(rank)
    starts = torch.randint(len(text) - LENGTH, (steps, ROWS), generator=generator)
    return [torch.stack([text[s : s + LENGTH] for s in row]).long() for row in starts.tolist()]


def zerograph_run(precision: str, data: list[torch.Tensor]) -> tuple[list[float], dict[str, Any]]:
    config: dict[str, Any] = {
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        "gradient_clipping": 1.0,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        config["fp16"]["initial_scale_power"] = POWER
    engine = zerograph.compile(model(), config)
    losses = []
    for tokens in data:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    return losses, {"skipped steps": engine.skipped_steps, "loss scale": engine.loss_scale}


def fsdp_run(precision: str, data: list[torch.Tensor]) -> tuple[list[float], dict[str, Any]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = DTYPES.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    made = model()
    for layer in made.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(made, mp_policy=policy)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=0.01)
    scale = 2.0**POWER if precision == "fp16" else 1.0
    losses = []
    for tokens in data:
        loss = made(input_ids=tokens, labels=tokens).loss
        (loss * scale).backward()
        for parameter in made.parameters():
            parameter.grad.div_(scale)
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    return losses, {}


def mean(loss: torch.Tensor) -> float:
    value = loss.detach().double()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


RUNS = {"zerograph": zerograph_run, "fully_shard": fsdp_run}


def rank_main(rank: int, world: int, store: str, steps: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    data = batches(rank, steps)
    curves: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "fp16"):
        for name, run in RUNS.items():
            losses, facts = run(precision, data)
            curves[f"{name} {precision}"] = {"losses": losses, **facts}
    if rank == 0:
        Path(out).write_text(json.dumps(curves))
    dist.barrier()
    dist.destroy_process_group()


def smooth(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]


def band(low: list[float], exact: list[float]) -> float:
    """The largest distance of two smoothed curves."""
    return max(abs(a - b) for a, b in zip(smooth(low), smooth(exact), strict=True))


def table(curves: dict[str, Any], bands: dict[str, float]) -> str:
    lines = ["| run | first loss | last loss | band |", "|---|---|---|---|"]
    for name, curve in curves.items():
        smoothed = smooth(curve["losses"])
        width = f"{bands[name]:.4f}" if name in bands else ""
        lines.append(f"| {name} | {smoothed[0]:.4f} | {smoothed[-1]:.4f} | {width} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.json")
        mp.spawn(rank_main, (2, str(Path(folder) / "store"), args.steps, out), 2)
        curves = json.loads(Path(out).read_text())
    bands = {
        f"{name} {precision}": band(
            curves[f"{name} {precision}"]["losses"], curves[f"{name} fp32"]["losses"]
        )
        for precision in DTYPES
        for name in RUNS
    }
    print(table(curves, bands))
    if args.json:
        result = {
            "machine": machine.describe(),
            "parameters": sum(p.numel() for p in model().parameters()),
            "steps": args.steps,
            "band": {name: round(value, 5) for name, value in bands.items()},
            "fp16": {k: v for k, v in curves["zerograph fp16"].items() if k != "losses"},
            "curves": {n: [round(x, 4) for x in smooth(c["losses"])] for n, c in curves.items()},
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    wide = [p for p in DTYPES if bands[f"zerograph {p}"] > bands[f"fully_shard {p}"] + SLACK]
    return 1 if wide else 0


if __name__ == "__main__":
    sys.exit(main())
