"""`ZeroConfig`: DeepSpeed's JSON as one strict, frozen object.

    {"zero_optimization": {"stage": 3}}  ->  config.zero_optimization.stage == 3

Attributes carry DeepSpeed's JSON names and defaults (those of 0.19). Sections that were not given
are there with their defaults, apart from `optimizer` and `scheduler`, which are then None.
Make one with `load_config`, which also says in words what is wrong and refuses what is not built;
the constructor alone checks only names and types.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from zerograph.config import batch, check
from zerograph.config.base import BatchSize, Count, Free, NotNegative, Number, Section, never
from zerograph.config.extras import (
    Autotuning,
    Compile,
    CompressionTraining,
    CurriculumLearning,
    DataEfficiency,
    Elasticity,
    ExpertParallel,
    HybridEngine,
    ProgressiveLayerDrop,
    TensorParallel,
)
from zerograph.config.monitors import (
    Comet,
    CommsLogger,
    CsvMonitor,
    FlopsProfiler,
    TensorBoard,
    Timers,
    Wandb,
)
from zerograph.config.optimizer import Optimizer
from zerograph.config.scheduler import Scheduler
from zerograph.config.sections import (
    ActivationCheckpointing,
    Aio,
    Amp,
    Bf16,
    Checkpoint,
    DataTypes,
    DType,
    Fp16,
    Nebula,
    TorchAutocast,
)
from zerograph.config.zero import ZeroOptimization
from zerograph.mesh import Mesh, mesh_of


class ZeroConfig(Section):
    """The whole config."""

    spellings: ClassVar = {"bfloat16": "bf16"}

    train_batch_size: BatchSize = None
    train_micro_batch_size_per_gpu: BatchSize = None
    gradient_accumulation_steps: BatchSize = None
    managed_gradient_accumulation: bool = True
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    zero_optimization: ZeroOptimization = ZeroOptimization()
    fp16: Fp16 = Fp16()
    bf16: Bf16 = Bf16()
    amp: Amp = Amp()
    torch_autocast: TorchAutocast = TorchAutocast()
    data_types: DataTypes = DataTypes()
    gradient_clipping: NotNegative = 1.0
    communication_data_type: DType | None = None
    seq_parallel_communication_data_type: DType | None = "fp32"
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[Number, Field(gt=0)] = 1.0
    sparse_gradients: bool = False
    disable_allgather: bool = False
    graph_harvesting: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    aio: Aio = Aio()
    checkpoint: Checkpoint = Checkpoint()
    nebula: Nebula = Nebula()
    datastates_ckpt: Free | None = None
    dataloader_drop_last: bool = False
    steps_per_print: Annotated[Count | None, BeforeValidator(never)] = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    log_level: str | None = None
    vocabulary_size: Count | None = None
    flops_profiler: FlopsProfiler = FlopsProfiler()
    tensorboard: TensorBoard = TensorBoard()
    wandb: Wandb = Wandb()
    csv_monitor: CsvMonitor = CsvMonitor()
    comet: Comet = Comet()
    comms_logger: CommsLogger = CommsLogger()
    timers: Timers = Timers()
    autotuning: Autotuning = Autotuning()
    elasticity: Elasticity = Elasticity()
    compression_training: CompressionTraining = CompressionTraining()
    quantize_training: Free | None = None
    weight_quantization: Free | None = None
    data_efficiency: DataEfficiency = DataEfficiency()
    curriculum_learning: CurriculumLearning = CurriculumLearning()
    progressive_layer_drop: ProgressiveLayerDrop = ProgressiveLayerDrop()
    sparse_attention: Free | None = None
    hybrid_engine: HybridEngine = HybridEngine()
    compile: Compile = Compile()
    tensor_parallel: TensorParallel = TensorParallel()
    expert_parallel: ExpertParallel = ExpertParallel()
    sequence_parallel_size: Count = 1
    use_data_before_expert_parallelism: bool = False
    pipeline: Free | None = None
    _auto: tuple[str, ...] = PrivateAttr(())
    """Keys that were given as "auto" and have a default (auto.py)."""

    @property
    def precision(self) -> Literal["fp32", "fp16", "bf16"]:
        """The type that parameters are computed in."""
        if self.fp16.enabled:
            return "fp16"
        return "bf16" if self.bf16.enabled else "fp32"

    def batch(self, world_size: int) -> batch.Batch:
        """Solve the batch numbers for a world size, or say which of them disagree."""
        return batch.solve(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            world_size,
        )

    def mesh(self, world_size: int, model_parallel: int = 1) -> Mesh:
        """How so many data-parallel ranks are cut into groups, with `model_parallel` processes for each.

        Raises ConfigError if the groups do not fill it, or for a key that is not built beside
        model-parallel ranks.
        """
        zero = self.zero_optimization
        sizes = zero.mics_shard_size, zero.zero_hpz_partition_size
        made = mesh_of(*sizes, world_size, model_parallel)
        check.require_fits(self, made.model)
        return made

    def advisory(self, model_parallel: int = 1) -> tuple[str, ...]:
        """Say, for each key that was given and only advises, what happens instead.

        `model_parallel` is the number of ranks of the model-parallel group.
        """
        return check.advisory(self, model_parallel)
