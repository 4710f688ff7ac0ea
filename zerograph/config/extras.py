"""The sections of DeepSpeed that zerograph knows and, so far, only accepts switched off.

They are typed so that a misspelt key in them is found. What depends on names that a user invents
(groups of modules, metrics, patterns) stays a free object.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from zerograph.config.base import Count, Free, Integer, Names, Number, Positive, Section, whole

Sizes = Annotated[
    tuple[Annotated[int, BeforeValidator(whole), Field(gt=0)], ...], Field(strict=False)
]


class Autotuning(Section):
    """A search over configs that DeepSpeed's launcher runs."""

    enabled: bool = False
    fast: bool = True
    results_dir: str | None = "autotuning_results"
    exps_dir: str | None = "autotuning_exps"
    overwrite: bool = True
    start_profile_step: Count = 3
    end_profile_step: Count = 5
    metric: str = "throughput"
    metric_path: str | None = None
    tuner_type: str = "gridsearch"
    tuner_early_stopping: Count = 5
    tuner_num_trials: Count = 50
    arg_mappings: Free | None = None
    model_info: Free | None = None
    model_info_path: str | None = None
    mp_size: Count = 1
    max_train_batch_size: Count | None = None
    min_train_batch_size: Count = 1
    max_train_micro_batch_size_per_gpu: Count = 1024
    min_train_micro_batch_size_per_gpu: Count = 1
    num_tuning_micro_batch_sizes: Count = 3


class Elasticity(Section):
    """A batch size that stays the same while the world size changes."""

    enabled: bool = False
    max_train_batch_size: Count = 2000
    micro_batch_sizes: Sizes = (2, 4, 6)
    min_gpus: Positive = 1
    max_gpus: Positive = 10000
    num_gpus_per_node: Positive = 1
    model_parallel_size: Positive = 1
    min_time: Count = 0
    version: Number = 0.2
    prefer_larger_batch: bool = True
    ignore_non_elastic_batch_info: bool = False


class Shared(Section):
    """The switch of one compression technique; its other keys differ by technique."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = False


class Technique(Section):
    """One compression technique, applied to groups of modules that the user names."""

    shared_parameters: Shared = Shared()
    different_groups: Free | None = None


class LayerReduction(Section):
    """Distillation into fewer layers."""

    enabled: bool = False
    keep_number_layer: Count | None = None
    module_name_prefix: str | None = None
    teacher_layer: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    other_module_name: Names | None = None


class CompressionTraining(Section):
    """Quantization, pruning and distillation while training."""

    layer_reduction: LayerReduction = LayerReduction()
    weight_quantization: Technique = Technique()
    activation_quantization: Technique = Technique()
    sparse_pruning: Technique = Technique()
    row_pruning: Technique = Technique()
    head_pruning: Technique = Technique()
    channel_pruning: Technique = Technique()


class DataEfficiency(Section):
    """Curriculum learning and random layerwise token dropping."""

    enabled: bool = False
    seed: Integer = 1234
    data_routing: Free | None = None
    data_sampling: Free | None = None


class CurriculumLearning(Section):
    """The older curriculum learning."""

    enabled: bool = False
    curriculum_type: str | None = None
    min_difficulty: Count | None = None
    max_difficulty: Count | None = None
    schedule_type: str | None = None
    schedule_config: Free | None = None


class ProgressiveLayerDrop(Section):
    """Layers dropped at random, more of them as training goes on."""

    enabled: bool = False
    theta: Number = 1.0
    gamma: Number = 0.001


class HybridEngine(Section):
    """Training and generation in turn, for RLHF."""

    enabled: bool = False
    max_out_tokens: Count = 512
    inference_tp_size: Count = 1
    release_inference_cache: bool = False
    pin_parameters: bool = True
    tp_gather_partition_size: Count = 8
    enable_cuda_graph: bool = False


class Compile(Section):
    """DeepCompile, and zerograph's own options of the step, which come first."""

    weighted_accumulation: bool = False
    update_in_backward: bool = False
    gathered_budget: Count | None = None
    activation_budget: Annotated[Number, Field(ge=0)] | None = None
    deepcompile: bool = False
    free_activation: bool = False
    free_activation_threshold: Count = 10_485_760
    offload_activation: bool = False
    offload_activation_pin_memory: bool = True
    offload_opt_states: bool = False
    offload_parameters: bool = False
    double_buffer: bool = True
    symmetric_memory: bool = False
    debug_log: bool = False
    sync_before_reduce: bool = False
    sync_after_reduce: bool = False
    sync_before_allgather: bool = False
    sync_after_allgather: bool = False
    keep_int_input_tensors: bool = True
    keep_all_input_tensors: bool = False
    passes: Names | None = None


class TensorParallelSize(Section):
    """The inner `tensor_parallel.tensor_parallel` object (process groups come from code)."""

    tp_size: Count = 1
    tp_grain_size: Count = 1
    mpu: Any = None
    tp_group: Any = None


class TensorParallel(Section):
    """AutoTP: tensor parallelism beside ZeRO."""

    spellings: ClassVar = {"tp": "tensor_parallel", "kernel_inject": "replace_with_kernel_inject"}

    dtype: str | None = None
    autotp_size: Count = 0
    tp_overlap_comm: bool = False
    tensor_parallel: TensorParallelSize = TensorParallelSize()
    injection_policy_tuple: Names | None = None
    partition_config: Free | None = None
    preset_model: str | None = None
    keep_module_on_host: bool = False
    replace_with_kernel_inject: bool = False


class ExpertParallel(Section):
    """AutoEP: experts spread over ranks. Most keys name parts of the user's own model."""

    enabled: bool = False
    autoep_size: Count = 1
    expert_tensor_parallel_size: Count = 1
    validate_folding_routing: bool = False
    preset_model: str | None = None
    moe_layer_pattern: str | None = None
    expert_pattern: str | None = None
    router_pattern: str | None = None
    shared_experts_pattern: str | None = None
    shared_experts_gate_pattern: str | None = None
    has_shared_experts: bool | None = None
    use_grouped_mm: bool = True
    disable_triton_grouped_mm: bool = False
    route_norm: bool | None = None
    route_scale: Number = 1.0
    score_apply: str = "auto"
    score_func: str = "auto"
    combine_impl: str = "auto"
    num_expert_groups: Count | None = None
    num_limited_groups: Count | None = None
    top_k: Any = "auto"
    routed_scaling_factor: Any = "auto"
    load_balance_coeff: Any = None
    expert_w1: str | None = None
    expert_w2: str | None = None
    expert_w3: str | None = None
    num_experts_attr: str | None = None
    top_k_attr: str | None = None
