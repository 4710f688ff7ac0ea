"""What ranks are forked from: a process that has imported all they need, and captured a model once.

Half of a rank's first capture is imports and tables that torch makes once. The capture here is without a
backward: autograd, once used, refuses to work in a fork.
"""

import pytest  # noqa: F401
import torch
import torch._dynamo
import torch.distributed
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers  # noqa: F401

import zerograph
import zerograph.engine
from tests import models, oracle, tiny  # noqa: F401


def capture() -> None:
    """Plan a step without gradients, and forget it."""
    model, batch = models.make("llama").eval(), models.batch_for("llama", 0)
    with torch.no_grad():
        zerograph.plan(model, oracle.config_for(3), example_inputs=batch, world_size=2)
    torch._dynamo.reset()


torch.set_num_threads(1)
capture()
