"""Kernels of a plan: those that an engine runs, their sources, what they serve, and their names."""

import itertools
import re
from typing import Any

import pytest
import torch

import zerograph
from tests import tiny
from tests.models import batch_for, loss_of, make
from tests.oracle import config_for
from tests.ranks import run_ranks
from tests.traces import captured_once
from zerograph.codegen import cpp
from zerograph.codegen.names import spec_of
from zerograph.codegen.of_plan import kernels_of
from zerograph.codegen.rules import RULES
from zerograph.codegen.spec import Copy, Finish, Norm, Spec, Update
from zerograph.document import Document
from zerograph.errors import KernelError, PlanError

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True}}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What runs


def steps(rank: int, name: str, configs: list[dict[str, Any]], groups: bool = False) -> list[Any]:
    """Of each config, the kernels that a step of an engine loads, and those that its plan shows."""
    loaded: set[str] = set()
    load = cpp.load

    def recorded(source: str, kernel: str) -> Any:
        loaded.add(kernel)
        return load(source, kernel)

    cpp.load = recorded  # type: ignore[assignment]
    found = []
    for config in configs:
        loaded.clear()
        model = tiny.Blocks() if name == "blocks" else make(name)
        batch = tiny.batch() if name == "blocks" else batch_for(name, rank)
        engine = zerograph.compile(model, config, param_groups=_groups(model) if groups else None)
        engine.backward(loss_of(engine(**batch)))
        engine.step()
        found.append((set(loaded), engine.plan.kernels()))
    cpp.load = load
    return found


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Norms without momentum, beside the rest with it."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "norm" not in name], "momentum": 0.9},
        {"params": [p for name, p in named if "norm" in name], "momentum": 0.0},
    ]


@captured_once()
def _on_rank(rank: int, world: int, *args: Any) -> list[Any]:
    return steps(rank, *args)


CASES = [*itertools.product(range(4), [{}, BF16], [0.0, 1.0]), (2, FP16, 0.0)]
HALF = [case for case in CASES if (case[0] + (BF16 is case[1]) + (case[2] > 0)) % 2 == 0]
"""Of each stage two that differ in both."""


@pytest.mark.parametrize(
    ("name", "world", "given"),
    [("blocks", 1, CASES), ("blocks", 2, CASES), ("llama", 2, HALF)],
    ids=["blocks-1", "blocks-2", "llama-2"],
)
def test_an_engine_runs_the_kernels_that_its_plan_shows(
    name: str, world: int, given: list[tuple[int, dict[str, Any], float]]
) -> None:
    """Every stage, in fp32 and bf16 (fp16 at one), with clipping and without."""
    configs = [config_for(stage, **more, gradient_clipping=clip) for stage, more, clip in given]
    for found in run_ranks(world, _on_rank, name, configs):
        for (loaded, shown), (stage, more, clip) in zip(found, given, strict=True):
            assert loaded == set(shown), (stage, more, clip)
            assert any("clip" in kernel for kernel in shown) == bool(clip)
            assert any(kernel.startswith("update_adamw") for kernel in shown)
            for kernel, source in shown.items():
                assert source.startswith(f"// {kernel}\n")


def test_groups_that_differ_in_flags_have_a_kernel_each() -> None:
    """A rank loads those of the groups that its slices hold; ranks together load what the plan shows."""
    for configs in ([config_for(0, "SGD")], [config_for(3, "SGD")]):
        ranks = [found[0] for found in run_ranks(2, _on_rank, "llama", configs, True)]
        shown = set(ranks[0][1])
        assert {"update_sgd_f32_f32_free", "update_sgd_momentum_f32_f32_free"} < shown
        assert set.union(*(loaded for loaded, _ in ranks)) == shown


# What is shown


def planned(stage: int = 3, world: int = 8, **config: Any) -> zerograph.Plan:
    return zerograph.plan(
        tiny.Blocks(),
        tiny.config(stage, **config),
        example_inputs=tiny.batch(),
        world_size=world,
    )


def serves(source: str) -> dict[str, int]:
    """Elements by bucket, from a kernel's header."""
    rows = re.findall(r"^(?://|#) {2,}([\d,]+)  (\w+)", source, re.MULTILINE)
    return {bucket: int(count.replace(",", "")) for count, bucket in rows}


def test_a_header_says_what_a_kernel_serves() -> None:
    for stage in range(4):
        plan = planned(stage)
        buckets = plan.graph.layout.trainable_buckets()
        own = {b.name: b.shard_numel if stage else b.numel for b in buckets}
        for target in ("cpp", "triton"):
            shown = plan.kernels(target)
            assert serves(shown["update_adamw_f32_f32"]) == own
            assert serves(shown["norm_f32"]) == own
            assert serves(shown["finish_clip"]) == {}


def test_groups_share_the_elements_of_a_bucket() -> None:
    model = tiny.Blocks()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.endswith("weight")], "amsgrad": True},
        {"params": [p for n, p in named if not n.endswith("weight")], "amsgrad": False},
    ]
    plan = zerograph.plan(
        model, tiny.config(1), example_inputs=tiny.batch(), world_size=2, param_groups=groups
    )
    shown = plan.kernels()
    parts = [serves(shown[f"update_adamw{flag}_f32_f32"]) for flag in ("", "_amsgrad")]
    for bucket in plan.graph.layout.trainable_buckets():
        assert sum(part.get(bucket.name, 0) for part in parts) == bucket.shard_numel


def test_a_rule_with_norms_of_parameters_has_two_launches() -> None:
    """LAMB in place of AdamW, which has as many states."""
    graph, lamb = planned(bf16={"enabled": True}).graph, RULES["lamb"]
    found = {used.spec.name: used for used in kernels_of(graph, lamb, [lamb.defaults])}
    names = ["measure_lamb_f32_f32", "apply_lamb_f32_f32_bf16"]
    assert list(found)[-2:] == names
    assert found[names[0]].serves == found[names[1]].serves != ()


def test_a_class_that_runs_itself_has_no_update_kernel() -> None:
    config = tiny.config(2, zero_allow_untested_optimizer=True)
    del config["optimizer"]
    given = {"example_inputs": tiny.batch(), "optimizer": torch.optim.Adamax}
    plan = zerograph.plan(tiny.Blocks(), config, **given)
    assert set(plan.kernels()) == {"norm_f32", "finish_clip"}


def test_sources_are_the_same_byte_for_byte() -> None:
    first, second = planned(), planned()
    for target in ("cpp", "triton"):
        assert first.kernels(target) == second.kernels(target)
        assert list(first.kernels(target)) == list(second.kernels(target))
    assert first.kernels() == first.kernels("cpp")
    assert "@triton.jit" in first.kernels("triton")["update_adamw_f32_f32"]


def test_a_document_keeps_both_sources(tmp_path: Any) -> None:
    plan = planned(bf16={"enabled": True})
    plan.save(tmp_path / "plan.json")
    kept = Document.load(tmp_path / "plan.json").kernels
    both = {".cpp": plan.kernels("cpp"), ".py": plan.kernels("triton")}
    assert kept == {n + end: text for end, shown in both.items() for n, text in shown.items()}
    assert "update_adamw_f32_f32_bf16.py" in kept


def test_without_an_optimizer_or_gradients_there_are_no_kernels() -> None:
    config = tiny.config(3)
    del config["optimizer"]
    model, batch = tiny.Blocks(), tiny.batch()
    assert zerograph.plan(model, config, example_inputs=batch).kernels() == {}
    with torch.no_grad():
        plan = zerograph.plan(model, tiny.config(3), example_inputs=batch)
    assert plan.kernels() == {}


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(PlanError, match="no target 'cuda'"):
        planned().kernels("cuda")


# Names


def every_spec() -> list[Spec]:
    found: list[Spec] = [Norm(dtype) for dtype in DTYPES]
    limits = itertools.product([False, True], [None, *DTYPES[:2]], [False, True])
    found += [Finish(*given) for given in limits]
    found += [
        Copy(kind, *two) for kind in ("pack", "unpack") for two in itertools.product(DTYPES, DTYPES)
    ]
    for rule in RULES.values():
        if rule.name.startswith("wrong"):
            continue
        flags = [f for f in rule.defaults if f in rule.flags(dict.fromkeys(rule.defaults, True))]
        sets = [
            frozenset(c) for n in range(len(flags) + 1) for c in itertools.combinations(flags, n)
        ]
        phases = ("measure", "apply") if rule.apply else ("whole",)
        for own, low, free, phase in itertools.product(sets, [None, *DTYPES[2:]], [0, 1], phases):
            found.append(Update(rule.name, own, DTYPES[2], DTYPES[1], low, bool(free), phase))
    return found


def test_a_name_says_what_a_kernel_is() -> None:
    for spec in every_spec():
        assert spec_of(spec.name) == spec


@pytest.mark.parametrize(
    "name",
    ["", "norm", "norm_f32_f32", "update_adamx_f32_f32", "update_adamw_lr_x_f32_f32", "rm_-rf"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(KernelError, match="no kernel"):
        spec_of(name)
