// A long list of lines of which only those in sight are elements.

const ROW = 20;

class List {
  /** `label` names the scrolled region. */
  constructor(label) {
    this.root = make("div", { class: "lines mono", tabindex: "0", role: "region", "aria-label": label });
    this.space = make("div");
    this.window = make("div", { class: "window" });
    this.root.append(this.window, this.space);
    this.root.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  /** Show `count` rows in `panes` columns; `row(i, pane)` makes one. */
  show(count, panes, row) {
    Object.assign(this, { count, row, first: -1 });
    this.panes = Array.from({ length: panes }, () => make("div", { class: "rows" }));
    const around = this.panes.map((rows) => make("div", { class: "pane" }, rows));
    around.forEach((pane) => pane.addEventListener("scroll", () => around.forEach((p) => (p.scrollLeft = pane.scrollLeft))));
    this.window.replaceChildren(...around);
    this.fit();
    this.draw(true);
  }

  fit() {
    this.space.style.height = `${Math.max(0, this.count * ROW + 16 - this.root.clientHeight)}px`;
  }

  draw(fresh) {
    if (!this.panes || !this.root.clientHeight) return;
    this.fit();
    const first = Math.max(0, Math.floor(this.root.scrollTop / ROW) - 5);
    const last = Math.min(this.count, first + Math.ceil(this.root.clientHeight / ROW) + 12);
    if (fresh === true || first !== this.first || last !== this.last) {
      this.panes.forEach((rows, pane) => {
        rows.replaceChildren(...Array.from({ length: last - first }, (_, i) => this.row(first + i, pane)));
      });
      Object.assign(this, { first, last });
    }
    const shift = first * ROW - this.root.scrollTop;
    for (const rows of this.panes) rows.style.transform = `translateY(${shift}px)`;
  }

  /** Bring a row to the upper third. */
  reveal(index) {
    this.root.scrollTop = Math.max(0, index * ROW - this.root.clientHeight / 3);
    this.draw(true);
  }
}

/** A line's text as elements: the operator of a collective in its colour, the note muted. */
function painted(text, word) {
  if (word) {
    const [start, length] = word;
    const inner = make("span", { class: "word" }, text.slice(start, start + length));
    return [text.slice(0, start), inner, text.slice(start + length)];
  }
  const note = text.startsWith("#") ? -1 : text.lastIndexOf("  # ");
  const body = note < 0 ? text : text.slice(0, note);
  const found = /zero\.(\w+)/.exec(body);
  const parts = [];
  if (found && kinds.includes(found[1])) {
    const end = found.index + found[0].length;
    parts.push(body.slice(0, found.index), make("span", { style: `color:var(--c-${found[1]});font-weight:600` }, found[0]), body.slice(end));
  } else if (/^(forward|backward|step)\(|^#/.test(body)) {
    parts.push(make("span", { class: "head" }, body));
  } else {
    parts.push(body);
  }
  if (note >= 0) parts.push(make("span", { class: "note" }, text.slice(note)));
  return parts;
}
