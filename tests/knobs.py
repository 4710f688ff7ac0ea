"""What each key of the config changes in the graph of a small model: the table behind docs/knobs.md.

Whoever builds a key that changes the graph adds a Knob here and runs
`pytest tests/test_knobs.py --accept-graphs`, then `python -m tests.knobs`, which writes docs/knobs.md.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import parallel, tiny
from tests.keys import all_leaves
from zerograph.changes import changes, unified
from zerograph.config import load_config
from zerograph.config.check import given, row_for, show
from zerograph.config.row import Row
from zerograph.layout import layout_of
from zerograph.plan import Plan
from zerograph.planning import plan_of
from zerograph.precision import Precision, precision_of
from zerograph.trace import Trace, trace

PAGE = Path(__file__).parent.parent / "docs" / "knobs.md"
GOLDENS = Path(__file__).parent / "goldens" / "knobs"
FOLDED = 40
"""Longer diffs are folded on the page."""
WORLD = 8
MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": tiny.Blocks,
    "tied": tiny.Tied,
    "tall": tiny.Blocks,
    "parallel": functools.partial(parallel.Parallel, 2, 2, "mp"),
}
ROWS = {"tall": 128, "parallel": 64}
"""Of the batch; of other models it has 4."""
PARTS = {"parallel": 2}
"""The model-parallel ranks of models that are cut."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Knob:
    """One change of one key, and what it does to the graph, in words."""

    key: str
    words: str
    before: Config
    after: Config
    variant: str = ""
    """Tells apart several changes of one key."""
    model: str = "blocks"

    @property
    def name(self) -> str:
        """The name of its golden."""
        return self.key + (f".{self.variant}" if self.variant else "")

    def diff(self) -> str:
        """From the skeleton before to the skeleton after, and what changed in bytes and peak."""
        before, after = (
            planned(config, self.model).text(skeleton=True) for config in (self.before, self.after)
        )
        lines = [*unified(before, after, context=1), "", *changes(before, after)]
        return "".join(f"{line}\n" for line in lines)


def planned(config: Config, model: str = "blocks") -> Plan:
    """The plan of one of MODELS for WORLD ranks."""
    loaded = load_config(config)
    return plan_of(trace_of(model, precision_of(MODELS[model](), loaded)), loaded)


@functools.cache
def trace_of(model: str, precision: Precision) -> Trace:
    """A config decides a trace through its precision alone, so plans share them."""
    torch.manual_seed(0)
    made = MODELS[model]()
    layout = layout_of(made, WORLD, precision, model_parallel=PARTS.get(model, 1))
    inputs = tiny.batch(ROWS.get(model, 4), parallel.WIDTH if model in PARTS else tiny.WIDTH)
    device = torch.device("cpu")
    return trace(made, (), inputs, layout=layout, precision=precision, device=device)


def base(stage: int = 3, **more: Any) -> dict[str, Any]:
    return tiny.config(stage, **more)


def zero(**more: Any) -> dict[str, Any]:
    """Stage 3 with other keys of its section."""
    return base(zero_optimization={"stage": 3, **more})


def sized(stage: int, **more: Any) -> dict[str, Any]:
    """`base` with other keys of its section."""
    made = base(stage)
    return {**made, "zero_optimization": {**made["zero_optimization"], **more}}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return base(optimizer={"type": kind, "params": {"lr": 1e-3, **params}})


BF16 = {"bf16": {"enabled": True}}
MICRO = {"train_micro_batch_size_per_gpu": 4}
SEVERAL = {**MICRO, "gradient_accumulation_steps": 2}

KNOBS = (
    Knob(
        "zero_optimization.stage",
        "Each rank updates its own slice of every bucket and keeps optimizer states for it alone: "
        "the all-reduce of gradients becomes a reduce-scatter, and updated parameters are gathered.",
        base(0),
        base(1),
        "0-1",
    ),
    Knob(
        "zero_optimization.stage",
        "Gradients are kept as slices too: the reduce-scatter moves from the step into the "
        "backward, behind each bucket's last gradient.",
        base(1),
        base(2),
        "1-2",
    ),
    Knob(
        "zero_optimization.stage",
        "Parameters are kept as slices too: each bucket is gathered before its use in the forward and in the "
        "backward and released after it; nothing is gathered after the update.",
        base(2),
        base(3),
        "2-3",
    ),
    Knob(
        "zero_optimization.stage3_prefetch_bucket_size",
        "At 0 every gather starts just in time, where it is waited for; above, up to so many "
        "elements start earlier.",
        zero(),
        zero(stage3_prefetch_bucket_size=0),
    ),
    Knob(
        "zero_optimization.stage3_prefetch_bucket_size",
        "A block that could not start early, because it has more elements, is cut between parameters, in "
        "order of registration.",
        zero(stage3_prefetch_bucket_size=0),
        zero(stage3_prefetch_bucket_size=72),
        "cut",
    ),
    Knob(
        "zero_optimization.reduce_bucket_size",
        "A block with more elements is cut between parameters, in order of registration; each piece is "
        "reduced as soon as its gradients are there. A parameter that has more gets a bucket of its own. "
        "It acts at every stage.",
        base(1),
        sized(1, reduce_bucket_size=72),
    ),
    Knob(
        "zero_optimization.allgather_bucket_size",
        "At stages 1 and 2, where buckets are gathered behind their update, blocks with more elements are "
        "cut as well: the smaller of the two sizes counts. At stages 0 and 3 it says nothing.",
        base(2),
        sized(2, allgather_bucket_size=72),
    ),
    Knob(
        "zero_optimization.reduce_scatter",
        "When it is false, each bucket of gradients is summed in whole by an all-reduce, and every rank "
        "keeps its slice: the same numbers, for twice the bytes on a link. So it is at stages 1 to 3, as in "
        "DeepSpeed (there at stage 3 with contiguous_gradients, which always holds here). Stage 0 sums in "
        "whole anyway.",
        base(2),
        sized(2, reduce_scatter=False),
    ),
    Knob(
        "zero_optimization.stage3_param_persistence_threshold",
        "Parameters with fewer elements stay gathered from step to step, in buckets of their own that are "
        "handled as at stage 2: no gather in forward or backward, and one of the new values behind the "
        "update. They count in stage3_max_live_parameters. This happens where the key is given. "
        "DeepSpeed's default of 100,000 is not taken over: there every parameter costs a message, here a "
        "small one in the bucket of its block costs none, and a bucket more costs two.",
        zero(),
        zero(stage3_param_persistence_threshold=64),
    ),
    Knob(
        "zero_optimization.stage3_model_persistence_threshold",
        "No more elements than this persist in the whole model; the smallest parameters come first, and "
        "among equal ones those that are registered first.",
        zero(stage3_param_persistence_threshold=64),
        zero(stage3_param_persistence_threshold=64, stage3_model_persistence_threshold=24),
    ),
    Knob(
        "zero_optimization.overlap_comm",
        "When it is false, nothing starts ahead of its use or ends late: gathers start where they are waited "
        "for, and reductions are waited for where they start.",
        base(3),
        sized(3, overlap_comm=False),
        "3",
    ),
    Knob(
        "zero_optimization.overlap_comm",
        "When it is false, the step waits for new parameters, and not the next forward. If it is left out, "
        "communication overlaps at every stage, not at stage 3 alone as in DeepSpeed: no bit depends on it.",
        base(2),
        sized(2, overlap_comm=False),
        "2",
    ),
    Knob(
        "zero_optimization.stage3_max_live_parameters",
        "No more gathered elements are alive at once, so gathers start later.",
        zero(),
        zero(stage3_max_live_parameters=512),
    ),
    Knob(
        "zero_optimization.stage3_max_reuse_distance",
        "A bucket that is used twice in one region (here a matrix at the start and at the end) is "
        "released and gathered again, if more elements than this are used in between.",
        zero(),
        zero(stage3_max_reuse_distance=0),
        model="tied",
    ),
    Knob(
        "zero_optimization.mics_shard_size",
        "Buckets are cut into 4 slices in place of 8, and two ranks have the same slice: gathers stay among "
        "4 ranks, a reduction is a reduce-scatter among them and an all-reduce of the slice along the "
        "copies. Slices and optimizer states are twice as large.",
        zero(),
        zero(mics_shard_size=4),
    ),
    Knob(
        "zero_optimization.mics_shard_size",
        "With several micro-batches the copies are brought together once, in the step.",
        zero() | SEVERAL,
        zero(mics_shard_size=4) | SEVERAL,
        "accumulated",
    ),
    Knob(
        "zero_optimization.zero_hpz_partition_size",
        "The forward keeps of each bucket that it releases a rank's slice of its node, and the backward "
        "gathers those among the 4 ranks of a node.",
        zero(stage3_max_reuse_distance=0),
        zero(stage3_max_reuse_distance=0, zero_hpz_partition_size=4),
    ),
    Knob(
        "gradient_accumulation_steps",
        "Each backward's gradients weigh one over the number of micro-batches.",
        base(**MICRO),
        base(**MICRO, gradient_accumulation_steps=4),
    ),
    Knob(
        "train_batch_size",
        "With the micro-batch given it decides the number of micro-batches: 128 = 4 x 4 x 8 ranks.",
        base(**MICRO),
        base(**MICRO, train_batch_size=128),
    ),
    Knob(
        "train_micro_batch_size_per_gpu",
        "With the batch given it decides the number of micro-batches: 128 = 4 x 4 x 8 ranks.",
        base(train_batch_size=128),
        base(train_batch_size=128, **MICRO),
    ),
    Knob(
        "gradient_clipping",
        "At 0 the update has no factor. The norm is computed all the same, for get_global_grad_norm().",
        base(),
        base(gradient_clipping=0.0),
    ),
    Knob(
        "bf16.enabled",
        "Parameters, activations and gathers are bf16, gradients are reduced in bf16 and kept in fp32, "
        "and the update works on fp32 master slices. A step that is not finite is skipped.",
        base(),
        base(**BF16),
    ),
    Knob(
        "bf16.check_grad_overflow",
        "When it is false, a step that is not finite is applied.",
        base(**BF16),
        base(bf16={"enabled": True, "check_grad_overflow": False}),
    ),
    Knob(
        "fp16.enabled",
        "The same in fp16. What arrives at the backward is multiplied by the loss scale, which "
        "the update divides out.",
        base(),
        base(fp16={"enabled": True}),
    ),
    Knob(
        "torch_autocast.enabled",
        "The forward runs under torch.autocast: its products are bf16. Parameters, gradients and "
        "collectives stay as they are.",
        base(),
        base(torch_autocast={"enabled": True}),
    ),
    Knob(
        "communication_data_type",
        "Gradients are reduced in this type.",
        base(),
        base(communication_data_type="bf16"),
    ),
    Knob(
        "data_types.grad_accum_dtype",
        "Gradients are kept in this type between backward and step.",
        base(**BF16),
        base(**BF16, data_types={"grad_accum_dtype": "bf16"}),
    ),
    Knob(
        "prescale_gradients",
        "Gradients are divided by the number of ranks before the sum, not after it.",
        base(),
        base(prescale_gradients=True),
    ),
    Knob(
        "gradient_predivide_factor",
        "Gradients are divided by the factor before the sum, and by the rest after it.",
        base(),
        base(gradient_predivide_factor=2.0),
    ),
    Knob(
        "gradient_allreduce_op",
        "Gradients are summed over ranks and divided by nothing.",
        base(),
        base(gradient_allreduce_op="sum"),
    ),
    Knob(
        "compile.weighted_accumulation",
        "Losses carry weights; their sum over micro-batches and ranks is reduced in the step and "
        "divided out. A step that is not finite is skipped.",
        base(),
        base(compile={"weighted_accumulation": True}),
    ),
    Knob(
        "compile.gathered_budget",
        "So many bytes of gathered buckets may be kept from the forward to the backward, whatever the "
        "reuse distance: those that fill it best, the nearest to the turn first. Here the budget is that "
        "of one block; the head, which is used last and first again, is not counted.",
        zero(),
        {**zero(), "compile": {"gathered_budget": 512}},
    ),
    Knob(
        "compile.update_in_backward",
        "Each bucket is updated behind its reduction and the last use of its parameters, and its gradient is "
        "freed; the step makes the norm of the sums of squares that are left.",
        base(gradient_clipping=0.0),
        base(gradient_clipping=0.0, compile={"update_in_backward": True}),
    ),
    Knob(
        "activation_checkpointing.number_checkpoints",
        "Each of the two blocks is a region. The forward keeps what enters it and the masks of its dropout, "
        "and the backward computes the rest again.",
        base(),
        base(activation_checkpointing={"number_checkpoints": 2}),
    ),
    Knob(
        "activation_checkpointing.number_checkpoints",
        "As many regions as give the lowest peak of activations: here one for each of the blocks.",
        base(),
        base(activation_checkpointing={"number_checkpoints": "auto"}),
        "auto",
        model="tall",
    ),
    Knob(
        "activation_checkpointing.cpu_checkpointing",
        "What enters a region goes to the host behind its last use in the forward, and comes back one "
        "region ahead of its use in the backward. Values below 4 KiB stay, so the batch here has 128 rows.",
        base(activation_checkpointing={"number_checkpoints": 2}),
        base(activation_checkpointing={"number_checkpoints": 2, "cpu_checkpointing": True}),
        model="tall",
    ),
    Knob(
        "activation_checkpointing.partition_activations",
        "With model-parallel ranks, here two for each of eight: each keeps its share of what enters a "
        "region, and gathers the whole one region ahead of its use in the backward. What the model's own "
        "all-reduce gave is alike on these ranks. Parameters that are parts have buckets of their own, and "
        "the norm counts the others once.",
        base(activation_checkpointing={"number_checkpoints": 2}),
        base(activation_checkpointing={"number_checkpoints": 2, "partition_activations": True}),
        model="parallel",
    ),
    Knob(
        "activation_checkpointing.contiguous_memory_optimization",
        "What enters a region lies in a row of an arena, which is an input of the forward and the same from "
        "step to step. The operator that makes it writes it there, if it can; else it is copied.",
        base(activation_checkpointing={"number_checkpoints": 2}),
        base(
            activation_checkpointing={
                "number_checkpoints": 2,
                "contiguous_memory_optimization": True,
            }
        ),
    ),
    Knob(
        "activation_checkpointing.contiguous_memory_optimization",
        "With `cpu_checkpointing` the arena is in the host's memory.",
        base(activation_checkpointing={"number_checkpoints": 2, "cpu_checkpointing": True}),
        base(
            activation_checkpointing={
                "number_checkpoints": 2,
                "cpu_checkpointing": True,
                "contiguous_memory_optimization": True,
            }
        ),
        variant="host",
        model="tall",
    ),
    Knob(
        "activation_checkpointing.contiguous_memory_optimization",
        "With `partition_activations` a rank's share is written to its row, and gathered from there.",
        base(activation_checkpointing={"number_checkpoints": 2, "partition_activations": True}),
        base(
            activation_checkpointing={
                "number_checkpoints": 2,
                "partition_activations": True,
                "contiguous_memory_optimization": True,
            }
        ),
        variant="shares",
        model="parallel",
    ),
    Knob(
        "activation_checkpointing.synchronize_checkpoint_boundary",
        "The device is waited for where a region begins and where it ends, in forward and backward.",
        base(activation_checkpointing={"number_checkpoints": 2}),
        base(
            activation_checkpointing={
                "number_checkpoints": 2,
                "synchronize_checkpoint_boundary": True,
            }
        ),
    ),
    Knob(
        "activation_checkpointing.profile",
        "The time of each region is logged, in the forward and in the backward. For that the device is "
        "waited for where it begins and where it ends.",
        base(activation_checkpointing={"number_checkpoints": 2}),
        base(activation_checkpointing={"number_checkpoints": 2, "profile": True}),
    ),
    Knob(
        "compile.activation_budget",
        "What the forward keeps is chosen: so many bytes, or, up to 1, a fraction of the way from the least "
        "that works to all, so that the FLOPs computed again are least.",
        base(),
        base(compile={"activation_budget": 0.5}),
    ),
    Knob(
        "optimizer.type",
        "Another rule, with no state without momentum.",
        optimizer("AdamW"),
        optimizer("SGD"),
        "sgd",
    ),
    Knob(
        "optimizer.type",
        "Another rule, with one state.",
        optimizer("AdamW"),
        optimizer("Adagrad"),
        "adagrad",
    ),
    Knob(
        "optimizer.type",
        "Another rule, with one state.",
        optimizer("AdamW"),
        optimizer("Lion"),
        "lion",
    ),
    Knob(
        "optimizer.type",
        "A rule with norms of whole parameters: states are updated first, which gives sums of squares over "
        "each rank's part of each parameter; one small gather exchanges them for all buckets.",
        optimizer("AdamW"),
        optimizer("Lamb"),
        "lamb",
    ),
    Knob(
        "optimizer.params.adam_w_mode",
        "When it is false, weight decay acts on the gradient: the rule is adam, not adamw.",
        optimizer("Adam"),
        optimizer("Adam", adam_w_mode=False),
    ),
    Knob(
        "optimizer.params.amsgrad",
        "One state more.",
        optimizer("AdamW"),
        optimizer("AdamW", amsgrad=True),
    ),
    Knob(
        "optimizer.params.momentum",
        "Above 0 there is a state for it.",
        optimizer("SGD"),
        optimizer("SGD", momentum=0.9),
    ),
    Knob(
        "optimizer.params.nesterov",
        "Another kernel.",
        optimizer("SGD", momentum=0.9),
        optimizer("SGD", momentum=0.9, nesterov=True),
    ),
    Knob(
        "optimizer.params.maximize",
        "Another kernel, which negates the gradient.",
        optimizer("AdamW"),
        optimizer("AdamW", maximize=True),
    ),
)


def values(knob: Knob) -> dict[str, tuple[object, object]]:
    """The keys that a knob's configs differ in, with their values before and after."""
    before, after = (dict(given(load_config(config))) for config in (knob.before, knob.after))
    default = all_leaves()
    pairs = {
        key: (before.get(key, default[key]), after.get(key, default[key]))
        for key in {**before, **after}
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


# Keys without a golden diff


@dataclass(frozen=True)
class Silent:
    """Keys without an effect on the graph, by what the table of what is built says of them."""

    title: str
    words: str
    holds: Callable[[Row], bool]
    heading: str


SILENT = (
    Silent(
        "Built, and not in the graph",
        "These keys do what they do in DeepSpeed, outside the graph or through its inputs.",
        lambda row: row.kind == "built" and bool(row.here),
        "Why the graph is the same",
    ),
    Silent(
        "Accepted, and only advice",
        "These keys change nothing. A plan whose config gives one says so in `plan.advisory`.",
        lambda row: row.kind == "advises",
        "What happens instead",
    ),
    Silent(
        "Refused unless off",
        "What these keys ask for is not built. Only values that ask for what happens anyway are accepted.",
        lambda row: row.kind == "refused",
        "What happens anyway",
    ),
    Silent(
        "Details of what is refused",
        "These keys refine keys that are refused or only advise, so they have no effect.",
        lambda row: row.kind == "dormant",
        "",
    ),
)


def keys() -> dict[str, Row]:
    """Every key of the config with its row in the table of what is built."""
    return {path: row_for(path) for path in all_leaves()}


def shown_keys() -> set[str]:
    """Keys that have a golden diff."""
    return {knob.key for knob in KNOBS}


def silent() -> dict[str, Silent]:
    """Keys without an effect on the graph; a key that is neither here nor in KNOBS is a defect."""
    found = {}
    for path, row in keys().items():
        holding = [each for each in SILENT if each.holds(row)]
        if holding and path not in shown_keys():
            found[path] = holding[0]
    return found


# The page

HEAD = """# What each config key changes

Every key of the config is on this page. The first part shows, for each key that changes the graph, the
difference that it makes to a small model (two blocks behind a frozen layer, 8 ranks, stage 3 and AdamW
unless said otherwise), as skeletons, in which runs of aten operators are folded. Each is a golden file in
`tests/goldens/knobs`, so a change of it fails a test. The second part lists the keys that change no
graph, with the reason; a test plans with other values of each and compares.

`python -m tests.knobs` writes this page from `tests/knobs.py` and from the table in
`zerograph/config/support.py`.

## Keys that change the graph
"""


def page() -> str:
    """docs/knobs.md."""
    parts = [HEAD, *map(_entry, KNOBS)]
    parts += [f"## {each.title}\n\n{each.words}\n\n{_table(each)}\n" for each in SILENT]
    return "\n".join(parts)


def _entry(knob: Knob) -> str:
    (before, after) = values(knob)[knob.key]
    diff = (GOLDENS / f"{knob.name}.diff").read_text()
    change = f"`{show(before)}` to `{show(after)}`"
    block = f"```diff\n{diff}```"
    if diff.count("\n") > FOLDED:
        block = f"<details><summary>The diff</summary>\n\n{block}\n\n</details>"
    return f"### `{knob.key}`: {change}\n\n{knob.words}\n\n{block}\n"


def _table(each: Silent) -> str:
    """One row a reason; without reasons, one a section of the config."""
    rows: dict[str, list[str]] = {}
    for path, holding in silent().items():
        if holding is each:
            first = row_for(path).here if each.heading else f"`{path.rpartition('.')[0]}`"
            shown = path if each.heading else path.rpartition(".")[2]
            rows.setdefault(first, []).append(f"`{shown}`")
    if not each.heading:
        return "\n".join(f"- {section}: {', '.join(paths)}" for section, paths in rows.items())
    lines = [f"| Keys | {each.heading} |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {', '.join(paths)} | {here} |" for here, paths in rows.items())]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
