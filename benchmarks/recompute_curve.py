"""Bytes kept against FLOPs repeated: zerograph's choice beside torch's partitioner, and the time it takes.

    python benchmarks/recompute_curve.py [--json FILE] [--models llama gpt2] [--depths 10 20 40 80]

For ten values of torch's `activation_memory_budget` torch's own partitioner chooses what to keep of the
joint graph; zerograph chooses for as many bytes as that keeps. Both are counted alike: bytes of distinct
storages, results of the forward (logits) among them as torch counts, and FLOPs of what the backward then has
to compute again. "valid" is whether torch's choice repeats no random operator. Beside it stands what
zerograph repeats where as many bytes of activations are alive at most as with torch's choice (of 513
budgets tried): fewer bytes kept are not a lower peak. Nothing is run: the models are on the meta device.

The times are of one choice for a Llama of 70B's widths in bf16, of so many layers; tracing is not counted.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contest import llama
from plan_llama70b import llama70b
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from tests.partitioner import cheapest, choices, kept_by_torch
from zerograph.config import load_config
from zerograph.cost import cluster_of
from zerograph.ir import TrainGraph
from zerograph.passes import Normalize
from zerograph.planning import trace_of
from zerograph.recompute import Choice, Chooser
from zerograph.recompute.regions import Options

BUDGETS = tuple(tenth / 10 for tenth in range(1, 11))
TRIED = 512
LIMIT = 1.02
SECONDS = 30
DEVICE = cluster_of("cpu").device
SIZE: dict[str, Any] = {"vocab_size": 8192}


def gpt2() -> nn.Module:
    """With dropout, as it comes."""
    return GPT2LMHeadModel(
        GPT2Config(**SIZE, n_embd=512, n_layer=6, n_head=8, bos_token_id=1, eos_token_id=2)
    )


def bert() -> nn.Module:
    """With dropout, as it comes."""
    return BertForMaskedLM(
        BertConfig(
            **SIZE,
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=2048,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert}


def normal(model: nn.Module, size: int, length: int, **config: Any) -> TrainGraph:
    """The normalized joint graph of a step."""
    ids = torch.empty(size, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": torch.empty_like(ids)}
    graph = trace_of(model.train(), load_config(config), inputs, 1).graph
    Normalize().apply(graph)
    return graph


def curve(name: str) -> list[dict[str, Any]]:
    """Torch's choice and ours, for each budget."""
    with torch.device("meta"):
        model = MODELS[name]()
    graph = normal(model, 4, 128)
    equal_bytes, held = Chooser.of(graph, results_held=False), Chooser.of(graph)
    options = Options.of(graph, whole=True)
    tried = choices(options, TRIED)
    found = []
    for budget in BUDGETS:
        keep = kept_by_torch(graph, budget)
        try:
            theirs = equal_bytes.kept(keep)
        except AssertionError:
            found.append({"budget": budget, "valid": False})
            continue
        ours = equal_bytes.choose(theirs.nbytes)
        most = options.peaks.peak(theirs.keep)
        peak, beside = cheapest(tried, most)
        found.append(
            {
                "budget": budget,
                "valid": True,
                "torch": counted(theirs),
                "ours": counted(ours),
                "seconds": [ours.seconds(DEVICE), theirs.seconds(DEVICE)],
                "at equal peaks": {
                    "torch": counted(held.kept(keep), most),
                    "ours": counted(beside, peak),
                },
            }
        )
    return found


def counted(choice: Choice, peak: int | None = None) -> dict[str, int]:
    """Bytes kept, FLOPs and traffic of what is repeated, and most bytes alive."""
    found = {"bytes": choice.nbytes, "flops": choice.flops, "traffic": choice.traffic}
    return found if peak is None else found | {"peak": peak}


def seconds(layers: int, rounds: int) -> dict[str, Any]:
    """What a choice takes."""
    graph = normal(llama70b(layers), 1, 4096, bf16={"enabled": True})
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        chooser = Chooser.of(graph)
        chosen = chooser.choose(chooser.budget(0.5))
        taken.append(time.perf_counter() - start)
    return {
        "layers": layers,
        "nodes": len(graph.nodes()),
        "pieces": sum(map(len, chooser.solver.groups)),
        "points": len(chooser.solver.curve.nbytes),
        "seconds": round(statistics.median(taken), 3),
        "bytes": [chooser.solver.least, chosen.nbytes, chooser.solver.most],
        "flops": chosen.flops,
    }


def report(name: str, found: list[dict[str, Any]]) -> str:
    """A markdown table of one model."""
    lines = [
        f"| {name}: budget | kept | GFLOPs repeated: torch | zerograph | traffic: torch | zerograph "
        "| peak | GFLOPs at that peak: torch | zerograph |",
        "|---" * 9 + "|",
    ]
    for each in found:
        if not each["valid"]:
            lines.append(f"| {each['budget']} | repeats random operators |" + " |" * 7)
            continue
        ours, theirs, equal = each["ours"], each["torch"], each["at equal peaks"]
        lines.append(
            f"| {each['budget']} | {theirs['bytes'] / 2**20:.1f} MiB "
            f"| {theirs['flops'] / 1e9:.2f} | {ours['flops'] / 1e9:.2f} "
            f"| {theirs['traffic'] / 2**20:.0f} MiB | {ours['traffic'] / 2**20:.0f} MiB "
            f"| {equal['torch']['peak'] / 2**20:.1f} MiB "
            f"| {equal['torch']['flops'] / 1e9:.2f} | {equal['ours']['flops'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--depths", type=int, nargs="*", default=[10, 20, 40, 80])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves = {name: curve(name) for name in options.models}
    for name, found in curves.items():
        print(report(name, found), end="\n\n")
    times = [seconds(layers, options.rounds) for layers in options.depths]
    print("| layers | nodes | seconds |\n|---|---|---|")
    for each in times:
        print(f"| {each['layers']} | {each['nodes']} | {each['seconds']} |")
    if options.json:
        kept = {"machine": machine.describe(), "curves": curves, "times": times}
        options.json.write_text(json.dumps(kept, indent=2) + "\n")
    for name, found in curves.items():
        for each in (each for each in found if each["valid"]):
            for pair in (each, each["at equal peaks"]):
                assert pair["ours"]["flops"] <= LIMIT * pair["torch"]["flops"], (name, each)
    assert all(each["seconds"] < SECONDS for each in times)


if __name__ == "__main__":
    main()
