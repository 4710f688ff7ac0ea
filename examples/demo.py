"""Train a small Llama at ZeRO stage 3 on the source of Python's standard library.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/demo.py

Every rank holds its share of parameters, gradients and optimizer states. Exits 1 if the loss did
not fall.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import torch
import torch.distributed as dist
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import zerograph

LENGTH = 128
BARS = "▁▂▃▄▅▆▇█"


def main() -> int:
    args = arguments()
    config = json.loads(args.config.read_text())
    if "total_num_steps" in config.get("scheduler", {}).get("params", {}):
        config["scheduler"]["params"]["total_num_steps"] = max(args.steps, 20)
    logging.set_verbosity_error()
    torch.manual_seed(0)

    model = llama()
    engine = zerograph.compile(model, config)
    console = console_of(engine.world.rank)
    train, held_out = corpus.split(corpus.read())
    console.print(f"{len(train):,} bytes of Python's standard library, one token per byte")

    losses = list(steps(engine, train, args.steps, console))
    console.print(f"loss of the steps {curve(losses)}")
    console.print(f"loss on held-out text {evaluate(engine, held_out):.2f}")

    model = engine.destroy()  # an ordinary model again, with its full parameters, on every rank
    if engine.world.rank == 0:
        console.print(boxed(generate(model), "what the model writes"))
    return verdict(losses, console)


def console_of(rank: int) -> Console:
    """Rank 0 speaks; outside a terminal in plain lines of one width."""
    console = Console(quiet=rank != 0, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 100
    return console


def boxed(text: str, title: str) -> Panel:
    return Panel(Text(text), title=title, title_align="left")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("zero3.json"), metavar="FILE"
    )
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("--steps must be at least 4, so that a fall of the loss can be told")
    return args


def llama() -> nn.Module:
    """A Llama of 5.2 million parameters over bytes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=corpus.VOCABULARY,
            hidden_size=320,
            intermediate_size=880,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def steps(engine: zerograph.Engine, text: Tensor, count: int, console: Console) -> Iterator[float]:
    """Train for `count` steps; yields the loss of each, averaged over ranks."""
    generator = torch.Generator().manual_seed(engine.world.rank)
    size = engine.batch.micro_batch_size or 4
    console.print("tracing the model and planning the step ...")
    start, recent = time.perf_counter(), []
    with progress(console) as bar:
        task = bar.add_task("train", total=count)
        for step in range(1, count + 1):
            tokens = batch(text, size, generator)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            mean = average(engine, loss.item())
            recent.append(mean)
            now = time.perf_counter()
            if step == 1:
                console.print(boxed(engine.plan.short(), "plan"))
                console.print(f"step    1  loss {mean:.3f}  {now - start:.1f} s with the planning")
                start, recent = now, []
            elif step % 10 == 0 or step == count:
                rate = len(recent) * tokens.numel() * engine.world.size / (now - start)
                used = ", ".join(f"{mib:.0f} MiB" for mib in resident(engine))
                console.print(
                    f"step {step:>4}  loss {statistics.mean(recent):.3f}  "
                    f"{rate:>6,.0f} tokens/s  memory of each rank's process {used}"
                )
                start, recent = now, []
            bar.update(task, completed=step)
            yield mean


def progress(console: Console) -> Progress:
    """A moving bar in a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    off = console.quiet or not console.is_terminal
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=off)


def batch(text: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` windows of the text from random places."""
    starts = torch.randint(len(text) - LENGTH, (size,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts]).long()


def average(engine: zerograph.Engine, value: float) -> float:
    return sum(everyone(engine, value)) / engine.world.size


def everyone(engine: zerograph.Engine, value: float) -> list[float]:
    """The value of each rank, in order."""
    mine = torch.tensor([value], dtype=torch.float64, device=engine.world.device)
    if engine.world.size == 1:
        return mine.tolist()
    found = [torch.empty_like(mine) for _ in range(engine.world.size)]
    dist.all_gather(found, mine)
    return [float(one) for one in found]


def resident(engine: zerograph.Engine) -> list[float]:
    """MiB that each rank holds: of the device, or of the whole process on the CPU."""
    if engine.world.device.type == "cuda":
        return everyone(engine, torch.cuda.max_memory_allocated() / 2**20)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return everyone(engine, held / 2**20)


@torch.no_grad()
def evaluate(engine: zerograph.Engine, text: Tensor, batches: int = 4) -> float:
    """Mean loss on text that was not trained on. A forward alone is planned on its own."""
    engine.eval()
    windows = corpus.Windows(text, LENGTH)
    total = 0.0
    for index in range(batches):
        tokens = torch.stack([windows[index * 8 + row]["input_ids"] for row in range(8)])
        total += engine(input_ids=tokens, labels=tokens).loss.item()
    engine.train()
    return total / batches


def generate(model: nn.Module, count: int = 256) -> str:
    """What the model writes after the start of a function, at a low temperature."""
    torch.manual_seed(0)
    prompt = torch.tensor([list(b"    def __init__(self, ")])
    written = model.eval().generate(
        prompt, max_new_tokens=count, do_sample=True, temperature=0.4, use_cache=True
    )
    return corpus.decode(written[0])


def curve(losses: list[float], width: int = 40) -> str:
    """The losses as a line of bars, each the mean of a few."""
    few = -(-len(losses) // width)
    picked = [statistics.mean(losses[i : i + few]) for i in range(0, len(losses), few)]
    low, high = min(picked), max(picked)
    return "".join(BARS[round((x - low) / max(high - low, 1e-9) * 7)] for x in picked)


def verdict(losses: list[float], console: Console) -> int:
    """0 if the mean loss of the last tenth is clearly below that of the first tenth."""
    part = max(2, len(losses) // 10)
    first, last = statistics.mean(losses[:part]), statistics.mean(losses[-part:])
    fell = last < 0.9 * first
    console.print(f"mean loss of the first {part} steps {first:.2f}, of the last {part} {last:.2f}")
    if not fell:
        console.print("the loss did not fall")
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main())
