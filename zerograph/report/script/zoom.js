// A canvas over a range of numbers that mouse and keyboard move and zoom.

class Zoom {
  /** `paint(context, width, height)` draws; `from` and `to` are the whole range. */
  constructor(canvas, paint, keys = {}) {
    Object.assign(this, { canvas, paint, keys, from: 0, to: 1, low: 0, high: 1, inset: 0 });
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
    canvas.addEventListener("pointerdown", (e) => this.drag(e));
    canvas.addEventListener("keydown", (e) => this.key(e));
  }

  whole(from, to) {
    Object.assign(this, { from, to, low: from, high: to });
  }

  range(low, high) {
    const span = Math.min(Math.max(high - low, (this.to - this.from) * 1e-6), this.to - this.from);
    this.low = Math.min(Math.max(low, this.from), this.to - span);
    this.high = this.low + span;
    this.draw();
  }

  /** Position on the canvas of a number, and the other way round. */
  x(value) { return this.inset + ((value - this.low) / (this.high - this.low)) * (this.width - this.inset); }
  at(x) { return this.low + ((x - this.inset) / (this.width - this.inset)) * (this.high - this.low); }

  zoom(factor, centre = (this.low + this.high) / 2) {
    this.range(centre - (centre - this.low) * factor, centre + (this.high - centre) * factor);
  }

  move(share) {
    const by = (this.high - this.low) * share;
    this.range(this.low + by, this.high + by);
  }

  wheel(event) {
    event.preventDefault();
    const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (sideways) this.move((event.deltaX || event.deltaY) / this.width);
    else this.zoom(Math.exp(Math.max(-80, Math.min(80, event.deltaY)) / 160), this.at(event.offsetX));
  }

  drag(event) {
    if (event.button) return;
    const { low, high } = this, start = event.clientX, per = (high - low) / (this.width - this.inset);
    const follow = (e) => this.range(low - (e.clientX - start) * per, high - (e.clientX - start) * per);
    const stop = () => {
      this.canvas.removeEventListener("pointermove", follow);
      this.canvas.style.cursor = "";
    };
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.style.cursor = "grabbing";
    this.canvas.addEventListener("pointermove", follow);
    this.canvas.addEventListener("pointerup", stop, { once: true });
    this.canvas.addEventListener("pointercancel", stop, { once: true });
  }

  key(event) {
    const actions = {
      ArrowLeft: () => this.move(-0.15), ArrowRight: () => this.move(0.15),
      "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), "-": () => this.zoom(1 / 0.6),
      0: () => this.range(this.from, this.to), Home: () => this.range(this.from, this.to), ...this.keys,
    };
    const action = event.ctrlKey || event.metaKey || event.altKey ? null : actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  draw() {
    const { canvas } = this, ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    Object.assign(this, { width, height });
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.paint(context, width, height);
  }
}

/** Round numbers between `low` and `high`, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high; t += step) found.push(t);
  return found;
}

/** Draw `text` if it fits into `room` pixels. */
function label(context, text, x, y, room) {
  if (context.measureText(text).width <= room) context.fillText(text, x, y);
}

function showTip(event, ...content) {
  const tip = $("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18}px`;
}

const hideTip = () => { $("tip").hidden = true; };

/** A list of names and values for a tooltip. */
function terms(pairs) {
  const shown = pairs.filter(([, value]) => value);
  return make("dl", {}, ...shown.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
}

/** Space and colour for `tip`, in page coordinates of a point on a canvas. */
function pointOn(canvas, x, y) {
  const box = canvas.getBoundingClientRect();
  return { clientX: box.left + x, clientY: box.top + y };
}
