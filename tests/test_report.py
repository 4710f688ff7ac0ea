"""The HTML report: what the page says, that it is whole, and the same each time."""

import functools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny
from zerograph import ops
from zerograph.blocks import blocks_of, folded_name, folds
from zerograph.document import Document
from zerograph.errors import PlanError
from zerograph.report import colours, render
from zerograph.report.data import lines_of_nodes, payload
from zerograph.units import size


@functools.cache
def document() -> Document:
    return tiny.planned(tiny.trace_of("blocks"), 3).document("h100")


def recording(of: Document, **changed: Any) -> Any:
    """A run in which everything took half as long again as predicted."""
    spans = [
        SimpleNamespace(
            node=i, region=n.region, stream=n.stream, start=1.5 * n.start, seconds=1.5 * n.seconds
        )
        for i, n in enumerate(of.nodes)
        if n.stream
    ]
    made = {"model": of.model, "stage": of.stage, "world": of.world, "rank": 3, "spans": spans}
    return SimpleNamespace(**(made | changed))


@functools.cache
def page() -> str:
    return render(document(), recording(document()))


class Reader(HTMLParser):
    """Texts of a page by the id of their section; script and style left out; and all attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.section, self.skipped = "", 0
        self.texts: dict[str, str] = {}
        self.pre: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "pre":
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self.inside or "style" in self.inside:
            return
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if "pre" in self.inside:
            self.pre[-1] += data


# The page


def test_the_same_document_gives_the_same_page() -> None:
    again = Document.model_validate(json.loads(document().dumps()))
    assert render(again, recording(again)) == page()


def test_the_page_is_the_same_in_another_process(tmp_path: Any) -> None:
    document().save(tmp_path / "plan.json")
    code = (
        "import sys; from zerograph.document import Document; from zerograph.report import render; "
        "sys.stdout.write(render(Document.load(sys.argv[1])))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plan.json")],
        capture_output=True,
        encoding="utf-8",
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"},
        check=True,
    )
    assert run.stdout == render(document())


def test_the_page_asks_for_nothing() -> None:
    reader = Reader(page())
    outside = [
        (tag, name, value)
        for tag, name, value in reader.attributes
        if name in ("src", "href", "action", "srcset") and not value.startswith(("#", "data:"))
    ]
    assert outside == []
    assert not re.search(r"@import|url\(|https?://", page())
    policy = next(v for t, n, v in reader.attributes if n == "content" and "default-src" in v)
    assert "default-src 'none'" in policy


def test_overview_and_text_are_there_without_a_script() -> None:
    reader = Reader(page())
    overview = reader.texts["overview"]
    for said in (
        document().precision,
        document().time.cluster,
        size(document().memory.peak),
        "zero_optimization.stage",
        "blocks.0 .. 1",
        "gather_partials",
        *document().advisory,
    ):
        assert said in overview, said
    assert reader.pre[0] == document().text(skeleton=True)


def test_names_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><b>"
    named = document().model_copy(update={"model": evil, "advisory": (evil,)})
    html = render(named)
    assert evil not in html and "<b>\n" not in html
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data and json.loads(data[1])["model"] == evil


def test_every_field_has_a_label() -> None:
    page_ = page()
    for tag in re.findall(r"<(?:input|canvas)[^>]*>", page_):
        assert "aria-label" in tag or "aria-describedby" in tag, tag
    assert '<html lang="en">' in page_


def test_an_empty_plan_has_a_page() -> None:
    memory = document().memory.model_copy(update={"peak_node": -1})
    html = render(
        document().model_copy(
            update={"nodes": (), "buckets": (), "traffic": {}, "config": {}, "memory": memory}
        )
    )
    assert "This step has no collectives." in html and "every key has its default" in html


# The data


def test_the_data_is_the_document() -> None:
    of, data = document(), payload(document(), None)
    assert data["lines"]["text"] == [line.text for line in of.lines]
    for entry, given in zip(of.passes, data["passes"]):
        for form in ("full", "skeleton"):
            runs = given[form]
            decoded = [i for a, n in zip(runs[::2], runs[1::2]) for i in range(a, a + n)]
            assert decoded == list(getattr(entry, form))
    for name in ("op", "region", "module", "bucket", "stream"):
        shown = [data["strings"][i] for i in data["nodes"][name]]
        assert shown == [getattr(n, name) for n in of.nodes]
    alive = zip(*(accumulate(column) for column in data["alive"]))
    assert list(alive) == [n.alive for n in of.nodes]


@pytest.mark.parametrize("stage", [0, 3])
def test_each_node_has_its_line(stage: int) -> None:
    of = tiny.planned(tiny.trace_of("blocks"), stage).document()
    found = lines_of_nodes(of)
    assert len(set(found)) == len(of.nodes)
    for node, at in zip(of.nodes, found):
        line = of.lines[at]
        assert line.region == node.region and line.bucket == node.bucket
        assert node.op in line.text or node.op == "getitem"


def test_a_recording_of_another_plan_is_refused() -> None:
    with pytest.raises(PlanError, match="the recording is of Other at stage 3 on 8 ranks"):
        render(document(), recording(document(), model="Other"))
    late = [SimpleNamespace(node=10**6, region="step", stream="compute", start=0.0, seconds=1.0)]
    with pytest.raises(PlanError, match="has a node 1000000, the plan has"):
        render(document(), recording(document(), spans=late))


# Blocks and colours


def test_runs_are_alike_and_count_up() -> None:
    names = ["in", "h.0", "h.1", "h.2", "h.4", "h.5.a", "h.6.a", "h.8.a", "out"]
    runs = folds(names, lambda n: n, lambda n: n == "h.2")
    assert runs == [
        ["in"],
        ["h.0", "h.1"],
        ["h.2"],
        ["h.4"],
        ["h.5.a", "h.6.a"],
        ["h.8.a"],
        ["out"],
    ]
    assert [folded_name(run) for run in runs[1:5]] == ["h.0 .. 1", "h.2", "h.4", "h.5 .. 6.a"]


def test_every_node_is_in_one_block() -> None:
    blocks = blocks_of(document())
    parts = [part for block in blocks for part in block.parts.values()]
    assert sum(part.nodes for part in parts) == len(document().nodes)
    collectives = [each for part in parts for each in part.collectives]
    assert len(collectives) == sum(t.count for t in document().traffic.values())
    assert [b.name for b in blocks] == ["inlet", "blocks.0", "blocks.1", "head", ""]


def test_each_kind_has_a_colour_of_its_own_that_is_seen() -> None:
    kinds = [op._schema.name.partition("::")[2] for op in ops.COLLECTIVES]
    assert set(colours.COLLECTIVES) == set(kinds)
    found = colours.collective_colours([*kinds, "reload"])
    for theme, ground in enumerate(("#ffffff", "#1b1e24")):
        shades = [pair[theme] for pair in found.values()]
        assert len(set(shades)) == len(shades)
        assert all(contrast(shade, ground) >= 3 for shade in shades), shades


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(theme: str) -> None:
    style = page()[
        page().index(":root {") if theme == "light" else page().index("@media (prefers") :
    ]
    value = dict(re.findall(r"--([\w-]+): (#\w{6});", style)[::-1])
    for ink in ("ink", "muted"):
        for ground in ("ground", "raised", "sunken"):
            assert contrast(value[ink], value[ground]) >= 4.5, (ink, ground)
    assert contrast(value["added-ink"], value["ground"]) >= 4.5
    assert contrast(value["removed-ink"], value["ground"]) >= 4.5


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2.1, 1.4.3."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
