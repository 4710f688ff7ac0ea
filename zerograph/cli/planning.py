"""From what is named on the command line to plans and documents."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from zerograph.cli.options import Options
from zerograph.cli.source import Built, build
from zerograph.config import ZeroConfig, load_config
from zerograph.cost import cluster_of
from zerograph.document import Document
from zerograph.errors import PlanError, ZerographError, suggestion
from zerograph.fit import with_micro_batch
from zerograph.planning import plan_of, trace_of
from zerograph.trace import Trace

_DEVICES = ("cpu", "cuda")


def document_of(target: str, config: str | None, options: Options) -> Document:
    """A saved plan, or the plan of MODEL under `config`."""
    if is_saved(target):
        return Document.load(target)
    return planned(target, config, options)


def is_saved(target: str) -> bool:
    """Whether PLAN|MODEL is a file with a plan, or something that cannot be anything else.

    A JSON file is a model if it says its `model_type`.
    """
    if not os.path.isfile(target):
        return target.endswith(".json")
    try:
        given = json.loads(Path(target).read_bytes())
    except ValueError:
        return True
    return not isinstance(given, dict) or "model_type" not in given


def planned(model: str, config: str | None, options: Options) -> Document:
    """The plan of MODEL under the config in a file. Raises ZerographError for anything that fails."""
    cluster, loaded = cluster_of(options.cluster), config_from(config, options)
    return plan_of(trace_for(model, loaded, options), loaded).document(cluster)


def config_from(path: str | None, options: Options) -> ZeroConfig:
    """The config, with the micro-batch of --batch, checked for the ranks."""
    if path is None:
        raise PlanError("a model is planned under a config: --config ds.json")
    config, ranks = load_config(path), options.data_parallel
    config.batch(ranks)
    config.mesh(ranks, options.model_parallel)
    if options.batch is not None and options.batch > 0:
        config = with_micro_batch(config, options.batch)
        config.batch(ranks)
    return config


def trace_for(model: str, config: ZeroConfig, options: Options, micro: int | None = None) -> Trace:
    """Trace MODEL for a micro-batch: `micro`, --batch, the config's, or one row."""
    _require_device(options.device)
    for name, size in (("--batch", options.batch), ("--seq", options.seq)):
        if size is not None and size < 1:
            raise PlanError(f"{name} must be at least 1, got {size}")
    usual = config.batch(options.data_parallel).micro_batch_size
    built = build(model, options.input, micro or options.batch, options.seq, usual)
    return _traced(built, config, options)


def _traced(built: Built, config: ZeroConfig, options: Options) -> Trace:
    ranks, parts = options.data_parallel, options.model_parallel
    try:
        return trace_of(
            built.model, config, built.inputs, ranks, options.device, model_parallel=parts
        )
    except ZerographError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise PlanError(
            f"the forward of {type(built.model).__name__} raised {type(error).__name__}: {first}"
        ) from error


def recording_from(path: str | None) -> Any:
    """A recorded run of a plan, if one is given."""
    if path is None:
        return None
    from zerograph.recording import Recording

    return Recording.load(path)


def _require_device(device: str) -> None:
    if device not in _DEVICES:
        raise PlanError(f"no device type {device!r}{suggestion(device, _DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            "--device cuda needs a machine with CUDA: torch makes no CUDA tensors without it, not even "
            "fake ones; --device cpu plans the same collectives"
        )
