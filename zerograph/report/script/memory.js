// Bytes alive over the step, stacked by category.

const LEFT = 74, FLOOR = 34, CEILING = 34;
const { categories } = data.memory;
const count_ = nodes.op.length;
const totals = new Float64Array(count_);
for (const column of alive) column.forEach((held, i) => (totals[i] += held));

/** When each node is reached: compute at its start, any other when the compute before it ends. */
const reached = new Float64Array(count_ + 1);
for (let i = 0, now = 0; i < count_; i++) {
  const computes = name(nodes.stream, i) === "compute";
  reached[i] = computes ? Math.max(now, nodes.start[i]) : now;
  if (computes) now = Math.max(now, nodes.start[i] + nodes.seconds[i]);
  reached[i + 1] = now;
}

const aliveView = new Zoom($("alive"), paintAlive, { m: () => goToPeak() });
aliveView.inset = LEFT;
let pointed = -1;

const across = (i) => (state.axis === "time" ? reached[i] : i);
const most = Math.max(1, totals.reduce((a, b) => Math.max(a, b), data.memory.peak));

/** The node whose slot holds `value` on the axis. */
function nodeAt(value) {
  if (state.axis === "order") return Math.max(0, Math.min(count_ - 1, Math.floor(value)));
  let low = 0, high = count_ - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (reached[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

function paintAlive(context, width, height) {
  const tall = height - FLOOR - CEILING, y = (held) => CEILING + tall * (1 - held / most);
  context.fillStyle = colour("muted");
  context.textAlign = "right";
  for (const held of byteTicks(most)) {
    context.globalAlpha = 0.16;
    context.fillRect(LEFT, y(held), width - LEFT, 1);
    context.globalAlpha = 1;
    context.fillText(bytes(held), LEFT - 8, y(held));
  }
  context.textAlign = "left";
  paintColumns(context, width, y);
  paintBounds(context, height);
  paintPeak(context, width, y);
}

function byteTicks(top) {
  const raw = top / 5, power = 2 ** Math.floor(Math.log2(raw));
  const step = power * (raw / power > 1.5 ? 2 : 1);
  return Array.from({ length: Math.floor(top / step) + 1 }, (_, i) => i * step);
}

/** One column a pixel: the node with the most bytes among those in it. */
function paintColumns(context, width, y) {
  for (let x = LEFT; x < width; x++) {
    const from = nodeAt(aliveView.at(x)), to = Math.max(from + 1, Math.min(count_, nodeAt(aliveView.at(x + 1))));
    let node = from;
    for (let i = from; i < to; i++) if (totals[i] > totals[node]) node = i;
    let held = 0;
    for (let c = 0; c < categories.length; c++) {
      if (!alive[c][node]) continue;
      const base = y(held);
      held += alive[c][node];
      context.fillStyle = colour(`m-${categories[c]}`);
      context.fillRect(x, y(held), 1, base - y(held));
    }
  }
}

function paintBounds(context, height) {
  for (const region of REGIONS) {
    const first = nodes.region.findIndex((r) => strings[r] === region);
    const last = nodes.region.findLastIndex((r) => strings[r] === region);
    if (first < 0) continue;
    const x0 = Math.max(LEFT, aliveView.x(across(first))), x1 = Math.min(aliveView.width, aliveView.x(across(last + 1)));
    if (x1 <= x0) continue;
    context.fillStyle = colour("rule");
    context.fillRect(x0, CEILING, 1, height - CEILING);
    context.fillStyle = colour("muted");
    label(context, region, x0 + 6, height - FLOOR / 2, x1 - x0 - 10);
  }
}

function paintPeak(context, width, y) {
  const node = data.memory.peak_node;
  if (node < 0) return;
  const x = aliveView.x(across(node) + (state.axis === "order" ? 0.5 : 0));
  if (x < LEFT || x > width) return;
  const text = `peak ${bytes(data.memory.peak)}: ${causeOf(node)}`;
  context.fillStyle = colour("ink");
  context.fillRect(x - 0.5, CEILING - 10, 1, y(0) - CEILING + 10);
  context.beginPath();
  context.arc(x, y(totals[node]), 3.5, 0, 7);
  context.fill();
  context.font = "600 12px system-ui, sans-serif";
  const room = context.measureText(text).width;
  context.fillText(text, Math.max(LEFT, Math.min(x + 8, width - room - 8)), 14);
}

const causeOf = (node) => `${name(nodes.module, node) || data.model}, ${shortName(node)}`;

function goToPeak() {
  const at = across(data.memory.peak_node), half = (aliveView.to - aliveView.from) / 40;
  aliveView.range(at - half, at + half);
}

function pointAt(event) {
  if (event.buttons || event.offsetX < LEFT) return hideTip();
  const node = nodeAt(aliveView.at(event.offsetX));
  if (node === pointed && !$("tip").hidden) return;
  const line = nodes.line[node];
  showTip(event,
    make("code", { class: "mono" }, line >= 0 ? lines.text[line].trim().replace(/ {2,}/g, "  ") : name(nodes.op, node)),
    terms([["alive", bytes(totals[node])], ...categories.map((c, i) => [c, alive[i][node] ? bytes(alive[i][node]) : ""]).reverse(),
      ["module", name(nodes.module, node)]]));
}

function peakTable() {
  const node = data.memory.peak_node, held = data.memory.at_peak;
  if (node < 0) return make("p", { class: "muted" }, "The step has no nodes.");
  const share = (b) => `${((100 * b) / (data.memory.peak || 1)).toFixed(1)} %`;
  if (held.length) {
    const body = held.slice(0, 40).map((h) => [make("code", {}, h.owner || data.model), chip(h.category, `m-${h.category}`), bytes(h.bytes), share(h.bytes)]);
    const rest = held.slice(40).reduce((sum, h) => sum + h.bytes, 0);
    if (rest) body.push([`${held.length - 40} more`, "", bytes(rest), share(rest)]);
    return table(["module or bucket", "category", "bytes", "share"], body, [2, 3]);
  }
  const body = categories.map((c, i) => [chip(c, `m-${c}`), bytes(alive[i][node]), share(alive[i][node])]);
  return make("div", {}, table(["category", "bytes", "share"], body, [1, 2]),
    make("p", { class: "help" }, "This plan does not say which modules hold these bytes."));
}

function heldTable() {
  const m = data.memory;
  const body = ["parameters", "gradients", "optimizer", "buffers"].map((c) => [chip(c, `m-${c}`), bytes(m[c])]);
  body.push(["gathered at most", bytes(m.gathered)], ["saved for the backward", bytes(m.saved)], ["padding, in the above", bytes(m.padding)]);
  if (m.kept_at_peak) body.push(["kept for the backward, at the peak", bytes(m.kept_at_peak)]);
  if (m.host) body.push(["on the host at most", bytes(m.host)], ["on the host, at the peak", bytes(m.host_at_peak)]);
  return table(["", "bytes"], body, [1]);
}

function memoryTab() {
  const canvas = $("alive");
  canvas.addEventListener("pointermove", pointAt);
  canvas.addEventListener("pointerleave", hideTip);
  const fit = () => { aliveView.whole(0, Math.max(1, across(count_))); aliveView.draw(); };
  switches($("memory"), "axis");
  watch(["axis"], fit);
  const node = data.memory.peak_node;
  const cause = node < 0 ? "" : `, reached in ${name(nodes.region, node)} by ${causeOf(node)}`;
  canvas.setAttribute("aria-label", `Memory over the step: peak ${bytes(data.memory.peak)}${cause}`);
  $("peak").replaceChildren("peak ", make("b", {}, bytes(data.memory.peak)), make("span", { class: "muted" }, cause),
    node < 0 || nodes.line[node] < 0 ? "" : make("button", { class: "quiet", type: "button", style: "margin-left:10px", onclick: () => goToLine(nodes.line[node]) }, "show its line"));
  $("alive-legend").append(...categories.map((c) => chip(c, `m-${c}`)));
  $("at-peak").append(peakTable());
  $("held").append(heldTable());
  fit();
  return () => aliveView.draw();
}
