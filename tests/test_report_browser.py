"""The HTML report in a headless browser: tabs, themes, search, keys, and that it asks for nothing."""

import difflib
import re
from itertools import pairwise

import pytest

from tests import tiny
from tests.browser import needs_browser, visit
from tests.test_report import document, page, recording
from zerograph.report import colours, render
from zerograph.units import size

pytestmark = needs_browser
MINUS = "\N{MINUS SIGN}"
TABS = ("overview", "passes", "timeline", "memory", "graph", "kernels")


SHADES = """
const shades = (id) => {
  const canvas = document.getElementById(id);
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const found = new Set();
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 250)
    found.add("#" + [0, 1, 2].map((c) => pixels[i + c].toString(16).padStart(2, "0")).join(""));
  return [...found];
};
"""


@pytest.mark.parametrize("tab", TABS)
def test_each_tab_shows_itself_alone(tab: str) -> None:
    script = """
    answer.shown = Object.keys(tabs).filter((t) => !$(t).hidden);
    answer.selected = [...document.querySelectorAll("[aria-selected=true]")].map((t) => t.dataset.tab);
    answer.text = $(state.tab).innerText;
    """
    seen = visit(page(), f"tab={tab}", script)
    assert seen.console == [] and seen.requests == []
    assert seen.answer["shown"] == seen.answer["selected"] == [tab]
    said = {
        "overview": "Memory at the peak",
        "passes": "gathers started early",
        "timeline": "measured on rank 3",
        "memory": f"peak {size(document().memory.peak)}",
        "graph": "blocks.1",
        "kernels": "update_adamw_f32_f32.cpp",
    }
    assert said[tab] in seen.answer["text"]


def test_back_leads_to_the_tab_before() -> None:
    script = """
    go({ tab: "memory", axis: "time" }); go({ tab: "graph" });
    history.back();
    await new Promise((resolve) => setTimeout(resolve, 200));
    answer.shown = Object.keys(tabs).filter((t) => !$(t).hidden);
    answer.state = [state.tab, state.axis, location.hash];
    """
    seen = visit(page(), "tab=passes", script).answer
    assert seen == {"shown": ["memory"], "state": ["memory", "time", "#tab=memory&axis=time"]}


def test_requests_and_errors_would_be_seen() -> None:
    """The page's own policy stops a request; the browser reports both that and an error."""
    open_ = page().replace("default-src 'none'; ", "")
    script = "fetch('http://127.0.0.1:9/x').catch(() => {}); setTimeout(() => nothing(), 0);"
    seen = visit(open_, "", script)
    assert any("127.0.0.1:9" in url for url in seen.requests)
    assert any("nothing is not defined" in line for line in seen.console)
    assert any("Content Security Policy" in line for line in visit(page(), "", script).console)


def test_drawings_have_the_colours_of_the_theme() -> None:
    script = (
        SHADES
        + """
    answer.spans = shades("spans");
    go({ tab: "memory" });
    answer.alive = shades("alive");
    go({ theme: state.theme === "dark" ? "light" : "dark" });
    answer.other = shades("alive");
    """
    )
    for theme, name in enumerate(("light", "dark")):
        seen = visit(page(), f"tab=timeline&theme={name}", script).answer
        assert {colours.COLLECTIVES[k][theme] for k in document().traffic} <= set(seen["spans"])
        assert {colours.MEMORY[k][theme] for k in ("parameters", "optimizer")} <= set(seen["alive"])
        assert colours.MEMORY["optimizer"][1 - theme] in seen["other"]


def test_dark_follows_the_system_and_the_switch() -> None:
    look = "getComputedStyle(document.body).backgroundColor"
    script = f"""
    answer.first = {look};
    $("theme").click(); $("theme").click();
    answer.later = [{look}, location.hash];
    """
    dark, light = "rgb(20, 22, 26)", "rgb(252, 252, 250)"
    seen = visit(page(), "", script).answer
    assert seen == {"first": light, "later": [dark, "#theme=dark"]}
    prefers_dark = "--blink-settings=preferredColorScheme=0"
    assert visit(page(), "", script, prefers_dark).answer["first"] == dark
    assert visit(page(), "theme=light", script, prefers_dark).answer["first"] == light


def test_search_finds_and_jumps() -> None:
    script = """
    const groups = () => [...document.querySelectorAll("#found h4")].map((h) => h.textContent.split(" ")[0]);
    const press = (key) => $("search").dispatchEvent(new KeyboardEvent("keydown", { key }));
    answer.line = [groups(), document.querySelector(".hit .mono").textContent];
    press("ArrowDown"); press("Enter");
    answer.closed = $("found").hidden;
    answer.tab = state.tab;
    answer.target = document.querySelector(".row.target")?.textContent;
    $("search").value = "gather"; $("search").dispatchEvent(new Event("input"));
    answer.pass = groups();
    go({ q: "blocks.1" }); answer.module = groups();
    go({ q: "xyzzy" }); answer.nothing = $("found").textContent;
    """
    seen = visit(page(), "q=reduce_scatter+b2", script).answer
    groups, text = seen["line"]
    assert groups == ["lines"] and "zero.reduce_scatter %b2.grad" in text
    assert seen["closed"] and seen["tab"] == "passes"
    assert "zero.reduce_scatter %b2.grad" in seen["target"]
    assert seen["pass"] == ["passes", "lines"]
    assert seen["module"] == ["buckets", "modules", "lines"]
    assert seen["nothing"] == "Nothing has “xyzzy” in it."


def test_a_line_of_an_address_is_in_sight_where_it_is_folded() -> None:
    entry = document().passes[5]
    line = entry.full[len(entry.full) // 2]
    script = """
    const row = document.querySelector(".row.target"), box = row?.getBoundingClientRect();
    const around = list.root.getBoundingClientRect();
    answer.text = row?.textContent;
    answer.inside = box && box.top >= around.top && box.bottom <= around.bottom;
    """
    hash = f"tab=passes&pass={entry.name}&form=full&view=unified&line={line}"
    seen = visit(page(), hash, script).answer
    assert document().lines[line].text.strip() in seen["text"] and seen["inside"]


def test_steps_say_how_many_lines_change() -> None:
    """The skeleton has no numbers of values, so that difflib sees what the page sees."""
    dom = visit(page(), "tab=passes").dom
    for before, entry in pairwise(document().passes):
        texts = [document().text(e.name, skeleton=True).splitlines()[1:] for e in (before, entry)]
        changes = list(difflib.ndiff(*texts))
        shown = re.search(rf">{entry.name}<span>(.*?)</span><small>", dom)
        counted = re.findall(rf">([+{MINUS}])([\d,]+)<", shown[1] if shown else "")
        expected = [
            (sign, sum(c.startswith(of) for c in changes)) for sign, of in ("++", MINUS + "-")
        ]
        assert [(s, int(n.replace(",", ""))) for s, n in counted] == [e for e in expected if e[1]]


def test_the_difference_is_one() -> None:
    """The parts cover both lists in order, what is called the same is, and no more is called changed
    than has to be where lines are unique."""
    script = """
    let seed = 1;
    const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
    const check = (a, b) => {
      let [i, j] = [0, 0];
      for (const [same, a0, a1, b0, b1] of diff(a, b)) {
        if (a0 !== i || b0 !== j || a1 < a0 || b1 < b0) return false;
        if (same && (a1 - a0 !== b1 - b0 || a.slice(a0, a1).some((x, k) => x !== b[b0 + k]))) return false;
        [i, j] = [a1, b1];
      }
      return i === a.length && j === b.length;
    };
    answer.wrong = 0;
    for (let n = 0; n < 2000; n++) {
      const few = 1 + random(12), list = () => Array.from({ length: random(30) }, () => random(few));
      if (!check(list(), list())) answer.wrong++;
    }
    const same = (parts) => parts.reduce((sum, [same, a0, a1]) => sum + (same ? a1 - a0 : 0), 0);
    answer.short = 0;
    for (let n = 0; n < 500; n++) {
      const a = Array.from({ length: 12 }, (_, i) => i), b = [...a];
      for (let i = 11; i > 0; i--) { const j = random(i + 1); [b[i], b[j]] = [b[j], b[i]]; }
      if (same(diff(a, b)) < subsequence(a, 0, 12, b, 0, 12).length) answer.short++;
    }
    const long = Array.from({ length: 20000 }, (_, i) => i), shifted = long.filter((i) => i % 500);
    answer.long = check(long, shifted);
    answer.kept = same(diff(long, shifted));
    """
    assert visit(page(), "", script).answer == {
        "wrong": 0,
        "short": 0,
        "long": True,
        "kept": 19960,
    }


def test_new_numbers_of_values_are_no_change_but_new_operands_are() -> None:
    script = """
    const texts = [
      ["  %0: f32[] = aten.a(%x)", "  %1: f32[] = aten.b(%0)", "  %2: f32[] = aten.c(%0, %1)"],
      ["  %0: f32[] = aten.new(%x)", "  %1: f32[] = aten.a(%x)", "  %2: f32[] = aten.b(%1)",
       "  %3: f32[] = aten.c(%1, %1)"],
    ];
    lines.text = texts.flat();
    lines.region = lines.text.map(() => 0);
    keys.length = 0;
    answer.parts = differenceOfTexts([0, 1, 2], [3, 4, 5, 6]);
    """
    parts = visit(page(), "", script).answer["parts"]
    assert parts == [[False, 0, 0, 0, 1], [True, 0, 2, 1, 3], [False, 2, 3, 3, 4]]


def test_keys_and_wheel_move_the_timeline() -> None:
    script = """
    const canvas = $("spans"), all = [spansView.low, spansView.high];
    const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
    const span = () => spansView.high - spansView.low;
    press("+"); answer.zoomed = span() / (all[1] - all[0]);
    const before = spansView.low; press("ArrowRight"); answer.moved = spansView.low > before;
    press("0"); answer.whole = spansView.low === all[0] && spansView.high === all[1];
    canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -80, cancelable: true }));
    answer.wheel = span() < all[1] - all[0];
    press("n"); answer.tip = $("tip").innerText;
    press("Enter"); answer.state = { ...state };
    answer.target = document.querySelector(".row.target")?.textContent;
    """
    seen = visit(page(), "tab=timeline", script)
    answer = seen.answer
    assert answer["zoomed"] == pytest.approx(0.6)
    assert answer["moved"] and answer["whole"] and answer["wheel"]
    assert "zero.gather b3" in answer["tip"]
    assert "measured" in answer["tip"] and "predicted" in answer["tip"]
    assert answer["state"]["tab"] == "passes" and "zero.gather b3" in answer["target"]
    assert seen.console == []


def test_collectives_that_overlap_are_in_rows() -> None:
    long = recording(document())
    for span in long.spans:
        span.seconds *= 3 if span.stream == "communication" else 1
    script = """
    const lane = measured.lanes[1];
    answer.rows = lane.rows.map((row) => row.every((s, i) => !i || row[i - 1].end <= s.start + 1));
    answer.kept = lane.rows.flat().length === lane.all.length;
    const [start, end] = extents[1].forward;
    answer.busy = busy(measured, "forward", "communication") / (end - start);
    const y = (row) => laneTop(1, 1) + 4 + ((row + 0.5) * (LANE - 8)) / lane.rows.length;
    const x = (span) => spansView.x((span.start + span.end) / 2);
    answer.found = lane.rows.map((row, r) => spanAt(x(row[0]), y(r)) === row[0]);
    """
    seen = visit(render(document(), long), "tab=timeline", script).answer
    assert len(seen["rows"]) > 1 and all(seen["rows"]) and seen["kept"] and all(seen["found"])
    assert 0 < seen["busy"] <= 1


def test_repeated_layers_unfold() -> None:
    script = """
    const names = () => [...document.querySelectorAll(".block")].map((b) => b.dataset.block);
    const expanded = () => document.querySelector("button.box").getAttribute("aria-expanded");
    answer.folded = [names(), expanded()];
    document.querySelector("button.box").click();
    answer.open = [names(), expanded()];
    """
    deep = tiny.traced(tiny.Blocks(3), tiny.batch(), 8, tiny.config(0))  # the last is not alike
    shown = render(tiny.planned(deep, 3).document("h100"))
    answer = visit(shown, "tab=graph", script).answer
    assert answer["folded"] == [["inlet", "blocks.0", "blocks.2", "head", ""], "false"]
    blocks = ["blocks.0", "blocks.0", "blocks.1", "blocks.2"]
    assert answer["open"] == [["inlet", *blocks, "head", ""], "true"]
    target = visit(shown, "tab=graph&block=b2").dom
    assert re.search(r'class="block inner target"[^>]*data-block="blocks.1"', target)


def test_kernels_are_shown_in_both_languages_or_said_to_be_missing() -> None:
    script = (
        'answer.titles = [...document.querySelectorAll("#sources h3")].map((h) => h.textContent);'
    )
    script += 'answer.text = $("sources").innerText;'
    seen = visit(page(), "tab=kernels", script).answer
    assert seen["titles"] == list(document().kernels)
    assert {title.partition(".")[2] for title in seen["titles"]} == {"cpp", "py"}
    assert "@triton.jit" in seen["text"] and 'extern "C"' in seen["text"]
    without = render(document().model_copy(update={"kernels": {}}))
    assert "no generated kernels" in visit(without, "tab=kernels", script).answer["text"]


def test_the_peak_names_its_module_and_kernels_show_their_source() -> None:
    node = document().nodes[document().memory.peak_node]
    held = [{"owner": "blocks.1.linear", "category": "activations", "bytes": 123 * 1024}]
    memory = document().memory.model_validate(
        document().memory.model_dump() | {"at_peak": tuple(held)}
    )
    script = 'answer.label = $("alive").getAttribute("aria-label"); answer.table = $("at-peak").innerText;'
    script += 'go({ tab: "kernels" }); answer.kernels = $("sources").innerText;'
    changed = {"memory": memory, "kernels": {"adamw.cpp": "int x = 1 < 2;"}}
    full = visit(render(document().model_copy(update=changed)), "tab=memory", script)
    assert full.answer["kernels"].split("\n") == ["adamw.cpp", "int x = 1 < 2;"]
    assert node.module in full.answer["label"]
    assert "blocks.1.linear" in full.answer["table"] and "123.0 KiB" in full.answer["table"]
