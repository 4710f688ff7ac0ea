"""The `zero_optimization` section, with the two offload sections inside it.

Attributes carry the names that DeepSpeed's JSON uses, so the stage-3 ones keep their prefix:
`config.zero_optimization.stage3_prefetch_bucket_size`. The names without the prefix, which
DeepSpeed accepts in JSON as well, are read as the same keys.
"""

import sys
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from zerograph.config.base import Count, Fraction, Free, Integer, Names, Positive, Section, whole

Device = Literal["none", "cpu", "nvme"]
Stage = Annotated[int, BeforeValidator(whole), Field(ge=0, le=3)]

STAGE3_NAMES = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

# Module classes with experts that fire by chance; DeepSpeed fetches such a module as one piece.
LEAF_CLASSES = tuple(
    f"transformers.models.{name}.modeling_{name}.{block}SparseMoeBlock"
    for name, block in (
        ("mixtral", "Mixtral"),
        ("qwen2_moe", "Qwen2Moe"),
        ("qwen3_moe", "Qwen3Moe"),
    )
)


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


OneOrMore = Annotated[Names, BeforeValidator(_listed)]


class OffloadParam(Section):
    """Where parameter shards rest between uses."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: Count = 5
    buffer_size: Count = 100_000_000
    max_in_cpu: Count = 1_000_000_000
    pin_memory: bool = True


class OffloadOptimizer(Section):
    """Where optimizer states rest between steps."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: Count = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: Fraction = 1.0
    super_offload: bool = False
    cpuadam_cores_perc: Fraction = 0.8


class LeafModule(Section):
    """Modules that DeepSpeed fetches as one piece instead of hooking their children."""

    classes: OneOrMore = LEAF_CLASSES
    names: OneOrMore = ()
    name_suffixes: OneOrMore = ()


class ZeroOptimization(Section):
    """The `zero_optimization` section."""

    spellings: ClassVar = {name: f"stage3_{name}" for name in STAGE3_NAMES}

    stage: Stage = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Positive = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Positive = 500_000_000
    overlap_comm: bool | None = None
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    zenflow: Free | None = None
    sub_group_size: Count = 1_000_000_000
    cpu_offload: bool | None = None
    cpu_offload_param: bool | None = None
    cpu_offload_use_pin_memory: bool | None = None
    stage3_prefetch_bucket_size: Count = 50_000_000
    stage3_param_persistence_threshold: Count = 100_000
    stage3_model_persistence_threshold: Count = sys.maxsize
    stage3_max_live_parameters: Count = 1_000_000_000
    stage3_max_reuse_distance: Count = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_gather_fp16_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: Integer = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    zero_hpz_partition_size: Count = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    zeropp_loco_param: Free | None = None
    mics_shard_size: Integer = -1
    mics_hierarchical_params_gather: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: LeafModule = LeafModule()


def groups(zero: ZeroOptimization) -> list[str]:
    """Say what is wrong with the keys that cut the ranks into groups."""
    mics, hpz = zero.mics_shard_size, zero.zero_hpz_partition_size
    found = []
    if mics == 1 or mics < -1:
        found.append(
            f"zero_optimization.mics_shard_size={mics}: such a group shards nothing; take at least 2, "
            "-1 to shard over all ranks, or stage 0 for whole copies on every rank"
        )
    given = {"mics_shard_size": mics, "zero_hpz_partition_size": hpz}
    used = [f"zero_optimization.{key}={size}" for key, size in given.items() if size > 1]
    if len(used) == 2:
        found.append(
            f"{' and '.join(used)}: with MiCS the forward too gathers within a group, so hpZ has nothing to "
            "do; keep one"
        )
    if zero.stage < 3:
        found += [
            f"{each} cuts parameters, which stage {zero.stage} does not shard; set stage to 3, or leave it "
            "out"
            for each in used
        ]
    return found
