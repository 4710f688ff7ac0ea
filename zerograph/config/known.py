"""What DeepSpeed knows beyond the config's keys: other types, retired keys, and what to use."""

OPTIMIZER_TYPES = ("Adam", "AdamW", "SGD", "Adagrad", "Lion", "Lamb")
SCHEDULER_TYPES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

# Known types that are not built, and what comes nearest to them.
UNBUILT_TYPES = {
    "optimizer": {
        "DeepSpeedCPUAdam": "AdamW",
        "FusedAdam": "Adam",
        "Muon": "AdamW",
        "OneBitAdam": "AdamW",
        "ZeroOneAdam": "AdamW",
        "OneBitLamb": "Lamb",
        "MuAdam": "Adam",
        "MuAdamW": "AdamW",
        "MuSGD": "SGD",
        "Adadelta": "AdamW",
        "Adafactor": "AdamW",
        "Adamax": "AdamW",
        "ASGD": "SGD",
        "NAdam": "AdamW",
        "RAdam": "AdamW",
        "RMSprop": "AdamW",
        "Rprop": "SGD",
    },
    "scheduler": {"LRRangeTest": "WarmupLR", "OneCycle": "WarmupCosineLR"},
}

# Keys that DeepSpeed had once, or has elsewhere.
RETIRED = {
    "allgather_size": "give zero_optimization.allgather_bucket_size",
    "fp32_allreduce": "give communication_data_type",
    "compile.enabled": "leave it out; the whole step is always compiled",
    "compile.backend": "leave it out; the whole step is always compiled",
    "compile.kwargs": "leave it out; the whole step is always compiled",
    "zero_optimization.grad_hooks": "leave it out; the graph says when gradients are reduced",
    "optimizer.params.max_grad_norm": "give gradient_clipping at the top level",
    "optimizer.params.params": "leave it out; the model's parameters are used",
}

# What to give for a key that is missing or "auto": the Hugging Face Trainer's argument, mostly.
MEANING = {
    "optimizer.params.lr": "the Trainer's learning_rate",
    "optimizer.params.betas": "the Trainer's [adam_beta1, adam_beta2]",
    "optimizer.params.eps": "the Trainer's adam_epsilon",
    "optimizer.params.weight_decay": "the Trainer's weight_decay",
    "scheduler.params.warmup_max_lr": "the Trainer's learning_rate",
    "scheduler.params.warmup_num_steps": "the Trainer's warmup_steps",
    "scheduler.params.total_num_steps": "the number of optimizer steps of the whole run",
    "scheduler.params": "an object with total_num_steps",
    "gradient_clipping": "the Trainer's max_grad_norm",
    "bf16.enabled": "the Trainer's bf16",
    "fp16.enabled": "the Trainer's fp16",
}
