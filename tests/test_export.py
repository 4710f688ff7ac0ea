"""Chrome traces and DOT: well-formed, complete, the same each time."""

import json
import re
import shutil
import subprocess
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from tests import tiny
from tests.test_report import document, recording
from zerograph.errors import PlanError
from zerograph.export import chrome_trace, dot
from zerograph.report.colours import COLLECTIVES

STREAMS = {100: "compute", 200: "communication", 300: "copy"}


def events(kind: str, process: int = 1) -> list[dict[str, Any]]:
    found = json.loads(chrome_trace(document(), recording(document())))["traceEvents"]
    return [e for e in found if e["ph"] == kind and e["pid"] == process]


def test_processes_and_threads_are_named() -> None:
    for process, name in ((1, "predicted"), (2, "measured on rank 3")):
        named = events("M", process)
        assert [e["args"]["name"] for e in named if e["name"] == "process_name"] == [name]
        threads = {e["tid"]: e["args"]["name"] for e in named if e["name"] == "thread_name"}
        assert threads == STREAMS


def test_each_node_that_takes_time_is_a_slice() -> None:
    timed = [node for node in document().nodes if node.stream]
    for process, slower in ((1, 1.0), (2, 1.5)):
        slices = events("X", process)
        shown = Counter((e["name"], STREAMS[e["tid"]], e["args"]["region"]) for e in slices)
        assert shown == Counter((n.op, n.stream, n.region) for n in timed)
        compute = [
            e for e in slices if STREAMS[e["tid"]] == "compute"
        ]  # a collective may end later
        end = max(e["ts"] + e["dur"] for e in compute)
        assert end == pytest.approx(1e6 * slower * document().time.step, abs=0.01)
    gather = next(e for e in events("X") if e["name"] == "zero.gather_ahead")
    assert gather["args"]["module"] == "inlet" and gather["args"]["bucket"] == "b0"
    assert gather["args"]["line"].startswith("zero.gather_ahead b0 # ")


def test_slices_of_a_thread_do_not_overlap() -> None:
    """Nor those of measured collectives that do: they are on threads of their own."""
    long = recording(document())
    for span in long.spans:
        span.seconds *= 3 if span.stream == "communication" else 1
    found = json.loads(chrome_trace(document(), long))["traceEvents"]
    slices = [e for e in found if e["ph"] == "X"]
    slices.sort(key=lambda e: (e["pid"], e["tid"], e["ts"]))
    for before, after in pairwise(slices):
        if (before["pid"], before["tid"]) == (after["pid"], after["tid"]):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.002
    names = {(e["pid"], e["args"]["name"]) for e in found if e["name"] == "thread_name"}
    assert (2, "communication 2") in names and (1, "communication 2") not in names
    assert len(slices) == 2 * len(long.spans)


def test_the_memory_counter_reaches_the_peak() -> None:
    counter = events("C")
    assert list(counter[0]["args"]) == list(document().memory.categories)
    assert max(sum(e["args"].values()) for e in counter) == document().memory.peak
    times = [e["ts"] for e in counter]
    assert times == sorted(set(times))


def test_a_trace_of_another_plan_is_refused() -> None:
    with pytest.raises(PlanError, match=r"the recording is of .* on 4 ranks"):
        chrome_trace(document(), recording(document(), world=4))


def test_exports_are_the_same_each_time() -> None:
    again = tiny.planned(tiny.trace_of("blocks"), 3).document("h100")
    assert chrome_trace(again) == chrome_trace(document())
    assert dot(again) == dot(document())


TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|->|[\w.]+|[{}\[\]=,])')


def parsed(text: str) -> tuple[dict[str, dict[str, str]], list[tuple[str, ...]], list[str]]:
    """Nodes with attributes, edges and cluster labels of what `dot` writes; asserts its grammar."""
    tokens = re.findall(TOKEN, text)
    assert re.sub(TOKEN, "", text).strip() == ""
    nodes: dict[str, dict[str, str]] = {}
    edges: list[tuple[str, ...]] = []
    labels: list[str] = []
    depth, at = 0, 2
    assert tokens[:3] == ["digraph", "zerograph", "{"]
    while at < len(tokens):
        token = tokens[at]
        if token in "{}":
            depth += 1 if token == "{" else -1
            at += 1
        elif token == "subgraph":
            at += 2
        elif tokens[at + 1] == "=":
            labels += [tokens[at + 2].strip('"')] if token == "label" and depth == 2 else []
            at += 3
        else:
            names = [token]
            while tokens[at + 1] == "->":
                at += 2
                names.append(tokens[at])
            at += 1
            given: dict[str, str] = {}
            if tokens[at] == "[":
                end = tokens.index("]", at)
                inner = [t for t in tokens[at + 1 : end] if t not in "=,"]
                given = dict(zip(inner[::2], inner[1::2]))
                at = end + 1
            if len(names) > 1:
                edges.append(tuple(names))
            else:
                nodes[token] = given
    assert depth == 0
    return nodes, edges, labels


def test_dot_draws_every_block_and_collective() -> None:
    nodes, edges, labels = parsed(dot(document(), fold=False))
    assert labels == ["inlet", "blocks.0", "blocks.1", "head", "the whole model"]
    drawn = Counter(
        attributes["label"].strip('"').split("\\n")[0]
        for attributes in nodes.values()
        if attributes.get("shape") == "ellipse"
    )
    assert drawn == Counter({kind: t.count for kind, t in document().traffic.items()})
    for attributes in nodes.values():
        if attributes.get("shape") == "ellipse":
            kind = attributes["label"].strip('"').split("\\n")[0]
            assert attributes["fillcolor"] == f'"{COLLECTIVES[kind][0]}"'
    assert {name for edge in edges for name in edge} <= set(nodes)
    assert ("b0_forward", "b1_forward") in edges and ("b1_backward_0", "b1_backward") in edges


def test_dot_folds_repeated_layers() -> None:
    """Those whose collectives start in the same regions: the step starts some, the turn is at the last."""
    deep = tiny.traced(tiny.Blocks(5), tiny.batch(), 8, tiny.config(0))
    _, _, labels = parsed(dot(tiny.planned(deep, 3).document()))
    folded = ["blocks.0 .. 1 x 2", "blocks.2 .. 3 x 2", "blocks.4"]
    assert labels == ["inlet", *folded, "head", "the whole model"]


def test_names_are_quoted() -> None:
    named = document().model_copy(update={"model": 'a "b" \\ {'})
    assert 'label="a \\"b\\" \\\\ {, stage 3, 8 ranks"' in dot(named)


@pytest.mark.skipif(shutil.which("dot") is None, reason="no dot: install graphviz")
@pytest.mark.parametrize("fold", [True, False])
def test_graphviz_reads_it(fold: bool) -> None:
    run = subprocess.run(
        ["dot", "-Tsvg"], input=dot(document(), fold=fold), capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stderr == ""
    assert "gather_partials" in run.stdout
