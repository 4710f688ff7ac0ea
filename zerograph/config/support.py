"""What is built, as data: one row per key of the config, and nothing but rows.

To build a key, move it into a `built` row. A row with the path of a section speaks for every key
below it that has no row of its own. What each kind of row means is told in `row`; the rows of
`zero_optimization` are in `support_zero`, those of batch, optimizer and scheduler in
`support_training`.
"""

from zerograph.config.row import OFF, Row, advises, built, dormant, refused, under
from zerograph.config.support_training import TRAINING_ROWS
from zerograph.config.support_zero import ZERO_ROWS

_PRECISION = (
    *built("fp16.enabled"),
    *built(
        under(
            "fp16",
            "loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
            "min_loss_scale",
        ),
        "it decides the loss scale, which is an input of the graph",
    ),
    *advises("fp16.auto_cast", "floating inputs are always cast to the type of the parameters"),
    *refused(
        "fp16.fp16_master_weights_and_grads",
        "master weights and optimizer states are fp32",
        OFF,
        False,
    ),
    *built("bf16.check_grad_overflow communication_data_type data_types.grad_accum_dtype"),
    *built("prescale_gradients gradient_predivide_factor gradient_allreduce_op"),
    *built("compile.weighted_accumulation compile.update_in_backward"),
    *built("compile.gathered_budget compile.activation_budget"),
    *refused(
        under("bf16", "bf16_master_weights_and_grads bf16_optimizer_states"),
        "master weights and optimizer states are fp32",
        OFF,
        False,
    ),
    *advises("bf16.immediate_grad_update", "when gradients are reduced is planned in the graph"),
    *refused(
        "amp.enabled",
        "Apex is not used",
        "set torch_autocast.enabled or bf16.enabled to true instead, or enabled to false",
        False,
    ),
    *dormant("amp"),
    *built("torch_autocast.enabled"),
    *built("torch_autocast.dtype", "bfloat16 is the only type"),
    *advises(
        "torch_autocast.lower_precision_safe_modules",
        "gradients are reduced in the type of their parameter; communication_data_type gives another",
    ),
    *refused(
        under("data_types", "param_dtype buffer_dtype"),
        "types follow from fp16.enabled and bf16.enabled alone",
        "leave it out",
        None,
    ),
    *advises(
        "seq_parallel_communication_data_type",
        "there is no sequence parallelism, so nothing is sent in this type",
    ),
    *refused("sparse_gradients", "embedding gradients are dense", OFF, False),
)

_REST = (
    *built(
        under(
            "activation_checkpointing",
            "number_checkpoints cpu_checkpointing partition_activations "
            "contiguous_memory_optimization synchronize_checkpoint_boundary profile",
        )
    ),
    *advises("aio", "nothing is read from or written to NVMe"),
    *refused(
        "checkpoint.tag_validation",
        "ranks do not compare tags",
        "set it to 'Warn' or 'Ignore', or leave it out",
        "WARN",
        "IGNORE",
    ),
    *refused(
        under("checkpoint", "load_universal use_node_local_storage"),
        "checkpoint directories are not built; engine.state_dict() gives the weights",
        OFF,
        False,
    ),
    *advises(
        under("checkpoint", "checkpoint_serialization parallel_write writer"),
        "checkpoint directories are not built, so nothing is written",
    ),
    *refused(
        "nebula.enabled",
        "checkpoint directories are not built; engine.state_dict() gives the weights",
        OFF,
        False,
    ),
    *refused(
        "datastates_ckpt",
        "checkpoint directories are not built; engine.state_dict() gives the weights",
        "leave it out",
        None,
    ),
    *built(
        "dataloader_drop_last",
        "of the loader that initialize(training_data=...) makes; the last rows may be fewer, and are then "
        "another shape",
    ),
    *refused(
        "disable_allgather", "new parameters are gathered wherever they are sharded", OFF, False
    ),
    *advises("graph_harvesting", "the whole step is one graph already"),
    *built(
        "zero_allow_untested_optimizer",
        "it permits an optimizer of your own; the graph shows which one is used",
    ),
    *advises("zero_force_ds_cpu_optimizer", "nothing is offloaded, so no CPU optimizer is used"),
    *advises(
        "steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level timers",
        "nothing is printed during training; plan.memory and plan.traffic say what a step holds and moves",
    ),
    *advises("vocabulary_size", "shapes are read from the model"),
    *advises(
        "flops_profiler.enabled comms_logger.enabled",
        "nothing is profiled; each node of the plan shows its cost and its bytes",
        False,
    ),
    *advises(
        "tensorboard.enabled wandb.enabled csv_monitor.enabled comet.enabled",
        "no monitor is written to; log the loss from your own loop",
        False,
    ),
    *dormant("flops_profiler comms_logger tensorboard wandb csv_monitor comet nebula"),
    *refused(
        "autotuning.enabled",
        "one config is one run",
        "set it to false, and compare plans of several configs instead",
        False,
    ),
    *refused(
        "elasticity.enabled",
        "the batch keys alone decide the batch",
        "set it to false and give train_batch_size",
        False,
    ),
    *refused(
        "data_efficiency.enabled curriculum_learning.enabled",
        "data is taken as it comes",
        "set it to false and order the data in your own loader",
        False,
    ),
    *refused(
        "compression_training.layer_reduction.enabled progressive_layer_drop.enabled "
        + under(
            "compression_training",
            "weight_quantization.shared_parameters.enabled "
            "activation_quantization.shared_parameters.enabled "
            "sparse_pruning.shared_parameters.enabled row_pruning.shared_parameters.enabled "
            "head_pruning.shared_parameters.enabled channel_pruning.shared_parameters.enabled",
        ),
        "the model is trained as it is written",
        "set it to false and change the model itself",
        False,
    ),
    *refused(
        "quantize_training weight_quantization sparse_attention",
        "the model is trained as it is written",
        "leave the section out and change the model itself",
        None,
        {},
    ),
    *refused("hybrid_engine.enabled", "the engine trains and does not generate", OFF, False),
    *refused(
        "compile.deepcompile",
        "the whole step is compiled, by zerograph",
        "set it to false or leave the section out",
        False,
    ),
    *refused(
        "tensor_parallel.autotp_size",
        "models are cut by their own code; zerograph.compile(mpu=...) takes one that is",
        "set it to 0 or leave the section out",
        0,
        1,
    ),
    *refused(
        "tensor_parallel.tensor_parallel.tp_size sequence_parallel_size",
        "the only axes are data parallel, and model parallel by the model's own code",
        "set it to 1 or leave it out",
        1,
    ),
    *refused(
        "expert_parallel.enabled use_data_before_expert_parallelism",
        "the only axes are data parallel, and model parallel by the model's own code",
        OFF,
        False,
    ),
    *refused(
        "pipeline",
        "the only axes are data parallel, and model parallel by the model's own code",
        "leave the section out",
        None,
        {},
    ),
    *dormant(
        "autotuning elasticity data_efficiency curriculum_learning compression_training "
        "progressive_layer_drop hybrid_engine compile tensor_parallel expert_parallel"
    ),
)

ROWS: tuple[Row, ...] = (*TRAINING_ROWS, *_PRECISION, *ZERO_ROWS, *_REST)
SUPPORT: dict[str, Row] = {row.key: row for row in ROWS}
