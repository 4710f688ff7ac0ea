// The passes as steps, and the difference that each makes.

const CONTEXT = 3;
const differences = new Map();
const list = new List("Text after the pass");
let opened = new Set();
let rows = [];

const passIndex = () => Math.max(0, data.passes.findIndex((p) => p.name === state.pass));

/** The parts that differ from the pass before; the first line, which names the pass, left out. */
function differenceOf(pass, form) {
  const key = `${pass}/${form}`;
  if (!differences.has(key)) {
    const before = pass ? textOf(pass - 1, form) : textOf(pass, form);
    differences.set(key, differenceOfTexts(before.slice(1), textOf(pass, form).slice(1)));
  }
  return differences.get(key);
}

function counts(pass, form) {
  let plus = 0, minus = 0;
  for (const [same, a0, a1, b0, b1] of differenceOf(pass, form)) {
    if (!same) [plus, minus] = [plus + b1 - b0, minus + a1 - a0];
  }
  return [plus, minus];
}

/** Rows of {a, b}: positions before and after, -1 for none, `same`; or {fold, from, to}. */
function rowsOf(pass) {
  const parts = differenceOf(pass, state.form);
  const found = [];
  parts.forEach(([same, a0, a1, b0, b1], part) => {
    if (!same) return changedRows(found, a0, a1, b0, b1);
    const from = part ? CONTEXT : 0;
    const to = a1 - a0 - (part < parts.length - 1 ? CONTEXT : 0);
    const folded = state.view !== "text" && to - from > 2 && !opened.has(part);
    for (let i = 0; i < a1 - a0; i++) {
      if (folded && i === from) {
        found.push({ fold: to - from, part });
        i = to - 1;
      } else found.push({ a: a0 + i, b: b0 + i, same });
    }
  });
  return found;
}

function changedRows(found, a0, a1, b0, b1) {
  if (state.view === "split") {
    const most = Math.max(a1 - a0, b1 - b0);
    for (let i = 0; i < most; i++) found.push({ a: a0 + i < a1 ? a0 + i : -1, b: b0 + i < b1 ? b0 + i : -1 });
    return;
  }
  const with_ = (i, end, start) => (start + i < end ? start + i : -1);
  if (state.view === "unified") for (let i = a0; i < a1; i++) found.push({ a: i, b: -1, other: with_(i - a0, b1, b0) });
  for (let i = b0; i < b1; i++) found.push({ a: -1, b: i, other: with_(i - b0, a1, a0), same: state.view === "text" });
}

function rowElement(index, pane) {
  const row = rows[index], pass = passIndex();
  if (row.fold) {
    const open = () => { opened.add(row.part); showDiff(); };
    return make("button", { class: "row fold", type: "button", onclick: open, tabindex: pane ? "-1" : null },
      pane ? "" : `${thousands(row.fold)} unchanged lines`);
  }
  const before = textOf(Math.max(0, pass - 1), state.form), after = textOf(pass, state.form);
  const old = state.view === "split" ? pane === 0 : row.b < 0;
  const at = old ? row.a : row.b;
  if (at < 0) return make("div", { class: "row blank" });
  const line = (old ? before : after)[at + 1];
  const shown = (l) => (state.view === "split" ? lines.text[l].replace(/ {3,}# /, "  # ") : lines.text[l]);
  const text = shown(line);
  const other = row.same ? -1 : state.view === "split" ? (old ? row.b : row.a) : row.other;
  const beside = other >= 0 ? shown((old ? after : before)[other + 1]) : null;
  const kind = row.same ? "" : old ? "removed" : "added";
  const hit = String(line) === state.line ? " target" : "";
  return make("div", { class: `row ${kind}${hit}`, title: name(lines.module, line) || null },
    make("span", { class: "at" }, String(at + 2)),
    make("span", { class: "sign" }, { added: "+", removed: "−" }[kind] || " "),
    ...painted(text, beside === null ? null : changed(text, beside)));
}

function showSteps() {
  const sums = data.passes.map(() => make("span"));
  $("steps").replaceChildren(...data.passes.map((entry, pass) => make("li", {}, make("button", {
    type: "button", "aria-current": pass === passIndex() ? "true" : null, onclick: () => go({ pass: entry.name, line: "" }),
  }, entry.name, sums[pass], make("small", {}, entry.did)))));
  countSteps(sums, state.form);
}

/** Fill in how many lines each pass adds and removes, one pass at a time so that the page stays quick. */
function countSteps(sums, form, pass = 0) {
  if (pass === sums.length || form !== state.form) return;
  const [plus, minus] = counts(pass, form);
  if (plus) sums[pass].append(make("span", { class: "plus" }, `+${thousands(plus)}`));
  if (minus) sums[pass].append(make("span", { class: "minus" }, `−${thousands(minus)}`));
  setTimeout(() => countSteps(sums, form, pass + 1));
}

function showDiff() {
  const pass = passIndex(), entry = data.passes[pass];
  const [plus, minus] = counts(pass, state.form);
  rows = rowsOf(pass);
  const change = pass === 0 ? "the first text" : plus || minus ? `${thousands(plus)} lines added, ${thousands(minus)} removed since ${data.passes[pass - 1].name}; new numbers of values do not count` : `no line of the ${state.form} text differs from ${data.passes[pass - 1].name}`;
  $("did").replaceChildren(make("b", {}, entry.name), ` ${entry.did} `, make("span", { class: "muted" }, `(${change})`));
  list.show(rows.length, state.view === "split" ? 2 : 1, rowElement);
}

/** Open what hides the line of the address, and scroll to it. */
function revealLine() {
  const after = textOf(passIndex(), state.form).slice(1);
  const at = after.indexOf(Number(state.line));
  if (state.line === "" || at < 0) return;
  differenceOf(passIndex(), state.form).forEach(([same, , , b0, b1], part) => {
    if (same && at >= b0 && at < b1) opened.add(part);
  });
  showDiff();
  list.reveal(rows.findIndex((row) => row.b === at));
}

/** Go to a line where it is: in the last pass that has it, in the full text. */
function goToLine(line) {
  let pass = data.passes.length - 1;
  while (pass > 0 && !textOf(pass, "full").includes(line)) pass--;
  const form = textOf(pass, "full").includes(line) ? "full" : "skeleton";
  go({ tab: "passes", pass: data.passes[pass].name, view: "text", form, line: String(line) });
}

function passesTab() {
  $("diff").append(list.root);
  switches($("passes"), "form");
  switches($("passes"), "view");
  const show = () => { opened = new Set(); showSteps(); showDiff(); revealLine(); };
  watch(["pass", "form", "view", "line"], () => state.tab === "passes" && show());
  return show;
}
