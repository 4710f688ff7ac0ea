// Lines that differ in the numbers of values alone: one node more renumbers all after it.

const keys = [];

/** Equal for lines that are the same but for the numbers of their values. */
function keysOf(indices) {
  if (!keys.length) {
    const known = new Map();
    lines.text.forEach((text, line) => {
      const masked = `${lines.region[line]} ${text.trim().replace(/%\d+/g, "%").replace(/ {2,}/g, " ")}`;
      if (!known.has(masked)) known.set(masked, known.size);
      keys.push(known.get(masked));
    });
  }
  return indices.map((line) => keys[line]);
}

/** The difference of two texts in which a renumbered line is the same, if its operands are. */
function differenceOfTexts(a, b) {
  const renamed = new Map();
  const parts = [];
  const emit = (same, a0, a1, b0, b1) => {
    const last = parts.at(-1);
    if (last && last[0] === same) [last[2], last[4]] = [a1, b1];
    else parts.push([same, a0, a1, b0, b1]);
  };
  for (const [same, a0, a1, b0, b1] of diff(keysOf(a), keysOf(b))) {
    if (!same) emit(false, a0, a1, b0, b1);
    else for (let i = 0; i < a1 - a0; i++) emit(follows(a[a0 + i], b[b0 + i], renamed), a0 + i, a0 + i + 1, b0 + i, b0 + i + 1);
  }
  return parts;
}

/** Whether the operands of two lines are the same values under `renamed`, which their own values join. */
function follows(before, after, renamed) {
  const [left, right] = [before, after].map((line) => lines.text[line].match(/%\d+\b/g) || []);
  const defines = /^ +%\d+:/.test(lines.text[before]);
  const same = left.every((value, i) => (defines && i === 0) || (renamed.get(value) ?? value) === right[i]);
  if (defines) renamed.set(left[0], right[0]);
  return same;
}
