"""The layout: the arithmetic of flat buckets, the blocks of real models, parameter groups."""

import functools
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import models
from zerograph.errors import PlanError
from zerograph.layout import ALIGN_BYTES, PAD_ELEMENTS, Layout, layout_of, repeated_blocks
from zerograph.precision import Precision

AS_IS = Precision(None, frozenset())
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def bf16(*pinned: str) -> Precision:
    return Precision(torch.bfloat16, frozenset(pinned))


# Arithmetic


class Leaf(nn.Module):
    """A module with parameters of given shapes, dtypes and trainability."""

    def __init__(self, given: list[tuple[tuple[int, ...], torch.dtype, bool]]) -> None:
        super().__init__()
        for index, (shape, dtype, trainable) in enumerate(given):
            value = torch.empty(shape, dtype=dtype, device="meta")
            setattr(self, f"p{index}", nn.Parameter(value, requires_grad=trainable))


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
leaves = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), max_size=4).map(Leaf)


@st.composite
def any_model(draw: st.DrawFn) -> nn.Module:
    """Leaves at the root and in a ModuleList, in any order; some parameters tied."""
    model = nn.Module()
    for index, part in enumerate(draw(st.lists(leaves | st.lists(leaves), max_size=4))):
        module = nn.ModuleList(part) if isinstance(part, list) else part
        model.add_module(f"m{index}", module)
    found = list(model.parameters())
    if found:
        ties = draw(st.lists(st.sampled_from(found), max_size=3))
        model.add_module("ties", nn.ParameterList(ties))
    return model


@settings(max_examples=150, deadline=None)
@given(any_model(), st.integers(1, 70), st.sampled_from([AS_IS, bf16()]))
def test_arithmetic(model: nn.Module, world: int, precision: Precision) -> None:
    layout = layout_of(model, world, precision)
    tensors = dict(model.named_parameters())
    homes = [name for bucket in layout.buckets.values() for name in bucket.params]
    assert homes == list(layout.params)
    assert sorted(homes) == sorted(tensors), "each tensor is in one bucket, at its first name"
    for bucket in layout.buckets.values():
        check_bucket(layout, bucket.name, world)
    for name, tensor in tensors.items():
        param = layout.params[name]
        assert (param.shape, param.model_dtype) == (tuple(tensor.shape), tensor.dtype)
        assert param.dtype == precision.parameter(name, tensor.dtype)
        assert param.trainable == tensor.requires_grad


def check_bucket(layout: Layout, name: str, world: int) -> None:
    bucket, params = layout.buckets[name], layout.bucket_params(name)
    assert params, "no bucket is empty"
    assert bucket.numel % (world * PAD_ELEMENTS) == 0
    assert bucket.shard_numel * world == bucket.numel > 0
    assert bucket.nbytes == bucket.numel * bucket.dtype.itemsize
    kinds = {(p.dtype, p.trainable, p.bucket) for p in params}
    assert kinds == {(bucket.dtype, bucket.trainable, name)}
    end = 0
    for param in params:
        assert param.offset * bucket.dtype.itemsize % ALIGN_BYTES == 0
        assert param.offset >= end, "no two overlap"
        end = param.offset + param.numel
    assert end <= bucket.numel
    waste = ALIGN_BYTES // bucket.dtype.itemsize * len(params) + world * PAD_ELEMENTS
    assert bucket.numel - sum(p.numel for p in params) <= waste
    covers([(start, stop) for _, start, stop in layout.extents(name)], bucket.numel)
    runs = [(s.offset, s.offset + s.length) for s in layout.segments(name)]
    covers(runs, bucket.numel)


def covers(ranges: list[tuple[int, int]], numel: int) -> None:
    """The ranges lie behind each other and fill the bucket."""
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == numel
    assert all(start <= stop for start, stop in ranges)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 8))
def test_segments_follow_the_groups(groups: list[int], world: int) -> None:
    model = Leaf([((3,), torch.float32, True)] * len(groups))
    names = [f"p{i}" for i in range(len(groups))]
    members: list[dict[str, Any]] = [
        {"params": [n for n, g in zip(names, groups) if g == group]} for group in range(3)
    ]
    layout = layout_of(model, world, AS_IS, members)
    runs = layout.segments("b0")
    covers([(s.offset, s.offset + s.length) for s in runs], layout.buckets["b0"].numel)
    assert all(one.group != other.group for one, other in pairwise(runs))
    for name, group in zip(names, groups, strict=True):
        param = layout.params[name]
        (own,) = [s for s in runs if s.offset <= param.offset < s.offset + s.length]
        assert own.group == group == param.group
        assert param.offset + param.numel <= own.offset + own.length


@settings(max_examples=30, deadline=None)
@given(any_model(), st.integers(1, 16), st.integers(1, 16))
def test_offsets_do_not_depend_on_the_world(model: nn.Module, one: int, other: int) -> None:
    """So that what one world size saved, another can read."""
    left, right = (layout_of(model, world, AS_IS).params for world in (one, other))
    assert left == right


def test_world_size_must_be_positive() -> None:
    with pytest.raises(PlanError, match="world_size must be at least 1, got 0"):
        layout_of(nn.Linear(2, 2), 0, AS_IS)


def test_pinned_parameters_get_buckets_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    layout = layout_of(model, 2, bf16("1.weight", "1.bias"))
    found = {b.dtype: b.params for b in layout.buckets.values()}
    assert found == {
        torch.bfloat16: ("0.weight", "0.bias"),
        torch.float32: ("1.weight", "1.bias"),
    }
    assert layout.params["0.weight"].model_dtype == torch.float32


def test_dense_strides_are_kept_and_others_made_contiguous() -> None:
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    assert layout_of(model, 1, AS_IS).params["weight"].stride == model.weight.stride()
    model.weight = nn.Parameter(torch.empty(8, 6, 3, 3)[:, ::2])
    assert layout_of(model, 1, AS_IS).params["weight"].stride == (27, 9, 3, 1)


# Blocks


@functools.cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.MODELS[name]()


def blocks_of(model: nn.Module) -> list[str]:
    return [bucket.block for bucket in layout_of(model, 8, AS_IS).buckets.values()]


def test_blocks_of_llama() -> None:
    assert blocks_of(on_meta("llama")) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm .. lm_head",
    ]


def test_blocks_of_gpt2_whose_head_is_tied() -> None:
    model = on_meta("gpt2")
    assert blocks_of(model) == [
        "transformer.wte .. transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
    ]
    layout = layout_of(model, 8, AS_IS)
    assert layout.params["transformer.wte.weight"].tied == ("lm_head.weight",)
    assert "lm_head.weight" not in layout.params
    assert layout.canonical("lm_head.weight") == "transformer.wte.weight"
    assert layout.canonical("transformer.ln_f.bias") == "transformer.ln_f.bias"
    assert layout.canonical("transformer.nothing") is None


def test_blocks_of_t5_in_both_stacks() -> None:
    found = blocks_of(on_meta("t5"))
    assert [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)] == [
        block for block in found if ".block." in block and " .. " not in block
    ]
    assert found[0] == "shared"


class Net(nn.Module):
    """Like a ResNet: stages that are a Sequential of blocks, between a stem and a head."""

    def __init__(self, residual: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.layer1 = nn.Sequential(residual(8), residual(8))
        self.layer2 = nn.Sequential(residual(8), residual(8), residual(8))
        self.fc = nn.Linear(8, 5)


def test_blocks_of_a_net_of_stages() -> None:
    assert blocks_of(Net(models.Residual)) == [
        *("stem.0 .. stem.1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "fc")
    ]


def test_a_sequential_of_plain_layers_is_no_stage() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0 .. 2"]


def test_parameters_at_the_root() -> None:
    assert blocks_of(Leaf([((3,), torch.float32, True)] * 2)) == ["(root)"]


def test_only_the_outermost_repetition_counts() -> None:
    inner = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    outer = nn.Module()
    outer.layers = nn.ModuleList([nn.Sequential(inner), nn.Linear(2, 2)])
    assert list(repeated_blocks(outer)) == ["layers.0", "layers.1"]


def test_layer_ten_is_not_layer_one() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
    layout = layout_of(model, 1, AS_IS)
    assert [b.block for b in layout.buckets.values()] == [f"layers.{i}" for i in range(12)]
    assert all(len(b.params) == 2 for b in layout.buckets.values())


def test_a_meta_model_and_a_real_one_have_the_same_layout() -> None:
    assert layout_of(on_meta("llama"), 8, AS_IS) == layout_of(models.llama(), 8, AS_IS)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("world", [1, 3, 1024])
def test_arithmetic_of_models(name: str, world: int) -> None:
    model = on_meta(name)
    layout = layout_of(model, world, AS_IS)
    for bucket in layout.buckets:
        check_bucket(layout, bucket, world)
    assert sum(p.numel for p in layout.params.values()) == sum(
        math.prod(p.shape) for p in model.parameters()
    )


# Parameter groups


def test_groups_by_tensor_or_name_with_their_options() -> None:
    model = on_meta("gpt2")
    tied = model.lm_head.weight
    others = [n for n, p in model.named_parameters() if p is not tied]
    groups = [{"params": [tied], "lr": 1.0}, {"params": others, "weight_decay": 0.5}]
    layout = layout_of(model, 2, AS_IS, groups)
    assert layout.groups == ({"lr": 1.0}, {"weight_decay": 0.5})
    assert layout.params["transformer.wte.weight"].group == 0
    assert {layout.params[name].group for name in others} == {1}


def test_frozen_parameters_need_no_group() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    layout = layout_of(model, 1, AS_IS, [{"params": ["weight"]}])
    assert layout.params["bias"].group == 0


@pytest.mark.parametrize(
    "groups, says",
    [
        ([{"params": ["wight"]}], "group 0 holds a parameter 'wight' that is not in Linear"),
        (
            [{"params": ["weight", "bias"]}, {"params": [nn.Parameter(torch.ones(3, 2))]}],
            r"group 1 holds a parameter of shape \[3, 2\] that is not in Linear",
        ),
        (
            [{"params": ["weight", "bias"]}, {"params": ["weight"]}],
            "parameter weight is in groups 0 and 1; leave it in one",
        ),
        ([{"params": ["bias", "bias", "weight"]}], "parameter bias is in groups 0 and 0"),
        ([{"params": ["bias"]}], "1 trainable parameters are in no parameter group.* weight;"),
        ([], "2 trainable parameters are in no parameter group, the first is weight;"),
    ],
)
def test_wrong_groups(groups: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        layout_of(nn.Linear(2, 2), 1, AS_IS, groups)


def test_a_tied_parameter_in_two_groups_under_its_two_names() -> None:
    names = [n for n, _ in on_meta("gpt2").named_parameters()]
    groups = [{"params": names}, {"params": ["lm_head.weight"]}]
    with pytest.raises(PlanError, match=r"transformer\.wte\.weight is in groups 0 and 1"):
        layout_of(on_meta("gpt2"), 1, AS_IS, groups)
