"""The command line: what it prints, what it saves, and how it ends."""

import importlib.util
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import zerograph
from tests import tiny
from zerograph.cli import app, tables
from zerograph.cli.huggingface import inputs_of, model_of, read_config
from zerograph.cli.inputs import parse_input
from zerograph.cli.source import build
from zerograph.document import Document, HeldEntry
from zerograph.errors import PlanError
from zerograph.export import chrome_trace, dot
from zerograph.recording import Recording, SpanEntry
from zerograph.report import render
from zerograph.units import size

ROOT = Path(__file__).parent.parent
INPUTS = ["--input", "x=f32[4,8]", "--input", "target=f32[4,8]"]
BLOCKS = ["tests.tiny:Blocks", *INPUTS, "--world-size", "8"]
LLAMA = (
    "LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, "
    "num_attention_heads=2)"
)


def run(*args: Any) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def ok(*args: Any) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: Any) -> str:
    """The one line with which a command ends."""
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("zerograph: ")
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of stages 2 and 3, and the saved plans of Blocks under them."""
    path = tmp_path_factory.mktemp("cli")
    for stage in (2, 3):
        (path / f"{stage}.json").write_text(json.dumps(tiny.config(stage)))
        planned(stage).save(path / f"plan{stage}.json", "h100")
    return path


def planned(stage: int) -> zerograph.Plan:
    return tiny.planned(tiny.trace_of("blocks", 8), stage)


# plan


def test_plan_is_that_of_the_library(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    printed = ok("plan", *BLOCKS, "--config", folder / "3.json", "--json", "-o", saved)
    assert printed == saved.read_text()
    with torch.device("meta"):
        expected = zerograph.plan(
            tiny.Blocks(), tiny.config(3), example_inputs=tiny.batch(), world_size=8
        )
    assert printed == expected.document("h100").dumps()
    assert Document.load(saved).text() == str(expected)


def test_plan_prints_what_the_document_says(folder: Path) -> None:
    lines = ok("plan", *BLOCKS, "--config", folder / "3.json").splitlines()
    made = planned(3)
    rows = [" ".join(line.split()) for line in lines]
    assert lines[0] == "Blocks  ZeRO stage 3  8 ranks  320 parameters in 4 buckets"
    assert "b1 .. b2 blocks.0 .. blocks.1 x2 4 f32 128 16" not in rows  # padding is shown
    bucket = made.graph.layout.buckets["b1"]
    folded = f"b1 .. b2 blocks.0 .. blocks.1 x2 4 f32 {bucket.numel} {bucket.shard_numel}"
    assert folded in rows
    for kind, traffic in made.traffic.items():
        assert f"{kind} {traffic.count} {size(traffic.nbytes)}" in rows
    assert f"optimizer states {size(made.memory.optimizer)}" in rows
    assert f"peak {size(made.memory.peak)}" in rows
    moment = made.memory.peak_moment
    assert moment is not None and any(
        row.startswith("at the peak, ") and moment.region in row for row in rows
    )
    assert not any(line != line.rstrip() for line in lines)


def test_plan_of_another_cluster_takes_another_time(folder: Path) -> None:
    command = ["plan", *BLOCKS, "--config", folder / "3.json", "--json"]
    steps = [json.loads(ok(*command, "--cluster", c))["time"]["step"] for c in ("h100", "cpu")]
    assert steps[0] != steps[1]


def test_advice_is_printed(tmp_path: Path) -> None:
    config = tiny.config(3)
    config["zero_optimization"]["contiguous_gradients"] = True
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert "  zero_optimization.contiguous_gradients=true: " in ok(
        "plan", *BLOCKS, "--config", path
    )


def test_no_world_is_too_large_and_none_is_started(folder: Path) -> None:
    given = ["plan", *BLOCKS[:-1], 65_536, "--config", folder / "3.json"]
    assert "  65,536 ranks  " in ok(*given).splitlines()[0]
    assert not torch.distributed.is_initialized()


# MODEL


def test_class_config_file_and_library_are_one_model(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, use_cache=False)
    config.save_pretrained(tmp_path)
    ids = torch.empty(1, 8, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    expected = zerograph.plan(model, tiny.config(3), example_inputs=inputs, world_size=4)
    options = ["--config", folder / "3.json", "--seq", 8, "--world-size", 4]
    assert ok("show", LLAMA, *options) == str(expected)
    for given in (f"transformers:{LLAMA}", str(tmp_path), str(tmp_path / "config.json")):
        built: Any = build(given, [], None, 8)
        assert type(built.model) is LlamaForCausalLM and not built.model.config.use_cache
        assert {n: p.shape for n, p in built.model.named_parameters()} == {
            n: p.shape for n, p in model.named_parameters()
        }


FACTORIES = """
import torch
from tests import tiny

size = 3

def alone():
    return tiny.Mlp()

def pair(batch=4, width=8):
    return tiny.Mlp(width), {n: torch.empty(batch, width) for n in ("x", "target")}

def positional():
    return tiny.Mlp(), (torch.empty(4, 8), torch.empty(4, 8))

def number():
    return 7

def fails():
    raise RuntimeError("no luck\\nat all")

class Raising(tiny.Mlp):
    def forward(self, x, target):
        raise KeyError("mine")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in with a module of factories and a config."""
    name = f"factories_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / "ds.json").write_text(json.dumps(tiny.config(3)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Path(name)


def test_factories(factories: Path) -> None:
    options = ["--config", "ds.json"]
    from_pair = ok("show", f"{factories}:pair", *options)
    assert from_pair == ok("show", f"{factories}:positional", *options)
    assert from_pair == ok("show", f"{factories}:alone", *options, *INPUTS)
    assert "%x: f32[2,6]" in ok("show", f"{factories}:pair(width=6)", *options, "--batch", 2)
    assert "%x: f32[5,8]" in ok("show", f"{factories}:pair(5)", *options)
    built = build(f"{factories}:pair", [], None, None)
    assert {t.device.type for t in (*built.model.parameters(), *built.inputs.values())} == {"meta"}


@pytest.mark.parametrize(
    "model, more, said",
    [
        ("nomodule:make", [], "no module 'nomodule' here or installed"),
        ("{}:alnoe", [], "has no 'alnoe'; did you mean 'alone'?"),
        ("{}:alone", [], "--input NAME=DTYPE[SHAPE] (its forward takes x, target)"),
        ("{}:alone", ["--batch", 2], "--batch: {}:alone takes no argument 'batch'"),
        ("{}:positional", ["--input", "x=f32[1]"], "are positional"),
        ("{}:number", [], "{}:number gives int; a factory gives an nn.Module, or (model, "),
        ("{}:size", [], "{}:size is int, not a factory"),
        ("{}:fails", [], "{}:fails raised RuntimeError: no luck"),
        ("{}:pair(depth=3)", [], "raised TypeError: "),
        ("{}:pair(open('x'))", [], "arguments are literals"),
        ("{}:pair(", [], "cannot be read"),
        ("{}:pair()()", [], "cannot be read"),
        ("{}:Raising", INPUTS, "the forward of Raising raised KeyError: 'mine'"),
        ("{}", [], "give module:factory"),
        (
            "LlamaConfig(hiden_size=64)",
            [],
            "LlamaConfig has no 'hiden_size'; did you mean 'hidden_",
        ),
        ("LlmaConfig(hidden_size=64)", [], "has no 'LlmaConfig'; did you mean 'LlamaConfig'?"),
        ("LlamaConfig(architectures=['Lama'])", [], "architectures: transformers has no 'Lama'"),
        ("missing.json", [], "missing.json: No such file"),
        ("ds.json", [], "it has no `model_type`"),
        ("{}:pair", ["--batch", 0], "--batch must be at least 1, got 0"),
        ("{}:pair", ["--seq", -1], "--seq must be at least 1, got -1"),
        ("{}:pair", ["--world-size", 0], "world_size must be at least 1, got 0"),
        ("{}:pair", ["--world-size", -1], "world_size must be at least 1, got -1"),
        (
            "{}:pair",
            ["--world-size", 8, "--model-parallel", 3],
            "model_parallel=3 does not divide world_size=8, which counts all ranks",
        ),
        ("{}:pair", ["--model-parallel", 0], "model_parallel must be at least 1, got 0"),
        (
            "{}:pair",
            ["--cluster", "h10"],
            "no cluster 'h10' and no file of that name; did you mean 'h100'?",
        ),
        ("{}:pair", ["--cluster", "ds.json"], "ds.json is not a cluster: "),
        ("{}:pair", ["--device", "gpu"], "no device type 'gpu'"),
        ("{}:pair", ["--input", "x=f32(4)"], "not name=dtype[shape]"),
        ("{}:pair", ["--input", "x=f33[4]"], "no dtype 'f33'"),
        ("{}:pair", ["--fit", "80XB"], "'80XB' is no amount of memory"),
        ("{}:pair", ["-o", "no/such/folder.json"], "no/such/folder.json: No such file"),
    ],
)
def test_what_cannot_be_planned(factories: Path, model: str, more: list[Any], said: str) -> None:
    name = str(factories)
    line = refused("plan", model.format(name), "--config", "ds.json", *more)
    assert said.format(name) in line


def test_what_configs_do_not_allow(factories: Path) -> None:
    pair = f"{factories}:pair"
    assert "--config ds.json" in refused("plan", pair)
    assert "no.json: no such config file" in refused("plan", pair, "--config", "no.json")
    Path("seven.json").write_text(json.dumps(tiny.config(3, train_batch_size=7)))
    said = refused("plan", pair, "--config", "seven.json", "--world-size", 4)
    assert "train_batch_size=7 is not a multiple of" in said


def test_model_parallel_ranks(tmp_path: Path) -> None:
    """--world-size counts all ranks; batch keys, --fit's as well, count data-parallel ones."""
    section = {"number_checkpoints": 2, "partition_activations": True}
    config = tiny.config(3, train_batch_size=256, activation_checkpointing=section)
    (tmp_path / "mp.json").write_text(json.dumps(config))
    inputs = ["--input", "x=f32[64,32]", "--input", "target=f32[64,32]"]
    given = ["tests.parallel:Parallel(2, 2, 'mp')", *inputs, "--config", tmp_path / "mp.json"]
    given += ["--world-size", 8, "--model-parallel", 2]
    shown = ok("plan", *given, "--batch", 64, "-o", tmp_path / "mp.plan.json")
    assert "4 ranks" in shown and "\nmesh  dp 4 x mp 2; buckets are cut over dp\n" in shown
    assert re.search(r"\n gather_activation over mp +1 +8\.0 KiB\n", shown)
    assert "zero.gather_activation" in ok("show", tmp_path / "mp.plan.json", "--skeleton")
    found = json.loads(ok("plan", *given, "--batch", 64, "--fit", "1GB", "--json"))
    assert [entry["accumulation"] for entry in found["fits"]] == [1] * 4


def test_batch_changes_the_accumulation(factories: Path) -> None:
    config = tiny.config(3, train_batch_size=64, gradient_accumulation_steps=1)
    Path("ds.json").write_text(json.dumps(config))
    given = [f"{factories}:pair", "--world-size", 8, "--config", "ds.json", "--json"]
    document = json.loads(ok("plan", *given, "--batch", 2))
    assert document["config"]["train_micro_batch_size_per_gpu"] == 2
    assert "gradient_accumulation_steps" not in document["config"]
    assert any(line[0].startswith("forward(%target: f32[2,8]") for line in document["lines"])
    usual = json.loads(ok("plan", *given))
    assert any(line[0].startswith("forward(%target: f32[8,8]") for line in usual["lines"])
    assert refused("plan", *given, "--batch", 3).endswith("instead of train_batch_size")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA tensors can be made here")
def test_cuda_needs_cuda(factories: Path) -> None:
    said = refused("plan", f"{factories}:pair", "--config", "ds.json", "--device", "cuda")
    assert "--device cuda needs a machine with CUDA" in said


def test_traceback_is_shown_when_asked(factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["plan", f"{factories}:fails", "--config", "ds.json"]
    with pytest.raises(PlanError) as caught:
        run(*command, "--traceback")
    assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.setenv("ZEROGRAPH_TRACEBACK", "1")
    with pytest.raises(PlanError):
        run(*command)


SHAPES = {
    "BertConfig(num_hidden_layers=1)": ("BertForMaskedLM", {"input_ids": [2, 9], "labels": [2, 9]}),
    "ViTConfig(num_hidden_layers=1, image_size=32)": (
        "ViTForImageClassification",
        {"pixel_values": [2, 3, 32, 32], "labels": [2]},
    ),
    "T5Config(num_layers=1)": (
        "T5ForConditionalGeneration",
        {"input_ids": [2, 9], "labels": [2, 9]},
    ),
    "WhisperConfig(encoder_layers=1, decoder_layers=1, max_source_positions=16)": (
        "WhisperForConditionalGeneration",
        {"input_features": [2, 80, 32], "labels": [2, 9]},
    ),
    "BertConfig(num_hidden_layers=1, architectures=['BertForQuestionAnswering'])": (
        "BertForQuestionAnswering",
        {"input_ids": [2, 9], "start_positions": [2], "end_positions": [2]},
    ),
    "GPT2Config(n_layer=1, architectures=['GPT2ForSequenceClassification'])": (
        "GPT2ForSequenceClassification",
        {"input_ids": [2, 9], "labels": [2]},
    ),
}


@pytest.mark.parametrize("given", SHAPES)
def test_inputs_follow_from_the_kind_of_model(given: str) -> None:
    name, shapes = SHAPES[given]
    built = build(given, [], 2, 9)
    assert type(built.model).__name__ == name and built.model.training
    assert {n: list(t.shape) for n, t in built.inputs.items()} == shapes
    tensors = [*built.model.parameters(), *built.inputs.values()]
    assert {t.device.type for t in tensors} == {"meta"}


def test_rows_are_as_long_as_the_model_takes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "gpt2", "n_layer": 1, "n_positions": 96, "torch_dtype": "bfloat16"}
        )
    )
    model = model_of(read_config(str(tmp_path)))
    assert inputs_of(model, 1, None)["input_ids"].shape == (1, 96)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "given, dtype, shape",
    [
        ("x=f32[4,16]", torch.float32, (4, 16)),
        ("a.b=i64[]", torch.int64, ()),
        ("x=bf16[ 2 , 3 ]", torch.bfloat16, (2, 3)),
        ("mask=b8[1]", torch.bool, (1,)),
    ],
)
def test_an_input(given: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    name, tensor = parse_input(given)
    assert name == given.partition("=")[0]
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (dtype, shape, "meta")


@pytest.mark.parametrize("given", ["x", "x=f32", "x=f32[4", "x=f32[-1]", "x=f32[4,]", "=f32[4]"])
def test_what_is_no_input(given: str) -> None:
    with pytest.raises(PlanError):
        parse_input(given)


# show


def test_show_is_the_canonical_text(folder: Path) -> None:
    plan, made = folder / "plan3.json", planned(3)
    assert ok("show", plan) == str(made)
    assert ok("show", plan, "--skeleton") == made.text(skeleton=True)
    assert ok("show", plan, "--after", "gather") == made.history["gather"]
    step = ok("show", plan, "--region", "step")
    assert step.startswith("step(") and step in str(made) and "forward" not in step
    layer = ok("show", plan, "--layer", "blocks.0").splitlines()
    assert "  %b1 = zero.gather b1" in layer[0] and all(line in str(made) for line in layer)
    assert not any("blocks.1" in line or "b2" in line.split() for line in layer)
    linear = ok("show", plan, "--layer", "blocks.0.linear").splitlines()
    assert layer[0] in linear and len(linear) < len(layer)  # its bucket's calls, not its siblings'
    assert ok("show", *BLOCKS, "--config", folder / "3.json") == str(made)


def test_show_lists_the_passes(folder: Path) -> None:
    lines = ok("show", folder / "plan3.json", "--passes").splitlines()
    assert [line.split()[0] for line in lines[1:]] == planned(3).history.names()
    history = planned(3).history
    record, (full, _) = history.records[5], history.forms[5]
    assert lines[6].split() == [record.name, str(len(full)), *record.did.split()]


@pytest.mark.parametrize(
    "option, said",
    [
        (["--after", "gahter"], "no pass 'gahter'; did you mean 'gather'?"),
        (["--region", "bakward"], "no region 'bakward'; did you mean 'backward'?"),
        (["--layer", "block.1"], "no layer 'block.1'; did you mean 'blocks.1'?"),
    ],
)
def test_show_knows_what_there_is(folder: Path, option: list[str], said: str) -> None:
    assert said in refused("show", folder / "plan3.json", *option)


def test_broken_plans(folder: Path, tmp_path: Path) -> None:
    text = (folder / "plan3.json").read_text()
    data = json.loads(text)
    path = tmp_path / "plan.json"
    broken = {
        text[: len(text) // 2]: "is not a saved plan: ",
        "": "is not a saved plan: ",
        "[1]": "is not a saved plan: the file: ",
        json.dumps(
            data | {"format": 2}
        ): "is a saved plan of format 2, and this zerograph reads format 1",
        json.dumps(data | {"world": "many"}): "is not a saved plan: world: ",
        json.dumps(data | {"lines": data["lines"][:-1]}): "do not belong together",
        json.dumps({k: v for k, v in data.items() if k != "nodes"}): "nodes: Field required",
    }
    for given, said in broken.items():
        path.write_text(given)
        assert said in refused("show", path), given[:40]
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not a saved plan" in refused("show", path)
    assert "none.json: No such file" in refused("show", tmp_path / "none.json")


# diff


def test_diff_of_the_same_plan_says_nothing(folder: Path) -> None:
    assert ok("diff", folder / "plan3.json", folder / "plan3.json") == ""


@pytest.mark.parametrize("form", [[], ["--skeleton"]])
def test_diff_is_that_of_the_plans_and_ends_with_what_it_costs(
    folder: Path, form: list[str]
) -> None:
    result = run("diff", folder / "plan2.json", folder / "plan3.json", *form)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    two, three = planned(2), planned(3)
    assert lines[2:-1] == two.diff(three, skeleton=bool(form)).splitlines()[2:]
    assert lines[0].endswith("plan2.json") and lines[1].endswith("plan3.json")
    traffic = three.traffic["gather"]
    assert f"gather 0 -> {traffic.count} (+{size(traffic.nbytes)})" in lines[-1]
    old, new = size(two.memory.peak), size(three.memory.peak)
    assert f"peak {old.removesuffix(' KiB')} -> {new}" in lines[-1]
    assert "  step on h100 " in lines[-1] and "reduce_scatter" not in lines[-1]


def test_diff_of_two_configs(folder: Path) -> None:
    configs = ["--config", folder / "2.json", "--config", folder / "3.json"]
    of_configs = run("diff", *BLOCKS, *configs).stdout.splitlines()
    of_plans = run("diff", folder / "plan2.json", folder / "plan3.json").stdout.splitlines()
    assert of_configs[2:] == of_plans[2:]
    assert of_configs[:2] == [f"--- {folder / '2.json'}", f"+++ {folder / '3.json'}"]
    mixed = ["diff", folder / "plan2.json", BLOCKS[0], *BLOCKS[1:], "--config", folder / "3.json"]
    assert run(*mixed).stdout.splitlines()[2:] == of_plans[2:]


def test_diff_of_two_models(folder: Path, tmp_path: Path) -> None:
    others = {"depth": tiny.Blocks(depth=3), "class": tiny.Mlp()}
    for name, model in others.items():
        trace = tiny.traced(model, tiny.batch(), 8)
        tiny.planned(trace, 3).save(tmp_path / f"{name}.json")
    one = folder / "plan3.json"
    said = refused("diff", one, tmp_path / "depth.json")
    assert "two shapes of Blocks (blocks.2.norm.weight: absent and [8])" in said
    assert "different models, Blocks and Mlp" in refused("diff", one, tmp_path / "class.json")
    assert run("diff", one, tmp_path / "class.json", "--any-model").exit_code == 1


def test_diff_wants_two(folder: Path) -> None:
    plan, config = folder / "plan3.json", folder / "3.json"
    assert "two plans are compared" in refused("diff", plan)
    assert "two plans are compared" in refused("diff", *BLOCKS, "--config", config)
    assert "given 1 times for 0 models" in refused("diff", plan, plan, "--config", config)
    assert "none.json: No such file" in refused("diff", plan, folder / "none.json")


# kernels


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_kernels_writes_the_sources_of_a_saved_plan(folder: Path, tmp_path: Path) -> None:
    shown = ok("kernels", folder / "plan3.json", "-o", tmp_path / "all")
    plan = planned(3)
    sources = {f"cpp/{name}.cpp": text for name, text in plan.kernels("cpp").items()}
    sources |= {f"triton/{name}.py": text for name, text in plan.kernels("triton").items()}
    assert {name: (tmp_path / "all" / name).read_text() for name in sources} == sources
    assert files(tmp_path / "all") == set(sources)
    assert set(shown.splitlines()) == {str(tmp_path / "all" / name) for name in sources}
    ok("kernels", folder / "plan3.json", "--target", "cpp", "-o", tmp_path / "some")
    assert files(tmp_path / "some") == {name for name in sources if name.startswith("cpp/")}


def test_kernels_of_a_model_are_those_of_its_plan(folder: Path, tmp_path: Path) -> None:
    ok("kernels", *BLOCKS, "--config", folder / "3.json", "-o", tmp_path / "model")
    ok("kernels", folder / "plan3.json", "-o", tmp_path / "plan")
    assert files(tmp_path / "model") == files(tmp_path / "plan")
    name = "triton/update_adamw_f32_f32.py"
    assert (tmp_path / "model" / name).read_text() == (tmp_path / "plan" / name).read_text()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_compiles_for_gpus_that_are_not_here(folder: Path, tmp_path: Path) -> None:
    targets = ["--target", "sm_90", "--target", "gfx942"]
    shown = ok("kernels", folder / "plan3.json", *targets, "-o", tmp_path)
    report = (tmp_path / "report.txt").read_text()
    assert shown.endswith(f"\nreport.txt\n{report}")
    assert re.search(r"^update_adamw_f32_f32  gfx942 .*ld128 x4, st128 x3$", report, re.MULTILINE)
    for target, end in (("sm_90", "cubin"), ("gfx942", "hsaco")):
        assert re.search(rf"^norm_f32_total +{target} ", report, re.MULTILINE)
        assert (tmp_path / target / f"update_adamw_f32_f32.{end}").read_bytes()[:4] == b"\x7fELF"
        source = (tmp_path / target / "update_adamw_f32_f32.py").read_text()
        assert source == planned(3).kernels("triton")["update_adamw_f32_f32"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_says_that_triton_is_missing(
    folder: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = ["--target", target, "-o", tmp_path / "none"]
    said = refused("kernels", folder / "plan3.json", *args)
    assert said.startswith(f"zerograph: {target} is compiled by Triton") and "pip install" in said
    assert not (tmp_path / "none").exists()


def test_kernels_compiles_no_code_of_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saved plan is data; what is run to compile a kernel is what this version generates."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    saved = json.loads((folder / "plan3.json").read_text())
    saved["kernels"]["norm_f32.py"] += "print('mine')\n"
    (tmp_path / "changed.json").write_text(json.dumps(saved))
    args = ["--target", "sm_90", "-o", tmp_path / "none"]
    assert "norm_f32 is not what" in refused("kernels", tmp_path / "changed.json", *args)
    saved["kernels"]["../out.py"] = ""
    (tmp_path / "changed.json").write_text(json.dumps(saved))
    assert "no kernel '../out'" in refused("kernels", tmp_path / "changed.json", *args[2:])


def test_kernels_refuses_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    plan = folder / "plan3.json"
    said = refused("kernels", plan, "--target", "sm_91", "-o", tmp_path / "none")
    assert "no target 'sm_91'; did you mean 'sm_90'?" in said
    assert "plan3.json" in refused("kernels", plan, "--target", "cpp", "-o", plan)
    assert run("kernels", plan).exit_code == 2  # no --output
    (tmp_path / "none.json").write_text("{}")
    args = ["--config", tmp_path / "none.json", "-o", tmp_path / "none"]
    assert "it has no optimizer" in refused("kernels", *BLOCKS, *args)
    assert not (tmp_path / "none").exists()


# doctor


def test_doctor_looks_at_everything(tmp_path: Path) -> None:
    findings = json.loads(ok("doctor", "--json", "--nvme", tmp_path))
    by_name = {finding["name"]: finding for finding in findings}
    expected = ["torch", "transformers", "C++ compiler", "triton", "CPU", "gloo", "nccl", "mpi"]
    assert {*expected, "open files", "shared memory", "NVMe"} <= set(by_name)
    assert torch.__version__ in by_name["torch"]["found"]
    assert by_name["NVMe"]["state"] in ("ok", "limited") and list(tmp_path.iterdir()) == []
    assert all(f["state"] in ("ok", "limited", "no") for f in findings)
    assert all("\n" not in f["found"] + f["means"] for f in findings)
    lines = ok("doctor").splitlines()
    assert len(lines) == len(findings) and lines[0].split()[:2] == ["check", "state"]


def test_doctor_on_a_poor_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails, and no folder for NVMe: found out, not fatal."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    findings = json.loads(ok("doctor", "--json", "--nvme", tmp_path / "none"))
    by_name = {finding["name"]: finding for finding in findings}
    assert by_name["C++ compiler"]["state"] == by_name["NVMe"]["state"] == "no"
    assert by_name["C++ compiler"]["means"].endswith("broken compiler")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    findings = json.loads(ok("doctor", "--json"))
    assert next(f for f in findings if f["name"] == "C++ compiler")["found"].startswith("none of")


def test_doctor_writes_only_a_calibration() -> None:
    assert "--output is for --calibrate" in refused("doctor", "-o", "x.json")
    assert "-o cluster.json" in refused("doctor", "--calibrate")


# usage


@pytest.mark.parametrize(
    "args", [["frob"], ["plan"], ["plan", "a", "b"], ["show", "x", "--frob"], ["report", "x.json"]]
)
def test_usage(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2 and result.stderr.startswith("Usage: ") and result.stdout == ""


def test_every_command_has_help() -> None:
    for name in ("plan", "show", "diff", "report", "export", "doctor"):
        assert f"  {name} " in ok("--help")
        assert "--traceback" in ok(name, "--help")


def test_report_and_export_write_what_the_library_makes(folder: Path, tmp_path: Path) -> None:
    plan = Document.load(folder / "plan3.json")
    page, trace, graph = (tmp_path / name for name in ("report.html", "trace.json", "graph.dot"))
    run_file = tmp_path / "run.json"
    node = next(i for i, n in enumerate(plan.nodes) if n.stream == "compute")
    span = SpanEntry(node=node, region="forward", stream="compute", start=0.0, seconds=0.5)
    run = Recording(model=plan.model, stage=plan.stage, world=plan.world, rank=0, spans=(span,))
    run.save(run_file)
    ok("report", folder / "plan3.json", "-o", page)
    assert page.read_text() == render(plan)
    ok("report", folder / "plan3.json", "-o", page, "--run", run_file)
    assert page.read_text() == render(plan, run) != render(plan)
    ok("export", folder / "plan3.json", "--chrome", trace, "--dot", graph, "--run", run_file)
    assert trace.read_text() == chrome_trace(plan, run)
    assert graph.read_text() == dot(plan)


def test_a_calibration_is_a_cluster_to_plan_for(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.json"
    assert "this machine is in" in ok("doctor", "--calibrate", "-o", file)
    saved = tmp_path / "plan.json"
    ok("plan", *BLOCKS, "--config", folder / "3.json", "--cluster", file, "-o", saved)
    time = Document.load(saved).time
    assert time.cluster == "this machine" and time.step > 0


def test_export_wants_something_to_write(folder: Path) -> None:
    assert "give --chrome" in refused("export", folder / "plan3.json")


# tables


def test_the_largest_holders_are_named(folder: Path, tmp_path: Path) -> None:
    held = (("blocks.1", "activations", 2048), ("", "gradients", 1024))
    entries = [HeldEntry(owner=o, category=c, bytes=n) for o, c, n in held]
    document = Document.load(folder / "plan3.json")
    memory = document.memory.model_copy(update={"at_peak": tuple(entries)})
    parts = tables.plan_parts(document.model_copy(update={"memory": memory}))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*parts)
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    at = rows.index("largest holders of bytes")
    assert rows[at + 1 : at + 3] == ["blocks.1 activations 2.0 KiB", "(root) gradients 1.0 KiB"]


def test_layers_are_folded_by_their_numbers_alone() -> None:
    buckets = planned(3).document().buckets
    assert [len(run) for run in tables.fold(buckets)] == [1, 2, 1]
    wider = buckets[2].model_copy(update={"shapes": ((8,), (8,), (8, 9), (8,))})
    assert [len(run) for run in tables.fold((*buckets[:2], wider, buckets[3]))] == [1, 1, 1, 1]


# Real processes


def start(*args: Any, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zerograph", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_process_plans_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORIES)
    (tmp_path / "ds.json").write_text(json.dumps(tiny.config(3)))
    command = ["plan", "mine:pair", "--config", "ds.json", "--world-size", "8"]
    one = start(*command, "-o", "one.json", cwd=tmp_path, PYTHONHASHSEED="1")
    other = start(*command, "-o", "two.json", cwd=tmp_path, PYTHONHASHSEED="2", RANK="5")
    assert (one.returncode, one.stderr) == (0, "") and one.stdout == other.stdout
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    failed = start("plan", "mine:fails", "--config", "ds.json", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "zerograph: mine:fails raised RuntimeError: no luck\n"


def test_a_terminal_gets_colours(folder: Path) -> None:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "zerograph", "diff", "plan2.json", "plan3.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "300"}
    with subprocess.Popen(command, cwd=folder, env=env, stdout=child) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                read = os.read(parent, 65536)
            except OSError:  # the child has closed its end
                break
            if not read:
                break
            shown += read
    os.close(parent)
    assert process.returncode == 1
    assert b"\x1b[32m+" in shown and b"\x1b[31m-" in shown


def test_the_script_is_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"zerograph": "zerograph.cli:main"}
    assert callable(zerograph.cli.main)  # type: ignore[attr-defined]
