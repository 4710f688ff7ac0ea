"""The config: defaults, what is refused and how it is said, batch arithmetic."""

import json
import re
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.keys import all_leaves, nest
from zerograph import errors
from zerograph.config import AdamOptimizer, Batch, SgdOptimizer, WarmupLR, ZeroConfig, load_config
from zerograph.config.check import row_for
from zerograph.config.known import RETIRED
from zerograph.config.support import ROWS, SUPPORT
from zerograph.errors import ConfigError


def refusal(source: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value)


# --- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "default"),
    [
        ("zero_optimization.stage", 0),
        ("zero_optimization.reduce_bucket_size", 500_000_000),
        ("zero_optimization.allgather_bucket_size", 500_000_000),
        ("zero_optimization.sub_group_size", 1_000_000_000),
        ("zero_optimization.overlap_comm", None),
        ("zero_optimization.contiguous_gradients", True),
        ("zero_optimization.stage3_prefetch_bucket_size", 50_000_000),
        ("zero_optimization.stage3_param_persistence_threshold", 100_000),
        ("zero_optimization.stage3_model_persistence_threshold", sys.maxsize),
        ("zero_optimization.stage3_max_live_parameters", 1_000_000_000),
        ("zero_optimization.stage3_max_reuse_distance", 1_000_000_000),
        ("zero_optimization.zero_hpz_partition_size", 1),
        ("zero_optimization.mics_shard_size", -1),
        ("zero_optimization.offload_param", None),
        ("aio.block_size", 1_048_576),
        ("aio.queue_depth", 8),
        ("activation_checkpointing.number_checkpoints", None),
        ("fp16.initial_scale_power", 16),
        ("fp16.loss_scale_window", 1000),
        ("bf16.enabled", False),
        ("gradient_clipping", 1.0),
        ("gradient_predivide_factor", 1.0),
        ("zero_force_ds_cpu_optimizer", True),
        ("train_batch_size", None),
        ("optimizer", None),
        ("scheduler", None),
    ],
)
def test_defaults_are_deepspeeds(path: str, default: object) -> None:
    value: Any = load_config({})
    for key in path.split("."):
        value = getattr(value, key)
    assert value == default


def test_offload_sections_have_deepspeeds_defaults() -> None:
    zero = load_config(
        {"zero_optimization": {"offload_param": {}, "offload_optimizer": {}}}
    ).zero_optimization
    assert zero.offload_param is not None and zero.offload_optimizer is not None
    param, optimizer = zero.offload_param, zero.offload_optimizer
    assert (param.device, param.buffer_count, param.buffer_size) == ("none", 5, 100_000_000)
    assert (param.max_in_cpu, param.pin_memory) == (1_000_000_000, True)
    assert (optimizer.device, optimizer.buffer_count, optimizer.ratio) == ("none", 4, 1.0)


def test_adam_defaults_and_mode() -> None:
    optimizer = load_config({"optimizer": {"type": "adam"}}).optimizer
    assert isinstance(optimizer, AdamOptimizer)
    params = optimizer.params
    assert optimizer.type == "Adam" and optimizer.decoupled
    assert (params.lr, params.betas, params.eps) == (1e-3, (0.9, 0.999), 1e-8)
    assert params.weight_decay == 0.0


@pytest.mark.parametrize(
    ("kind", "params", "decoupled", "weight_decay"),
    [
        ("Adam", {"adam_w_mode": False}, False, 0.0),
        ("AdamW", {}, True, 0.0),
        ("AdamW", {"torch_adam": True}, True, 0.01),
        ("Adam", {"torch_adam": True}, True, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, False, 0.0),
        ("AdamW", {"torch_adam": True, "weight_decay": 0}, True, 0.0),
    ],
)
def test_adam_weight_decay(
    kind: str, params: dict[str, Any], decoupled: bool, weight_decay: float
) -> None:
    optimizer = load_config({"optimizer": {"type": kind, "params": params}}).optimizer
    assert isinstance(optimizer, AdamOptimizer)
    assert (optimizer.decoupled, optimizer.params.weight_decay) == (decoupled, weight_decay)


def test_sgd_and_schedulers_are_typed() -> None:
    config = load_config(
        {
            "optimizer": {"type": "SGD", "params": {"momentum": 0.9, "nesterov": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1e3}},
        }
    )
    assert isinstance(config.optimizer, SgdOptimizer) and config.optimizer.params.nesterov
    assert isinstance(config.scheduler, WarmupLR)
    assert config.scheduler.params.warmup_num_steps == 1000
    assert config.scheduler.params.warmup_type == "log"
    assert config.scheduler.params.warmup_max_lr is None


# --- the table of what is built ------------------------------------------------------------------


def test_every_key_has_one_row_and_every_row_a_key() -> None:
    keys = [*all_leaves(), "amp.opt_level"]  # the one section that takes any key
    assert len(SUPPORT) == len(ROWS), "a key has two rows"
    used = {row_for(path).key for path in keys}
    assert set(SUPPORT) == used


@pytest.mark.parametrize("path", [path for path, row in SUPPORT.items() if row.kind == "refused"])
def test_refused_rows_accept_their_default_and_say_how_to_mend(path: str) -> None:
    row, default = SUPPORT[path], all_leaves()[path]
    assert default in row.accepts
    assert row.here and row.mend


@pytest.mark.parametrize("path", [path for path, row in SUPPORT.items() if row.kind == "advises"])
def test_advising_rows_say_what_happens(path: str) -> None:
    assert SUPPORT[path].here


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("zero_optimization.offload_param.device", "cpu"),
        ("zero_optimization.offload_optimizer.device", "nvme"),
        ("zero_optimization.cpu_offload", True),
        ("zero_optimization.cpu_offload_param", True),
        ("zero_optimization.zero_quantized_weights", True),
        ("zero_optimization.zero_quantized_gradients", True),
        ("zero_optimization.mics_hierarchical_params_gather", True),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("bf16.bf16_master_weights_and_grads", True),
        ("fp16.fp16_master_weights_and_grads", True),
        ("sparse_gradients", True),
        ("amp.enabled", True),
        ("elasticity.enabled", True),
        ("autotuning.enabled", True),
        ("compression_training.row_pruning.shared_parameters.enabled", True),
        ("compression_training.layer_reduction.enabled", True),
        ("curriculum_learning.enabled", True),
        ("data_efficiency.enabled", True),
        ("sparse_attention", {"mode": "fixed"}),
        ("hybrid_engine.enabled", True),
        ("compile.deepcompile", True),
        ("tensor_parallel.autotp_size", 4),
        ("expert_parallel.enabled", True),
        ("optimizer.params.differentiable", True),
        ("scheduler.params.last_batch_iteration", 100),
        ("managed_gradient_accumulation", False),
    ],
)
def test_what_is_not_built_is_refused(path: str, value: object) -> None:
    message = refusal(nest(path, value))
    assert message.startswith(f"{path}={json.dumps(value)}: not built: ")
    assert SUPPORT[path].mend in message


def test_every_unbuilt_value_is_listed_at_once() -> None:
    message = refusal({"sparse_gradients": True, "disable_allgather": True})
    assert message.splitlines()[0] == "2 problems in the config"
    assert "disable_allgather=true" in message and "sparse_gradients=true" in message


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": False, "initial_scale_power": 12}},
        {"elasticity": {"enabled": False, "max_train_batch_size": 2000}},
        {"amp": {"enabled": False, "opt_level": "O1"}},
        {"tensorboard": {"enabled": False, "output_path": "x"}},
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "none", "pin_memory": True},
                "offload_param": None,
                "stage3_max_live_parameters": 7,
            }
        },
        {"activation_checkpointing": {"cpu_checkpointing": False, "number_checkpoints": None}},
        {"communication_data_type": "fp32"},
        {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}},
        {"communication_data_type": "BF16", "bf16": {"enabled": True}},
        {"bfloat16": {"enabled": True}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "mics_shard_size": -1}},
        {"compression_training": {"row_pruning": {"shared_parameters": {"enabled": False}}}},
    ],
)
def test_what_matches_is_accepted_without_advice(config: dict[str, Any]) -> None:
    assert load_config(config).advisory() == ()


def test_a_config_that_skipped_the_loader_is_checked_too() -> None:
    config = ZeroConfig(sparse_gradients=True)
    assert refusal(config).startswith("sparse_gradients=true")
    good = ZeroConfig(gradient_clipping=0.5)
    assert load_config(good) is good


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "fp16.enabled and bf16.enabled are both true",
        ),
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            "torch_autocast.enabled and bf16.enabled are both true",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast.dtype: autocast to fp16 needs a scaled loss",
        ),
        (
            {"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
            "'bf16' cannot keep fp16 gradients",
        ),
        (
            {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
            "both say what is divided before the sum",
        ),
        ({"gradient_allreduce_op": "sum", "prescale_gradients": True}, "divides nothing"),
        (
            {"gradient_allreduce_op": "sum", "compile": {"weighted_accumulation": True}},
            "gives a weighted mean",
        ),
        *(
            ({"gradient_clipping": 0, "compile": {"update_in_backward": True}, **more}, says)
            for says, more in {
                "update_in_backward: gradient_clipping .* set it to 0": {"gradient_clipping": 0.5},
                "update_in_backward: fp16.enabled .* use bf16": {"fp16": {"enabled": True}},
                "update_in_backward: bf16.check_grad_overflow .* set it to false": {
                    "bf16": {"enabled": True}
                },
                "update_in_backward: optimizer.type='Lamb' .* use AdamW": {
                    "optimizer": {"type": "lamb"}
                },
                "update_in_backward: zero_optimization.overlap_comm=false": {
                    "zero_optimization": {"stage": 1, "overlap_comm": False}
                },
                "update_in_backward: compile.weighted_accumulation": {
                    "compile": {"update_in_backward": True, "weighted_accumulation": True}
                },
            }.items()
        ),
        (
            {"activation_checkpointing": {"contiguous_memory_optimization": True}},
            "contiguous_memory_optimization needs number_checkpoints",
        ),
    ],
)
def test_keys_that_exclude_each_other(config: dict[str, Any], says: str) -> None:
    assert re.search(says, refusal(config))


def test_updates_in_the_backward_and_the_clipping_that_is_not_given() -> None:
    found = refusal({"compile": {"update_in_backward": True}})
    assert "gradient_clipping" in found and "it is 1.0 when it is not given" in found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss_scale", -1.0),
        ("initial_scale_power", -1),
        ("initial_scale_power", 127),
        ("loss_scale_window", 0),
        ("hysteresis", 0),
        ("min_loss_scale", 0),
    ],
)
def test_impossible_loss_scales_are_refused(key: str, value: float) -> None:
    assert f"fp16.{key}" in refusal({"fp16": {"enabled": True, key: value}})


# --- advice -------------------------------------------------------------------------------------

STAGE3 = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 10000,
            "warmup_min_lr": 0,
            "warmup_max_lr": 3e-5,
            "warmup_num_steps": 500,
        },
    },
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


def test_a_stage_3_config_of_the_docs(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(STAGE3))
    config = load_config(path)
    assert config.zero_optimization.stage == 3 and config.precision == "bf16"
    assert config.zero_optimization.stage3_prefetch_bucket_size == 50_000_000
    assert config.batch(8) == Batch(64, 4, 2)
    silent = (
        "nothing is printed during training; "
        "plan.memory and plan.traffic say what a step holds and moves"
    )
    grouped = "the optimizer updates one bucket after the other, so there is no other group to size"
    zero = "zero_optimization"
    assert config.advisory() == (
        f"steps_per_print=2000: {silent}",
        f"wall_clock_breakdown=false: {silent}",
        f"{zero}.contiguous_gradients=true: gradients are always written into flat buckets",
        (
            f"{zero}.stage3_gather_16bit_weights_on_model_save=true: "
            "whole weights are gathered when they are asked for"
        ),
        f"{zero}.sub_group_size=1000000000: {grouped}",
    )
    assert load_config(str(path)) == config == load_config(STAGE3)


def test_defaults_give_no_advice_and_monitors_do() -> None:
    assert load_config({}).advisory() == ()
    config = load_config({"wandb": {"enabled": True, "team": "t"}})
    assert config.advisory() == (
        "wandb.enabled=true: no monitor is written to; log the loss from your own loop",
    )


def test_advice_never_shows_a_secret() -> None:
    config = load_config({"comet": {"enabled": True, "api_key": "hush"}})
    assert "hush" not in repr(config) + "".join(config.advisory())


# --- unknown, repeated and mistyped keys ----------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"zero_optimization": {"stage3_prefetch_bucket_sise": 1}},
            (
                "zero_optimization.stage3_prefetch_bucket_sise: unknown key; "
                "did you mean 'stage3_prefetch_bucket_size'?"
            ),
        ),
        (
            {"train_batchsize": 1},
            "train_batchsize: unknown key; did you mean 'train_batch_size'?",
        ),
        ({"BF16": {}}, "BF16: unknown key; did you mean 'bf16'?"),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise: unknown key; did you mean 'device'?",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.9]}}},
            "optimizer.params.beta: unknown key; did you mean 'betas'?",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            "scheduler.params.warmup_steps: unknown key; did you mean 'warmup_num_steps'?",
        ),
        (
            {"activation_checkpointing": {"partitioned_activations": True}},
            (
                "activation_checkpointing.partitioned_activations: unknown key; "
                "did you mean 'partition_activations'?"
            ),
        ),
        ({"stage": 3}, "stage: unknown key; it belongs in zero_optimization"),
        ({5: 3}, "5: unknown key, and none here is like it"),
        (
            {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
            (
                "optimizer.params.max_grad_norm: not a key (any more); "
                "give gradient_clipping at the top level"
            ),
        ),
    ],
)
def test_unknown_keys(config: dict[Any, Any], line: str) -> None:
    assert refusal(config) == line


def test_all_unknown_keys_are_reported_at_once() -> None:
    message = refusal({"zro": 1, "fp16": {"enable": True}, "zero_optimization": {"stag": 3}})
    assert message.splitlines()[0] == "3 problems in the config"
    for key in ("zro", "fp16.enable", "zero_optimization.stag"):
        assert f"\n  {key}: unknown key" in message


@pytest.mark.parametrize("key", ["_comment", "//", "#why", "comment"])
def test_a_comment_is_no_key(key: str) -> None:
    assert refusal({key: "x"}) == f"{key}: unknown key; JSON has no comments, so take it out"


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_batch_size": "many"},
        {"zro": 1},
        {"zero_optimization": {"stage": "third"}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": 7}}},
    ],
)
def test_what_is_not_built_is_said_beside_wrong_names_and_types(wrong: dict[str, Any]) -> None:
    first, *rest = refusal({**wrong, "sparse_gradients": True}).splitlines()
    assert first == "2 problems in the config"
    assert rest[1].startswith("  sparse_gradients=true: not built")


def test_what_contradicts_and_what_is_not_built_are_said_together() -> None:
    both = {"fp16": {"enabled": True}, "bf16": {"enabled": True}, "sparse_gradients": True}
    message = refusal(both)
    assert "fp16.enabled and bf16.enabled are both true" in message
    assert "sparse_gradients=true: not built" in message


@pytest.mark.parametrize("path", sorted(RETIRED))
def test_retired_keys_say_what_to_use(path: str) -> None:
    assert path not in all_leaves()
    assert refusal(nest(path, 1)).endswith(RETIRED[path])


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"train_batch_size": 1.5}, "train_batch_size: must be a whole number, got 1.5"),
        ({"train_batch_size": "32"}, 'train_batch_size: must be a whole number, got "32"'),
        ({"train_batch_size": 0}, "train_batch_size: must be above 0, got 0"),
        ({"train_batch_size": True}, "train_batch_size: must be a whole number, got true"),
        ({"gradient_clipping": "1e-3"}, 'gradient_clipping: must be a number, got "1e-3"'),
        ({"gradient_clipping": -1}, "gradient_clipping: must be at least 0, got -1"),
        (
            {"gradient_clipping": float("nan")},
            "gradient_clipping: must be a finite number, got NaN",
        ),
        ({"bf16": {"enabled": 1}}, "bf16.enabled: must be true or false, got 1"),
        ({"bf16": True}, "bf16: must be an object {...}, got true"),
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage: must be at most 3, got 4",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            (
                "zero_optimization.offload_param.device: must be one of 'none', 'cpu' or 'nvme', "
                'got "gpu"'
            ),
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}},
            "optimizer.params.betas.1: must be below 1, got 1.0",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.9, 0.9]}}},
            "optimizer.params.betas: must be a list of 2, got [0.9, 0.9, 0.9]",
        ),
        (
            {"optimizer": {}},
            "optimizer.type: missing or not a string; give one of Adam, AdamW, SGD, Adagrad, Lion, Lamb",
        ),
        ({"optimizer": 3}, "optimizer: must be an object {...} with a type, got 3"),
        (
            {"optimizer": {"type": "Muon", "params": {"lr": 1}}},
            (
                'optimizer.type="Muon": not built: the types that are built are Adam, AdamW, SGD, '
                "Adagrad, Lion, Lamb; AdamW comes nearest"
            ),
        ),
        (
            {"optimizer": {"type": "Lamb", "params": {"eps_inside_sqrt": True}}},
            (
                "optimizer.params.eps_inside_sqrt=true: not built: eps is added to the square root; "
                "set it to false or leave it out"
            ),
        ),
        (
            {"optimizer": {"type": "lamb", "params": {"min_coeff": 11.0}}},
            (
                "optimizer.params: the trust ratio is kept within min_coeff and max_coeff, so min_coeff must "
                "be at most max_coeff, got min_coeff=11.0 and max_coeff=10.0"
            ),
        ),
        (
            {"optimizer": {"type": "Lamb", "params": {"eps": 0.0}}},
            "optimizer.params.eps: must be above 0, got 0.0",
        ),
        (
            {"optimizer": {"type": "Lamb", "params": {"max_grad_norm": 1.0}}},
            "optimizer.params.max_grad_norm: not a key (any more); give gradient_clipping at the top level",
        ),
        (
            {"optimizer": {"type": "Adamm"}},
            "optimizer.type=\"Adamm\": unknown type; did you mean 'Adam'?",
        ),
        (
            {"scheduler": {"type": "OneCycle"}},
            (
                'scheduler.type="OneCycle": not built: the types that are built are WarmupLR, '
                "WarmupDecayLR, WarmupCosineLR; WarmupCosineLR comes nearest"
            ),
        ),
        (
            {"scheduler": {"type": "warmuplr"}},
            "scheduler.type=\"warmuplr\": unknown type; did you mean 'WarmupLR'?",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {}}},
            (
                "scheduler.params.total_num_steps: missing; "
                "give the number of optimizer steps of the whole run"
            ),
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}},
            "scheduler.params.warmup_type: must be one of 'log' or 'linear', got \"cosine\"",
        ),
        (
            {"zero_optimization": {"stage3_max_live_parameters": 1, "max_live_parameters": 1}},
            (
                "zero_optimization: 'max_live_parameters' and 'stage3_max_live_parameters' are the "
                "same key; keep one of them"
            ),
        ),
    ],
)
def test_wrong_values_are_one_readable_line(config: dict[str, Any], line: str) -> None:
    assert refusal(config) == line


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "SGD", "params": {"nesterov": True}}},
        {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
    ],
)
def test_parameters_that_contradict_each_other(config: dict[str, Any]) -> None:
    assert refusal(config).startswith("optimizer")


def test_both_spellings_are_one_key() -> None:
    zero = load_config({"zero_optimization": {"prefetch_bucket_size": 5e8}}).zero_optimization
    assert zero.stage3_prefetch_bucket_size == 500_000_000
    assert type(zero.stage3_prefetch_bucket_size) is int
    assert load_config({"aio": {"thread_count": 4}}).aio.intra_op_parallelism == 4


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("optimizer.params.lr", "learning_rate"),
        ("scheduler.params.warmup_max_lr", "learning_rate"),
        ("scheduler.params.warmup_num_steps", "warmup_steps"),
        ("fp16.loss_scale_window", "default 1000"),
    ],
)
def test_auto_names_the_value_to_give(path: str, words: str) -> None:
    message = refusal(nest(path, "auto"))
    assert message.startswith(f'{path}: "auto" is not solved here') and words in message


def test_the_trainers_auto_is_its_default_where_it_has_one() -> None:
    """A config as the documents of transformers have it; only what is the user's own must be given."""
    auto = "auto"
    params = {"lr": auto, "betas": auto, "eps": auto, "weight_decay": auto}
    warm = {"warmup_min_lr": auto, "warmup_max_lr": auto, "warmup_num_steps": auto}
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
    given: dict[str, Any] = {
        "fp16": {"enabled": auto},
        "bf16": {"enabled": auto},
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {"type": "WarmupLR", "params": warm},
        "zero_optimization": {"stage": 3, **dict.fromkeys(sizes, auto)},
        "gradient_clipping": auto,
        "train_micro_batch_size_per_gpu": auto,
        "steps_per_print": float("inf"),
    }
    message = refusal(given)
    for key in ("optimizer.params.lr", "warmup_max_lr", "warmup_num_steps"):
        assert f'{key}: "auto" is not solved here' in message
    assert message.count("auto") == 3
    params["lr"], warm["warmup_num_steps"] = 2e-4, 100  # type: ignore[assignment]
    config = load_config(given)
    assert config.precision == "fp32" and config.gradient_clipping == 1.0
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.scheduler is not None and config.scheduler.params.warmup_max_lr == 2e-4  # type: ignore[union-attr]
    lines = [line for line in config.advisory() if '="auto": ' in line]
    assert len(lines) == 10
    assert any(
        line.startswith('optimizer.params.betas="auto": [0.9, 0.999] is used') for line in lines
    )


# --- files --------------------------------------------------------------------------------------


def test_repeated_keys_are_named_with_their_path(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"bf16": {"enabled": true, "enabled": false}, "steps_per_print": 1}')
    assert refusal(path) == f"{path}: bf16.enabled: given more than once; keep one"
    path.write_text('{"dump_state": true, "dump_state": true}')
    assert refusal(path) == f"{path}: dump_state: given more than once; keep one"


def test_broken_json_says_where(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{\n  "train_batch_size": 8,\n}')
    assert refusal(path).startswith(f"{path}: line ") and "broken JSON" in refusal(path)
    path.write_text('{\n  "train_batch_size" 8}')
    assert refusal(path).startswith(f"{path}: line 2, column 22: broken JSON: ")


def test_files_that_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert refusal(path) == f"{path}: no such config file"
    assert "cannot be read" in refusal(tmp_path)
    path.write_text("[1]")
    assert refusal(path) == f"{path}: a config is a JSON object {{...}}, got list"
    path.write_text('{"gradient_clipping": NaN}')
    assert refusal(path) == f"{path}: NaN is not a JSON number; give a finite one"
    path.write_text('{"zro": 1}')
    assert refusal(path).startswith(f"{path}: zro: unknown key")
    assert "json.loads" in refusal('{"train_batch_size": 8}')
    assert refusal([1]) == "a config is a dict, a path or a ZeroConfig, got list"


def test_the_mapping_is_neither_kept_nor_changed() -> None:
    source = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}
    before = json.dumps(source)
    config = load_config(UserDict({"zero_optimization": UserDict(source["zero_optimization"])}))
    assert config == load_config(source) and json.dumps(source) == before
    source["zero_optimization"]["stage"] = 1
    assert config.zero_optimization.stage == 3


def test_frozen() -> None:
    config = load_config({})
    with pytest.raises(ValidationError):
        config.zero_optimization.stage = 3
    with pytest.raises(ValidationError):
        config.gradient_clipping = 0.0


def test_errors_are_value_errors() -> None:
    names = ("ConfigError", "CaptureError", "PlanError", "VerifyError", "AgreementError")
    for kind in (getattr(errors, name) for name in names):
        assert issubclass(kind, errors.ZerographError) and issubclass(kind, ValueError)
        assert kind.__doc__


def test_the_config_needs_no_torch() -> None:
    config = Path(__file__).parents[1] / "zerograph" / "config"
    for file in config.glob("*.py"):
        assert "import torch" not in file.read_text(), file.name
    code = (
        "import sys, types; package = types.ModuleType('zerograph'); "
        f"package.__path__ = [{str(config.parent)!r}]; sys.modules['zerograph'] = package; "
        "sys.modules['torch'] = None; import zerograph.config as c; c.load_config({})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- batch arithmetic ---------------------------------------------------------------------------

sizes = st.integers(1, 64)
KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch(values: tuple[object, ...], world_size: int, absent: str = "leave") -> Batch:
    config = dict(zip(KEYS, values, strict=True))
    if absent == "leave":
        config = {key: value for key, value in config.items() if value is not None}
    else:
        config = {key: "auto" if value is None else value for key, value in config.items()}
    return load_config(config).batch(world_size)


@given(sizes, sizes, st.integers(1, 1024), st.sampled_from(["leave", "auto"]))
def test_any_two_give_the_third(micro: int, steps: int, world: int, absent: str) -> None:
    train = micro * steps * world
    for values in (
        (train, micro, steps),
        (train, micro, None),
        (train, None, steps),
        (None, micro, steps),
    ):
        assert batch(values, world, absent) == Batch(train, micro, steps)
    assert batch((None, micro, None), world, absent) == Batch(micro * world, micro, 1)
    assert batch((micro * world, None, None), world, absent) == Batch(micro * world, micro, 1)


maybe = st.none() | sizes


@given(maybe, maybe, maybe, st.integers(1, 16))
def test_what_is_solved_always_multiplies_out(
    train: int | None, micro: int | None, steps: int | None, world: int
) -> None:
    try:
        result = batch((train, micro, steps), world)
    except ConfigError as error:
        numbers = [value for value in (train, micro, steps) if value is not None]
        assert numbers and all(f"={value}" in str(error) for value in numbers)
        return
    if result.micro_batch_size is None:
        assert (train, micro, steps, result.train_batch_size) == (None, None, None, None)
        return
    assert result.train_batch_size == result.micro_batch_size * result.accumulation * world
    assert train in (None, result.train_batch_size) and micro in (None, result.micro_batch_size)
    assert steps in (None, result.accumulation)


def test_batch_of_nothing_and_of_accumulation_alone() -> None:
    assert load_config({}).batch(8) == Batch(None, None, 1)
    with pytest.raises(ConfigError, match="give train_batch_size or train_micro_batch_size"):
        batch((None, None, 4), 2)
    with pytest.raises(ConfigError, match="world_size must be at least 1, got 0"):
        load_config({}).batch(0)


@pytest.mark.parametrize(
    ("values", "world", "numbers"),
    [
        ((32, 4, 3), 2, ("train_batch_size=32", "=4 x", "=3 x", "world_size=2", "(= 24)")),
        ((32, 5, None), 2, ("train_batch_size=32", "per_gpu=5", "world_size=2", "(= 10)")),
        ((32, None, 3), 2, ("train_batch_size=32", "steps=3", "world_size=2", "(= 6)")),
        ((3, None, None), 2, ("train_batch_size=3", "world_size=2")),
    ],
)
def test_batch_errors_show_all_numbers(
    values: tuple[object, ...], world: int, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        batch(values, world)
    assert all(number in str(caught.value) for number in numbers)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_section_that_is_null_is_left_out(section: str) -> None:
    loaded = load_config({section: None})
    assert getattr(loaded, section) is None and not loaded.advisory()
