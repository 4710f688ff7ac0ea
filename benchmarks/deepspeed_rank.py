"""One rank of DeepSpeed ZeRO-3, run by `overlap.py` in DeepSpeed's own environment (`away.py`).

    DIR/bin/python benchmarks/deepspeed_rank.py '{"zero_optimization": {"stage": 3}}' fp32

It gets the config that zerograph gets, and torch's fused AdamW as its optimizer.
"""

import json
import os
import sys
from collections.abc import Callable

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from away import serve
from contest import batch_of, llama
from peers import adamw


def make() -> Callable[[int], float]:
    """The engine, and its step."""
    torch.set_num_threads(1)
    config = json.loads(sys.argv[1])
    config.pop("optimizer")
    config["zero_allow_untested_optimizer"] = True
    deepspeed.init_distributed(dist_backend="gloo")
    model = llama()
    optimizer = adamw(list(model.parameters()))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(index: int) -> float:
        loss = engine(**batch_of(index, dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    serve(make)
