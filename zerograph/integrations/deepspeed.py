"""The names that a DeepSpeed training script calls first, thin over the same engine.

parser = zerograph.add_config_arguments(parser)
zerograph.init_distributed()
engine, optimizer, dataloader, scheduler = zerograph.initialize(
    args=args, model=model, model_parameters=model.parameters(), training_data=dataset)
"""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from zerograph.client import Given
from zerograph.config import ZeroConfig
from zerograph.engine import Engine, compile
from zerograph.errors import ConfigError, PlanError
from zerograph.runtime.optimizer import ShardedOptimizer

Config = Mapping[str, Any] | str | os.PathLike[str] | ZeroConfig


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config FILE` to a script's parser, and answer it.

    `--local_rank`, which old launchers pass, is accepted and not used.
    """
    group = parser.add_argument_group("zerograph", "ZeRO from a DeepSpeed config")
    group.add_argument("--deepspeed", action="store_true", help="accepted; always on")
    group.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed config, JSON")
    known = {option for action in parser._actions for option in action.option_strings}
    if "--local_rank" not in known:
        group.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def initialize(
    args: argparse.Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: Given | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: LRScheduler | Callable[[ShardedOptimizer], LRScheduler] | None = None,
    config: Config | None = None,
    config_params: Config | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    mpu: Any = None,
) -> tuple[Engine, ShardedOptimizer | None, DataLoader[Any] | None, LRScheduler | None]:
    """Compile `model` and answer (engine, optimizer, dataloader, scheduler), as DeepSpeed does.

    The config is `config`, or `config_params`, or the file that `args.deepspeed_config` names.
    `model_parameters` may be parameters or torch's list of groups. With `training_data` the dataloader
    gives each rank its own micro-batches. `lr_scheduler` may be a function from the optimizer to
    a scheduler, or one on the `optimizer` given. `optimizer` is an instance, which has its own groups, or
    a function from `model_parameters` to one; it wins over the config's `optimizer` section. `mpu` has the
    model-parallel group, as for `zerograph.compile`; a micro-batch is then one for all of its ranks.
    """
    if model is None:
        raise PlanError("initialize needs model=")
    made = isinstance(optimizer, torch.optim.Optimizer)
    engine = compile(
        model,
        _config(args, config, config_params),
        param_groups=None if made else _groups(model, model_parameters),
        optimizer=optimizer,
        mpu=mpu,
    )
    if isinstance(lr_scheduler, LRScheduler):
        if lr_scheduler.optimizer is not optimizer:
            raise PlanError(
                "initialize(lr_scheduler=...): the scheduler is not on the `optimizer` given here; give "
                "that one too, or a function from the optimizer to a scheduler"
            )
        engine.lr_scheduler = lr_scheduler
    elif lr_scheduler is not None:
        if engine.optimizer is None:
            raise PlanError(
                "initialize(lr_scheduler=...) needs an `optimizer` section in the config"
            )
        engine.lr_scheduler = lr_scheduler(engine.optimizer)
    loader = None if training_data is None else _loader(engine, training_data, collate_fn)
    return engine, engine.optimizer, loader, engine.lr_scheduler


def _config(
    args: argparse.Namespace | None, config: Config | None, config_params: Config | None
) -> Config:
    named = getattr(args, "deepspeed_config", None)
    given = [c for c in (config, config_params, named) if c is not None]
    if not given:
        raise ConfigError(
            "no config: give initialize(config=...), or --deepspeed_config FILE on the command line"
        )
    if len(given) > 1:
        raise ConfigError("two configs: give either config= or --deepspeed_config, not both")
    return given[0]


def _groups(model: nn.Module, given: Iterable[Any] | None) -> list[Mapping[str, Any]] | None:
    """Parameter groups of `model_parameters`; parameters that are not in it are frozen, as named."""
    if given is None:
        return None
    listed = list(given)
    if listed and isinstance(listed[0], Mapping):
        return listed
    return [{"params": [p for p in listed if p.requires_grad]}]


def _loader(
    engine: Engine, data: Dataset[Any], collate_fn: Callable[[list[Any]], Any] | None
) -> DataLoader[Any]:
    """A loader of this rank's micro-batches."""
    micro = engine.batch.micro_batch_size
    if micro is None:
        raise ConfigError(
            "train_micro_batch_size_per_gpu: initialize(training_data=...) needs it (or train_batch_size)"
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, num_replicas=engine.world.size, rank=engine.world.rank
    )
    return DataLoader(
        data,
        batch_size=micro,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=engine.config.dataloader_drop_last,
    )
