// When each node runs: rows of compute, communication and copy; predicted, and measured below.

const STREAMS = ["compute", "communication", "copy"];
const LANE = 36, GAP = 36, GUTTER = 116, TOP = 48;

/** Spans of one clock by stream: all in order, and in rows in which none overlaps another. */
function clockOf(title, spans) {
  const lanes = STREAMS.map((stream) => {
    const all = spans.filter((s) => s.stream === stream).sort((a, b) => a.start - b.start);
    return { all, rows: rowsOfSpans(all) };
  });
  const end = spans.reduce((most, s) => Math.max(most, s.end), 0);
  return { title, lanes, end, spans };
}

function rowsOfSpans(spans) {
  const rows = [];
  for (const span of spans) {
    const row = rows.find((r) => r.at(-1).end <= span.start + 1);
    if (row) row.push(span); else rows.push([span]);
  }
  return rows;
}

const predicted = clockOf("predicted", nodes.start.flatMap((start, node) => {
  const stream = name(nodes.stream, node);
  return stream ? [{ node, stream, region: name(nodes.region, node), start, end: start + nodes.seconds[node] }] : [];
}));
const measured = data.measured && clockOf(`measured on rank ${data.measured.rank}`, data.measured.node.map((node, i) => ({
  node, stream: data.measured.stream[i], region: data.measured.region[i],
  start: data.measured.start[i], end: data.measured.start[i] + data.measured.seconds[i],
})));
const clocks = measured ? [predicted, measured] : [predicted];
let chosen = null;

/** Start and end of a region on a clock. */
function extent(clock, region) {
  const inside = clock.spans.filter((s) => region === "all" || s.region === region);
  return [inside.reduce((m, s) => Math.min(m, s.start), Infinity), inside.reduce((m, s) => Math.max(m, s.end), 0)];
}
const extents = clocks.map((clock) => Object.fromEntries(["all", ...REGIONS].map((r) => [r, extent(clock, r)])));

const laneTop = (clock, lane) => TOP + clock * (3 * LANE + GAP) + lane * LANE;

const spansView = new Zoom($("spans"), paintSpans, {
  n: () => stepTo(1), p: () => stepTo(-1), Enter: () => chosen && goToLine(nodes.line[chosen.node]),
});
spansView.inset = GUTTER;

function paintSpans(context, width, height) {
  const view = spansView;
  context.fillStyle = colour("muted");
  for (const t of ticks(view.low, view.high, width / 130)) {
    const x = view.x(t);
    context.globalAlpha = 0.16;
    context.fillRect(x, 24, 1, height - 24);
    context.globalAlpha = 1;
    context.fillText(duration(t), x + 4, 12);
  }
  clocks.forEach((clock, c) => {
    paintRegions(context, c);
    clock.lanes.forEach(({ rows }, lane) => {
      const height = (LANE - 8) / rows.length;
      rows.forEach((spans, row) => paintRow(context, spans, laneTop(c, lane) + 4 + row * height, height));
    });
  });
  context.fillStyle = colour("raised");
  context.fillRect(0, 0, GUTTER, height);
  clocks.forEach((clock, c) => {
    context.fillStyle = colour("ink");
    context.font = "600 12px system-ui, sans-serif";
    context.fillText(clock.title.split(" on ")[0], 14, laneTop(c, 0) - 10);
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("muted");
    STREAMS.forEach((stream, lane) => context.fillText(stream, 14, laneTop(c, lane) + LANE / 2));
  });
}

function paintRegions(context, c) {
  for (const region of REGIONS) {
    const [start, end] = extents[c][region];
    if (start >= end) continue;
    const x0 = Math.max(GUTTER, spansView.x(start)), x1 = Math.min(spansView.width, spansView.x(end));
    if (x1 <= x0) continue;
    const top = laneTop(c, 0);
    context.fillStyle = colour("sunken");
    context.fillRect(x0, top, x1 - x0 - 1, 3 * LANE);
    context.fillStyle = colour("muted");
    label(context, region, x0 + 4, top - 10, x1 - x0 - 8);
  }
}

/** The spans in sight; those narrower than a pixel share one. */
function paintRow(context, spans, top, height) {
  let painted = -1;
  for (let i = firstEnding(spans, spansView.low); i < spans.length && spans[i].start < spansView.high; i++) {
    const x0 = spansView.x(spans[i].start), x1 = spansView.x(spans[i].end);
    if (x1 < painted + 0.5) continue;
    painted = Math.max(x1, x0 + 0.7);
    context.fillStyle = colour(colourOf(spans[i].node));
    context.fillRect(x0, top, Math.max(0.7, x1 - x0 - (x1 - x0 > 3 ? 1 : 0)), height - (height > 5 && height < LANE - 8 ? 1 : 0));
    if (x1 - x0 > 46 && height > 12) {
      context.fillStyle = colour("ground");
      label(context, shortName(spans[i].node), Math.max(x0, GUTTER) + 5, top + height / 2, x1 - Math.max(x0, GUTTER) - 10);
    }
    if (spans[i] === chosen) {
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      context.strokeRect(x0, top, Math.max(2, x1 - x0), height);
    }
  }
}

const shortName = (node) => [name(nodes.op, node).replace(/^aten\.|^zero\./, ""), name(nodes.bucket, node)].filter(Boolean).join(" ");

/** The first span of a row that ends after `time`. */
function firstEnding(spans, time) {
  let low = 0, high = spans.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[middle].end < time) low = middle + 1; else high = middle;
  }
  return low;
}

function spanAt(x, y) {
  if (x < GUTTER) return null;
  const near = ((spansView.high - spansView.low) / spansView.width) * 2, time = spansView.at(x);
  for (let c = 0; c < clocks.length; c++) {
    const lane = Math.floor((y - laneTop(c, 0)) / LANE);
    const { rows } = clocks[c].lanes[lane] ?? { rows: [] };
    const row = Math.floor(((y - laneTop(c, lane) - 4) / (LANE - 8)) * rows.length);
    const spans = rows[Math.max(0, Math.min(rows.length - 1, row))] ?? [];
    const found = spans[firstEnding(spans, time - near)];
    if (found && found.start <= time + near) return found;
  }
  return null;
}

/** What a tooltip says of a node. */
function about(span) {
  const { node } = span, line = nodes.line[node];
  const took = (clock) => clock && clock.spans.find((s) => s.node === node);
  const [guess, ran] = [took(predicted), took(measured)];
  return [
    make("code", { class: "mono" }, line >= 0 ? lines.text[line].trim().replace(/ {2,}/g, "  ") : name(nodes.op, node)),
    terms([
      ["region", `${span.region}, ${span.stream}`], ["module", name(nodes.module, node)], ["bucket", name(nodes.bucket, node)],
      ["bytes", bytes(nodes.nbytes[node])], ["memory traffic", nodes.moved[node] ? bytes(nodes.moved[node]) : ""],
      ["FLOPs", nodes.flops[node] ? amount(nodes.flops[node]) : ""],
      ["predicted", guess ? `${duration(guess.end - guess.start)} from ${duration(guess.start)}` : ""],
      ["measured", ran ? `${duration(ran.end - ran.start)} from ${duration(ran.start)}` : ""],
    ]),
  ];
}

/** Choose the next or previous collective of the last clock, and bring it into view. */
function stepTo(direction) {
  const spans = clocks.at(-1).lanes[1].all;
  if (!spans.length) return;
  const now = spans.indexOf(chosen);
  const next = now < 0 ? (direction > 0 ? 0 : spans.length - 1) : Math.min(spans.length - 1, Math.max(0, now + direction));
  chosen = spans[next];
  const half = Math.max((spansView.high - spansView.low) / 2, (chosen.end - chosen.start) / 1.6);
  const middle = (chosen.start + chosen.end) / 2;
  if (chosen.start < spansView.low || chosen.end > spansView.high) spansView.range(middle - half, middle + half);
  else spansView.draw();
  showTip(pointOn($("spans"), spansView.x(Math.max(chosen.start, spansView.low)), laneTop(clocks.length - 1, 1) + LANE), ...about(chosen));
}

function showRegion() {
  const [start, end] = [Math.min(...extents.map((e) => e[state.region][0])), Math.max(...extents.map((e) => e[state.region][1]))];
  if (start < end) spansView.range(start, end);
}

/** Time in which a stream does something for a region; what overlaps counts once. */
function busy(clock, region, stream) {
  let [sum, covered] = [0, 0];
  for (const span of clock.lanes[STREAMS.indexOf(stream)].all.filter((s) => s.region === region)) {
    sum += Math.max(0, span.end - Math.max(span.start, covered));
    covered = Math.max(covered, span.end);
  }
  return sum;
}

function regionTable() {
  const head = ["region", ...clocks.flatMap((c) => [c.title.split(" ")[0], "compute", "communication"])];
  const body = REGIONS.map((region) => [region, ...clocks.flatMap((clock, c) => {
    const [start, end] = extents[c][region];
    return [duration(Math.max(0, end - start || 0)), duration(busy(clock, region, "compute")), duration(busy(clock, region, "communication"))];
  })]);
  return table(head, body, [1, 2, 3, 4, 5, 6]);
}

function operatorTable() {
  const found = new Map();
  clocks.forEach((clock, c) => clock.spans.forEach((s) => {
    const op = name(nodes.op, s.node);
    if (!found.has(op)) found.set(op, { op, node: s.node, count: 0, took: clocks.map(() => 0) });
    if (!c) found.get(op).count++;
    found.get(op).took[c] += s.end - s.start;
  }));
  const sorted = [...found.values()].sort((a, b) => b.took[0] - a.took[0]).slice(0, 12);
  const body = sorted.map((f) => [chip(f.op, colourOf(f.node)), thousands(f.count), ...f.took.map(duration)]);
  return table(["operator", "count", ...clocks.map((c) => c.title.split(" ")[0])], body, [1, 2, 3]);
}

function timelineTab() {
  const canvas = $("spans");
  canvas.style.height = `${laneTop(clocks.length - 1, 3) + 14}px`;
  spansView.whole(0, Math.max(1, ...clocks.map((c) => c.end)) * 1.002);
  canvas.setAttribute("aria-label", `Timeline: ${clocks.map((c) => `${c.title} ${duration(c.end)}`).join(", ")}`);
  canvas.addEventListener("pointermove", (e) => {
    const span = e.buttons ? null : spanAt(e.offsetX, e.offsetY);
    if (span) showTip(e, ...about(span)); else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("blur", hideTip);
  canvas.addEventListener("dblclick", (e) => {
    const span = spanAt(e.offsetX, e.offsetY);
    if (!span) return;
    chosen = span;
    spansView.range(span.start - (span.end - span.start) * 0.1, span.end + (span.end - span.start) * 0.1);
  });
  $("times").replaceChildren(make("b", {}, duration(predicted.end)), ` predicted on ${data.time.cluster}`,
    ...(measured ? [", ", make("b", {}, duration(measured.end)), ` ${measured.title}`] : []),
    make("span", { class: "muted" }, `; compute waits ${duration(data.time.waited * 1e9)} for communication`));
  $("regions").append(...["all", ...REGIONS].map((r) => make("button", { type: "button", "data-region": r }, r)));
  switches($("regions"), "region");
  watch(["region"], showRegion);
  $("spans-legend").append(...kinds.map((k) => chip(k, `c-${k}`)), chip("products", "s-products"), chip("other compute", "s-compute"), chip("copy", "s-copy"));
  $("by-region").append(regionTable());
  $("by-operator").append(operatorTable());
  if (state.region !== "all") showRegion();
  return () => spansView.draw();
}
