"""The config: DeepSpeed's JSON, read strictly.

    config = load_config("ds_config.json")     # or a dict
    config.zero_optimization.stage
    config.batch(world_size=8)                 # Batch(train_batch_size, micro_batch_size, ...)
    config.advisory()                          # what was given and changes nothing, and why

No key is dropped in silence: an unknown one is an error with the nearest known name, and a known
one whose function is not built is an error unless it asks for what happens anyway. `support` is the
table that says which is which. Nothing here imports torch.
"""

from zerograph.config.batch import Batch
from zerograph.config.load import load_config
from zerograph.config.model import ZeroConfig
from zerograph.config.optimizer import (
    AdagradOptimizer,
    AdagradParams,
    AdamOptimizer,
    AdamParams,
    LambOptimizer,
    LambParams,
    LionOptimizer,
    LionParams,
    SgdOptimizer,
    SgdParams,
)
from zerograph.config.scheduler import (
    WarmupCosineLR,
    WarmupCosineLRParams,
    WarmupDecayLR,
    WarmupDecayLRParams,
    WarmupLR,
    WarmupLRParams,
)

__all__ = [
    "AdagradOptimizer",
    "AdagradParams",
    "AdamOptimizer",
    "AdamParams",
    "Batch",
    "LambOptimizer",
    "LambParams",
    "LionOptimizer",
    "LionParams",
    "SgdOptimizer",
    "SgdParams",
    "WarmupCosineLR",
    "WarmupCosineLRParams",
    "WarmupDecayLR",
    "WarmupDecayLRParams",
    "WarmupLR",
    "WarmupLRParams",
    "ZeroConfig",
    "load_config",
]
