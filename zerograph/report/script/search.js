// One box that finds lines, modules, buckets and passes, and leads to them.

const MOST = 40;
const lowered = [];
const moduleNames = [...new Set(nodes.module)].map((m) => strings[m]).filter(Boolean);
let hits = [], at = -1;

function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  if (!lowered.length) for (const text of lines.text) lowered.push(text.toLowerCase());
  const has = (text) => words.every((word) => text.includes(word));
  const final = new Set(textOf(data.passes.length - 1, "full"));
  const found = lowered.flatMap((text, line) => (has(text) ? [line] : []));
  const ordered = [...found.filter((l) => final.has(l)), ...found.filter((l) => !final.has(l))];
  return [
    ["passes", data.passes.filter((p) => has(`${p.name} ${p.did}`.toLowerCase())).map((p) => ({
      text: p.name, note: p.did, jump: () => go({ tab: "passes", pass: p.name, view: "split", line: "" }) }))],
    ["buckets", data.buckets.filter(([b, block]) => has(`${b} ${block}`.toLowerCase())).map(([b, block]) => ({
      text: b, note: block, jump: () => go({ tab: "graph", block: b }) }))],
    ["modules", moduleNames.filter((m) => has(m.toLowerCase())).map((m) => ({
      text: m, note: "its first line", jump: () => goToLine(nodes.line[nodes.module.findIndex((i) => strings[i] === m)]) }))],
    ["lines", ordered.map((line) => ({
      text: lines.text[line].trim().replace(/ {2,}/g, "  "), note: final.has(line) ? name(lines.region, line) : "before the last pass", jump: () => goToLine(line) }))],
  ].filter(([, group]) => group.length);
}

/** `text` with the words of the query marked. */
function marked(text) {
  const words = state.q.split(/\s+/).filter(Boolean).map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const parts = text.split(new RegExp(`(${words.join("|")})`, "i"));
  return parts.map((part, i) => (i % 2 ? make("mark", {}, part) : part));
}

function showHits() {
  const box = $("found"), groups = search(state.q);
  hits = [];
  at = -1;
  box.replaceChildren(...groups.flatMap(([title, group]) => [
    make("h4", {}, `${title} (${thousands(group.length)}${group.length > MOST ? `, the first ${MOST}` : ""})`),
    ...group.slice(0, MOST).map((hit) => {
      const option = make("div", { class: "hit", role: "option", id: `hit-${hits.length}`, "aria-selected": "false", onclick: () => take(hit) },
        make("span", { class: "mono" }, ...marked(hit.text)), make("span", { class: "muted" }, hit.note));
      hits.push({ ...hit, option });
      return option;
    }),
  ]));
  if (!hits.length) box.replaceChildren(make("p", { class: "muted" }, `Nothing has “${state.q}” in it.`));
  open(Boolean(state.q.trim()));
}

function open(shown) {
  $("found").hidden = !shown;
  $("search").setAttribute("aria-expanded", String(shown));
  if (!shown) $("search").removeAttribute("aria-activedescendant");
}

function take(hit) {
  open(false);
  hit.jump();
}

function point(index) {
  hits[at]?.option.setAttribute("aria-selected", "false");
  at = (index + hits.length) % hits.length;
  hits[at].option.setAttribute("aria-selected", "true");
  hits[at].option.scrollIntoView({ block: "nearest" });
  $("search").setAttribute("aria-activedescendant", hits[at].option.id);
}

function searchKey(event) {
  if (event.key === "Escape") open(false);
  if (!hits.length) return;
  if (event.key === "ArrowDown") point(at + 1);
  else if (event.key === "ArrowUp") point(at < 0 ? hits.length - 1 : at - 1);
  else if (event.key === "Enter") take(hits[Math.max(0, at)]);
  else return;
  event.preventDefault();
}

function searchBox() {
  const input = $("search");
  input.value = state.q;
  input.addEventListener("input", () => go({ q: input.value }));
  input.addEventListener("focus", () => state.q && showHits());
  input.addEventListener("keydown", searchKey);
  document.addEventListener("pointerdown", (e) => e.target.closest(".search") || open(false));
  document.addEventListener("keydown", (e) => {
    const typing = e.target.closest("input, textarea, select");
    if (e.key === "/" && !typing) { e.preventDefault(); input.focus(); input.select(); }
  });
  watch(["q"], () => { if (input.value !== state.q) input.value = state.q; showHits(); });
  if (state.q) showHits();
}
