"""Memory against time of a step with activation checkpoints, beside torch's.

    python benchmarks/checkpointing.py layers [--rounds 5] [--ranks 2] [--json FILE]
    python benchmarks/checkpointing.py budgets [--rounds 3] [--json FILE]

"layers": stage 3 with a region for each layer (`number_checkpoints`, parameters freed after the forward)
beside `fully_shard` whose layers run under `torch.utils.checkpoint`, and both without checkpoints.

"budgets": one rank; a Llama of 6 million parameters, whose activations are most of its memory, under ten
values of `compile.activation_budget` beside the same ten of torch's `activation_memory_budget`, whose
partitioner works in torch.compile ("aot_eager_decomp_partition": its graphs run operator by operator, as
zerograph's do). Both are fractions, of which 1 keeps everything.

`contest.py` says how contestants take turns. The peak is what lives from step to step, and what torch's
allocator has on top of it, operators' own memory included. Exits 1 if a step with checkpoints takes longer
than the peer's.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import live
import machine
import torch
import torch.distributed as dist
from contest import BATCH, LAYERS, SEQUENCE, Step, Times, batch_of, launch, measure, ratio
from contestants import Zerograph, config_of
from peers import Plain, fully_shard_step
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TENTHS = tuple(tenth / 10 for tenth in range(1, 11))
OURS, THEIRS = "stage 3, layers", "fully_shard, layers"
LIMIT = 1.0
"""Of the ratio of their steps."""


VOCABULARY = 512


def narrow() -> LlamaForCausalLM:
    """The model of "budgets", the same at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 720, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=SEQUENCE, use_cache=False, **sizes, **heads
    )
    return LlamaForCausalLM(config).train()


def doubled(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch of "budgets": twice the rows, fewer words."""
    return {name: value.repeat(2, 1) % VOCABULARY for name, value in batch.items()}


class Chosen(Zerograph):
    """zerograph's choice under a budget."""

    def __init__(self, budget: float) -> None:
        config = config_of(0, "fp32", {}) | {"compile": {"activation_budget": budget}}
        super().__init__(config, narrow())

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().__call__(doubled(batch))


class Compiled(Plain):
    """torch.compile with the choice of its partitioner under a budget."""

    def __init__(self, budget: float) -> None:
        super().__init__(narrow())
        scope: dict[str, Any] = {"model": self.model}
        exec(
            "def call(**batch): return model(**batch)", scope
        )  # dynamo shares what it compiles by code
        call = torch.compile(scope["call"], backend="aot_eager_decomp_partition", fullgraph=True)
        with torch._functorch.config.patch(activation_memory_budget=budget):  # type: ignore[attr-defined]
            call(**doubled(batch_of(0, 0))).loss.backward()
        self.model.zero_grad()
        self.call = call

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.call(**doubled(batch)).loss
        loss.backward()
        self.update()
        self.model.zero_grad()
        return loss.detach()


def checkpointed() -> Plain:
    """`fully_shard`, each of whose layers is computed again in the backward."""
    step = fully_shard_step()
    step.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return step


def sharded(count: int) -> Zerograph:
    """Stage 3, parameters freed after the forward, with so many regions."""
    config = config_of(3, "fp32", {"stage3_max_reuse_distance": 0})
    return Zerograph(config | {"activation_checkpointing": {"number_checkpoints": count}})


def makers(what: str) -> dict[str, Callable[[], Step]]:
    """How each contestant is made."""
    if what == "layers":
        return {
            "fully_shard": fully_shard_step,
            THEIRS: checkpointed,
            "stage 3": lambda: sharded(0),
            OURS: lambda: sharded(LAYERS),
        }
    ours = {f"zerograph {b}": lambda b=b: Chosen(b) for b in TENTHS}
    return ours | {f"torch {b}": lambda b=b: Compiled(b) for b in TENTHS}


def run(options: argparse.Namespace) -> None:
    """One rank, in a process group that exists."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 2 * len(TENTHS)
    steps = {name: make() for name, make in makers(options.what).items()}
    times = measure(steps, options.rounds)
    require_equal(times)
    peaks = {name: peak(name, step) for name, step in steps.items()}
    if dist.get_rank():
        return
    print(table(times, peaks))
    found = {
        name: {"peak": peaks[name], "median_s": own.median, "seconds": own.seconds}
        for name, own in times.items()
    }
    write(options, found)
    if options.what == "layers":
        slower = ratio(times[OURS].seconds, times[THEIRS].seconds)
        print(f"\n{OURS} takes {slower:.3f} times the step of {THEIRS} (at most {LIMIT})")
        sys.exit(slower > LIMIT)


def require_equal(times: Mapping[str, Times]) -> None:
    """All train alike: the losses are the first contestant's to five digits."""
    first = next(iter(times.values()))
    for own in times.values():
        for loss, other in zip(own.losses, first.losses, strict=True):
            if abs(loss - other) > 5e-5 * abs(other):
                raise SystemExit(f"{own.name} has loss {loss}, {first.name} {other}")


def peak(name: str, step: Step) -> int:
    """Bytes alive at most in a step, by torch's allocator."""
    if isinstance(step, Zerograph):
        return live.of_engine(name, step, step.engine).allocated
    assert isinstance(step, Plain)
    if isinstance(step, Compiled):
        return live.allocated(step, step.held)
    return live.of_peer(name, step).allocated


def table(times: Mapping[str, Times], peaks: Mapping[str, int]) -> str:
    """Markdown; times are also relative to the first contestant's."""
    first = next(iter(times.values()))
    lines = [f"|  | peak of a step | step | x {first.name} |", "|---" * 4 + "|"]
    for name, own in times.items():
        relative = ratio(own.seconds, first.seconds)
        lines.append(
            f"| {name} | {peaks[name] / 2**20:.0f} MiB | {own.median * 1e3:.0f} ms | {relative:.2f} |"
        )
    return "\n".join(lines)


def write(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    if not options.json:
        return
    head = {
        "benchmark": f"checkpointing {options.what}",
        "machine": machine.describe(),
        "ranks": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "batch_per_rank": [BATCH if options.what == "layers" else 2 * BATCH, SEQUENCE],
    }
    options.json.write_text(json.dumps({**head, "results": found}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["layers", "budgets"])
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each contestant")
    parser.add_argument("--ranks", type=int, default=2, help="of layers; budgets have one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args()
    if options.what == "budgets":
        options.ranks = 1
    launch(run, options)


if __name__ == "__main__":
    main()
