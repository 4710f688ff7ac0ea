// The blocks in order: what each does forward, backward and in the step. Repeated layers are one box.

let unfolded = new Set();

/** Folds as {name, first, count}. */
const runs = data.folds.reduce((found, [title, count]) => {
  const last = found.at(-1);
  return [...found, { title, count, first: last ? last.first + last.count : 0 }];
}, []);
const blockTitle = (block) => block.name || "the whole model";

const largest = Math.max(1, ...data.blocks.flatMap((b) => Object.values(b.parts).flatMap((p) => p.collectives.map((c) => c[2]))));

/** A collective as a pill that leads to its line; its colour is as wide as its bytes are many. */
function pill([kind, bucket, nbytes, node], times) {
  const band = `background:var(--c-${kind});width:${Math.round(5 + (35 * nbytes) / largest)}px`;
  const title = times > 1 ? `${kind} × ${times}` : `${kind} ${bucket}`.trim();
  const inner = [make("i", { style: band, "aria-hidden": "true" }), title, make("span", { class: "muted" }, `${bytes(nbytes)}${times > 1 ? " each" : ""}`)];
  return make("button", { class: "pill", type: "button", title: "show its line", onclick: () => goToLine(nodes.line[node]) }, ...inner);
}

function side(block, region, times) {
  const part = block.parts[region];
  const cell = make("div", { class: `side ${region}`, "data-region": region });
  if (!part) return cell;
  const work = [part.flops ? `${amount(part.flops)}FLOP` : "", part.seconds ? duration(part.seconds * 1e9) : ""].filter(Boolean);
  cell.append(...part.collectives.map((c) => pill(c, times)));
  if (work.length) cell.append(make("span", { class: "work" }, `${work.join(", ")}${times > 1 ? " each" : ""}`));
  return cell;
}

function box(block, run) {
  const size = block.params ? `${amount(block.numel)} elements in ${block.params} tensor${block.params > 1 ? "s" : ""}` : "norm, clipping and what belongs to no bucket";
  const buckets = run ? `${block.buckets[0] ?? ""} .. ${data.blocks[run.first + run.count - 1].buckets.at(-1) ?? ""}` : block.buckets.join(", ");
  const small = make("small", {}, [buckets, size].filter(Boolean).join(" · "));
  if (!run) return make("div", { class: "box" }, make("b", {}, blockTitle(block)), small);
  const open = unfolded.has(run.first);
  const toggle = () => { unfolded[open ? "delete" : "add"](run.first); showBlocks(); };
  return make("button", { class: "box", type: "button", "aria-expanded": String(open), onclick: toggle },
    make("span", { class: "times" }, `× ${run.count}`), make("b", {}, run.title), small);
}

function blockRow(block, run, inner) {
  const target = state.block && block.buckets.includes(state.block) && !(run && unfolded.has(run.first));
  const row = make("div", { class: `block${inner ? " inner" : ""}${target ? " target" : ""}`, role: "listitem", "data-block": block.name });
  const times = run ? run.count : 1;
  if (run && unfolded.has(run.first)) row.append(make("div", { class: "side forward" }), box(block, run), make("div", { class: "side backward" }), make("div", { class: "side step" }));
  else row.append(side(block, "forward", times), box(block, run), side(block, "backward", times), side(block, "step", times));
  return row;
}

function showBlocks() {
  const head = make("header", {}, ...["forward ↓", "block", "backward ↑", "step"].map((t) => make("span", {}, t)));
  const found = runs.flatMap((run) => {
    const blocks = data.blocks.slice(run.first, run.first + run.count);
    if (run.count === 1) return [blockRow(blocks[0], null, false)];
    const inner = unfolded.has(run.first) ? blocks.map((b) => blockRow(b, null, true)) : [];
    return [blockRow(blocks[0], run, false), ...inner];
  });
  $("blocks").replaceChildren(head, ...found);
  const long = runs.filter((r) => r.count > 1);
  $("unfold").hidden = !long.length;
  $("unfold").textContent = long.every((r) => unfolded.has(r.first)) ? "fold repeated layers" : "unfold all";
}

/** Unfold the run that hides the block of the address, and bring it into view. */
function revealBlock() {
  const index = data.blocks.findIndex((b) => b.buckets.includes(state.block));
  const run = runs.find((r) => index >= r.first && index < r.first + r.count);
  if (index < 0) return showBlocks();
  if (run.count > 1) unfolded.add(run.first);
  showBlocks();
  $("blocks").querySelector(".target .box")?.scrollIntoView({ block: "center" });
}

function graphTab() {
  $("blocks").setAttribute("role", "list");
  $("graph-legend").append(...kinds.map((k) => chip(k, `c-${k}`)));
  $("unfold").addEventListener("click", () => {
    const long = runs.filter((r) => r.count > 1).map((r) => r.first);
    unfolded = long.every((first) => unfolded.has(first)) ? new Set() : new Set(long);
    showBlocks();
  });
  watch(["block"], () => state.tab === "graph" && revealBlock());
  return revealBlock;
}
