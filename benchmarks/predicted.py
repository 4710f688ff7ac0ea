"""Predicted beside measured: the time of a step, and the bytes that cross a link.

    python benchmarks/predicted.py [--json FILE] [--rounds 11] [--cluster FILE]
    benchmarks/link.sh 1gbit python benchmarks/predicted.py --json FILE
    python benchmarks/predicted.py --ranks 4 --bytes

Calibrates in the process group that it trains in (`zerograph.calibrate`), predicts the step of two Llamas
at ZeRO stages 0 to 3 from their plans, and trains them: the stages take turns, one step at a time. A step's
time is that of the slowest rank. With `--bytes` it counts what each rank sends in a step instead (payload.py
says how), and fails unless that is what the plan's collectives send by `Cluster.bytes_per_link`, to the byte.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import contest
import machine
import payload
import step
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import zerograph
from zerograph import ops
from zerograph.calibrate import calibrate
from zerograph.cost import CLUSTERS, Cluster, collective_bytes, name_of
from zerograph.nodes import is_call

WITHIN = 0.25
"""What a prediction may be wrong by."""


def small_llama() -> LlamaForCausalLM:
    """A Llama of 4.3 million fp32 parameters, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=contest.SEQUENCE,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


MODELS: dict[str, Callable[[], LlamaForCausalLM]] = {"29M": contest.llama, "4M": small_llama}


def contestant(name: str, stage: int) -> tuple[zerograph.Engine, contest.Step]:
    """An engine of a model at a stage, and its step."""
    model = MODELS[name]()
    words = model.config.vocab_size
    engine = zerograph.compile(model, step.config_of(stage))

    def train(batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = engine(**{key: value % words for key, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return engine, train


# Time


def times(cluster: Cluster, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model and stage."""
    rows = []
    for model in options.models:
        runs = {stage: contestant(model, stage) for stage in options.stages}
        measured = contest.measure(
            {str(s): train for s, (_, train) in runs.items()}, options.rounds
        )
        for stage, (engine, _) in runs.items():
            timeline = engine.plan.timeline(cluster)
            rows.append(
                {
                    "model": model,
                    "stage": stage,
                    "predicted_s": timeline.seconds,
                    "measured_s": measured[str(stage)].median,
                    "seconds": measured[str(stage)].seconds,
                    "compute_s": timeline.busy["compute"],
                    "communication_s": timeline.busy["communication"],
                    "waited_s": timeline.waited,
                }
            )
            engine.destroy()
    return rows


def table_of_times(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | predicted | measured | error | compute | communication | waited |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        columns = ("predicted_s", "measured_s", "compute_s", "communication_s", "waited_s")
        predicted, measured, *parts = (f"{1e3 * row[name]:.0f} ms" for name in columns)
        error = row["predicted_s"] / row["measured_s"] - 1
        name = f"{row['model']} stage {row['stage']}"
        cells = [name, predicted, measured, f"{error:+.0%}", *parts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Bytes


def sizes(cluster: Cluster, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model and stage: payload that a rank sends in a step, the mean over ranks."""
    rows = []
    for model in options.models:
        for stage in options.stages:
            engine, train = contestant(model, stage)
            train(contest.batch_of(0, dist.get_rank()))
            dist.barrier()
            before = payload.sent()
            train(contest.batch_of(1, dist.get_rank()))
            counted = torch.tensor(payload.sent() - before)
            dist.all_reduce(counted)
            predicted, records = expected(engine.plan, cluster)
            world = dist.get_world_size()
            found = (int(counted) - records) / world
            rows.append({"model": model, "stage": stage, "predicted": predicted, "counted": found})
            engine.destroy()
    return rows


def expected(plan: zerograph.Plan, cluster: Cluster) -> tuple[float, int]:
    """(payload that a rank sends in a step, bytes of gloo's records of all ranks)."""
    world, total, records = plan.graph.world, 0.0, 0
    for node in plan.graph.nodes():
        if is_call(node, *ops.COLLECTIVES):
            kind, nbytes = name_of(node), collective_bytes(node)
            total += cluster.bytes_per_link(kind, nbytes, world)
            if cluster.is_direct(kind) or kind == "all_reduce":
                halves = 2 if kind == "all_reduce" else 1
                messages = halves * payload.direct_messages(nbytes, world)
            else:
                rounds = cluster.hops(kind, world) // (world - 1)
                itemsize = node.meta["val"].dtype.itemsize
                messages = payload.messages(rounds, nbytes, itemsize, world)
            records += payload.RECORDS * messages
    return total, records


def table_of_bytes(rows: list[dict[str, Any]]) -> str:
    lines = ["| | predicted | counted |", "|---" * 3 + "|"]
    for row in rows:
        name = f"{row['model']} stage {row['stage']}"
        lines.append(f"| {name} | {row['predicted']:,.1f} | {row['counted']:,.1f} |")
    return "\n".join(lines)


# Running


def run(options: argparse.Namespace) -> None:
    """One rank, in a process group that exists."""
    torch.set_num_threads(1)
    if options.bytes:
        cluster, rows = CLUSTERS["cpu"], sizes(CLUSTERS["cpu"], options)
        wrong = [row for row in rows if row["predicted"] != row["counted"]]
    else:
        cluster = Cluster.load(options.cluster) if options.cluster else calibrate()
        rows = times(cluster, options)
        errors = (row["predicted_s"] / row["measured_s"] - 1 for row in rows)
        wrong = [row for row, error in zip(rows, errors) if abs(error) > WITHIN]
    if dist.get_rank() == 0:
        print(table_of_bytes(rows) if options.bytes else table_of_times(rows), flush=True)
        write(options, cluster, rows)
        if wrong:
            limit = "to the byte" if options.bytes else f"within {WITHIN:.0%}"
            sys.exit(f"{len(wrong)} of {len(rows)} predictions are not right {limit}")


def write(options: argparse.Namespace, cluster: Cluster, rows: list[dict[str, Any]]) -> None:
    if not options.json:
        return
    content = {
        "benchmark": "predicted",
        "machine": machine.describe(),
        "ranks": dist.get_world_size(),
        "cluster": cluster.model_dump(mode="json"),
        "results": rows,
    }
    options.json.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="measured steps of each contestant")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to spawn (not with torchrun)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--stages", type=int, nargs="+", default=list(step.STAGES))
    parser.add_argument("--bytes", action="store_true", help="count bytes instead of seconds")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="do not calibrate, read this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    contest.launch(run, parser.parse_args())


if __name__ == "__main__":
    main()
