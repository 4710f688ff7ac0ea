"""The rows of batch, optimizer and scheduler in the table of what is built."""

from zerograph.config.row import OFF, advises, built, refused, under

_OPTION = "an option of the parameter groups, which the update reads at every step"

TRAINING_ROWS = (
    *built("train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    *built("gradient_clipping bf16.enabled optimizer.type"),
    *built(under("optimizer.params", "adam_w_mode amsgrad momentum nesterov maximize")),
    *built(
        under(
            "optimizer.params",
            "lr betas eps weight_decay dampening lr_decay initial_accumulator_value "
            "bias_correction min_coeff max_coeff",
        ),
        _OPTION,
    ),
    *built(
        "optimizer.params.torch_adam",
        f"it gives weight_decay torch's default; that is {_OPTION}",
    ),
    *refused("optimizer.params.eps_inside_sqrt", "eps is added to the square root", OFF, False),
    *refused(
        "optimizer.params.differentiable",
        "the update is not recorded by autograd",
        OFF,
        False,
    ),
    *refused(
        "optimizer.params.fp32_optimizer_states",
        "optimizer states are fp32",
        "leave it out",
        True,
    ),
    *advises(
        under("optimizer.params", "set_grad_none capturable foreach fused")
        + " optimizer.legacy_fusion",
        "one generated kernel updates each bucket, and gradients live in the graph",
    ),
    *built(
        "scheduler.type "
        + under(
            "scheduler.params",
            "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps "
            "warmup_min_ratio cos_min_ratio",
        ),
        f"it sets lr between steps; that is {_OPTION}",
    ),
    *refused(
        "scheduler.params.last_batch_iteration",
        "a schedule starts at its first step",
        "leave it out; the schedule starts at its first step",
        -1,
    ),
    *refused(
        "managed_gradient_accumulation",
        "the engine counts micro-batches and steps at the boundary",
        "set it to true or leave it out, and call step() after every micro-batch",
        True,
    ),
)
