// Data, formats, elements: what every other part uses.

const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, lines, strings } = data;
const REGIONS = ["forward", "backward", "step"];
const texts = new Map();

/** The line indices of a pass's text, decoded once. */
function textOf(pass, form) {
  const key = `${pass}/${form}`;
  if (!texts.has(key)) {
    const runs = data.passes[pass][form];
    const found = [];
    for (let i = 0; i < runs.length; i += 2) {
      for (let j = 0; j < runs[i + 1]; j++) found.push(runs[i] + j);
    }
    texts.set(key, found);
  }
  return texts.get(key);
}

/** Bytes alive while each node runs: one column a category. */
const alive = data.alive.map((column) => {
  const found = new Float64Array(column.length);
  let sum = 0;
  column.forEach((difference, i) => (found[i] = sum += difference));
  return found;
});

const name = (column, i) => strings[column[i]];

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return unit ? `${count.toFixed(1)} ${units[unit]}` : `${Math.round(count)} B`;
}

function duration(nanoseconds) {
  for (const [unit, label] of [[1e9, "s"], [1e6, "ms"], [1e3, "µs"]]) {
    if (nanoseconds >= unit) return `${Number((nanoseconds / unit).toPrecision(3))} ${label}`;
  }
  return nanoseconds ? `${Math.round(nanoseconds)} ns` : "0";
}

function amount(number) {
  for (const [unit, label] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "K"]]) {
    if (number >= unit) return `${(number / unit).toFixed(1)} ${label}`;
  }
  return String(number);
}

const thousands = (number) => number.toLocaleString("en");
const $ = (id) => document.getElementById(id);

/** An element: attributes by name, `on...` handlers, then children (elements or texts). */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function chip(label, colour) {
  return make("span", { class: "chip" }, make("i", { style: `background:var(--${colour})`, "aria-hidden": "true" }), label);
}

/** A table; `number` columns are set right. A cell is a text or an element. */
function table(head, rows, numbers) {
  const cell = (tag, value, i) => make(tag, { class: numbers.includes(i) ? "number" : null }, value);
  return make(
    "table", {},
    make("thead", {}, make("tr", {}, ...head.map((h, i) => cell("th", h, i)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((c, i) => cell("td", c, i))))),
  );
}

const colours = new Map();

/** The value of a CSS variable in the theme that is shown. */
function colour(variable) {
  if (!colours.has(variable)) {
    const style = getComputedStyle(document.documentElement);
    colours.set(variable, style.getPropertyValue(`--${variable}`).trim() || style.getPropertyValue("--muted").trim());
  }
  return colours.get(variable);
}

/** The CSS variable of a node's colour. */
function colourOf(node) {
  const kind = name(nodes.kind, node);
  if (kind) return `c-${kind}`;
  if (name(nodes.stream, node) === "copy") return "s-copy";
  return nodes.flops[node] ? "s-products" : "s-compute";
}

const kinds = [...new Set(nodes.kind)].map((k) => strings[k]).filter(Boolean);
