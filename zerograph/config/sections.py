"""The sections about number formats, checkpointing of activations and of training, and I/O."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from zerograph.config.base import (
    Count,
    CountOrAuto,
    Free,
    Names,
    NotNegative,
    Number,
    Positive,
    Section,
    lower,
    upper,
)

DType = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(lower)]


class Fp16(Section):
    """Training in half precision with loss scaling: dynamic, or `loss_scale` if that is not 0."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: NotNegative = 0.0
    initial_scale_power: Annotated[Count, Field(le=126)] = 16
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Annotated[Number, Field(gt=0)] = 1
    fp16_master_weights_and_grads: bool = False


class Bf16(Section):
    """Training in bfloat16 with fp32 optimizer states."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Amp(Section):
    """Apex AMP; every other key is handed to Apex, so none can be called unknown."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = False


def _autocast(value: object) -> object:
    if value in ("float16", "fp16", "torch.float16"):
        raise ValueError(
            "autocast to fp16 needs a scaled loss, which is fp16.enabled; or use bfloat16"
        )
    return "bfloat16" if value in ("bf16", "torch.bfloat16", None) else value


class TorchAutocast(Section):
    """`torch.autocast` around the forward."""

    enabled: bool = False
    dtype: Annotated[Literal["bfloat16"], BeforeValidator(_autocast)] = "bfloat16"
    lower_precision_safe_modules: Names | None = None


class DataTypes(Section):
    """The types of accumulated gradients, parameters and buffers."""

    grad_accum_dtype: DType | None = None
    param_dtype: DType | None = None
    buffer_dtype: DType | None = None


class ActivationCheckpointing(Section):
    """What is kept of the forward for the backward, and where."""

    partition_activations: bool = False
    number_checkpoints: CountOrAuto | None = None
    contiguous_memory_optimization: bool = False
    cpu_checkpointing: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False


class Aio(Section):
    """How blocks travel to and from NVMe. DeepSpeed's docs call the parallelism thread_count."""

    spellings: ClassVar = {"thread_count": "intra_op_parallelism"}

    block_size: Count = 1_048_576
    queue_depth: Count = 8
    intra_op_parallelism: Count = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class ParallelWrite(Section):
    """Whether pipeline stages write their checkpoints side by side."""

    pipeline_stage: bool = False


class Checkpoint(Section):
    """How the state of training is saved."""

    tag_validation: Annotated[Literal["WARN", "IGNORE", "FAIL"], BeforeValidator(upper)] = "WARN"
    checkpoint_serialization: bool = True
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: ParallelWrite = ParallelWrite()
    writer: Free | None = None


class Nebula(Section):
    """Azure's asynchronous checkpoints."""

    enabled: bool = False
    enable_nebula_load: bool = True
    nebula_load_path: str | None = None
    persistent_storage_path: str | None = None
    persistent_time_interval: Count = 100
    num_of_version_in_retention: Count = 2
