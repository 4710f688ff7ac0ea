// Differences of two lists of line indices: anchors are lines that occur once in both, in the same order;
// what lies between them is compared again, and what has no anchor by longest common subsequence.

const SMALL = 250000; // cells of a table of common subsequences

/** [same, a0, a1, b0, b1] in order; `same` is whether a[a0..a1] equals b[b0..b1]. */
function diff(a, b) {
  const parts = [];
  const emit = (same, a0, a1, b0, b1) => {
    const last = parts.at(-1);
    if (a0 === a1 && b0 === b1) return;
    if (last && last[0] === same) [last[2], last[4]] = [a1, b1];
    else parts.push([same, a0, a1, b0, b1]);
  };
  const walk = (a0, a1, b0, b1) => {
    let head = 0, tail = 0;
    while (a0 + head < a1 && b0 + head < b1 && a[a0 + head] === b[b0 + head]) head++;
    emit(true, a0, a0 + head, b0, b0 + head);
    a0 += head; b0 += head;
    while (a0 < a1 - tail && b0 < b1 - tail && a[a1 - 1 - tail] === b[b1 - 1 - tail]) tail++;
    between(a0, a1 - tail, b0, b1 - tail);
    emit(true, a1 - tail, a1, b1 - tail, b1);
  };
  const between = (a0, a1, b0, b1) => {
    const anchors = a0 < a1 && b0 < b1 ? common(a, a0, a1, b, b0, b1) : [];
    if (!anchors.length) return emit(false, a0, a1, b0, b1);
    for (const [i, j] of anchors) {
      walk(a0, i, b0, j);
      emit(true, i, i + 1, j, j + 1);
      [a0, b0] = [i + 1, j + 1];
    }
    walk(a0, a1, b0, b1);
  };
  walk(0, a.length, 0, b.length);
  return parts;
}

function common(a, a0, a1, b, b0, b1) {
  const seen = new Map();
  for (let i = a0; i < a1; i++) count(seen, a[i])[0].push(i);
  for (let j = b0; j < b1; j++) if (seen.has(b[j])) count(seen, b[j])[1].push(j);
  const once = [...seen.values()].filter(([left, right]) => left.length === 1 && right.length === 1);
  if (once.length) return rising(once.map(([[i], [j]]) => [i, j]));
  return (a1 - a0) * (b1 - b0) <= SMALL ? subsequence(a, a0, a1, b, b0, b1) : [];
}

function count(seen, key) {
  if (!seen.has(key)) seen.set(key, [[], []]);
  return seen.get(key);
}

/** The longest run of pairs, which rise in the first, that rise in the second as well. */
function rising(pairs) {
  const ends = [], before = [];
  pairs.forEach(([, j], k) => {
    let low = 0, high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (pairs[ends[middle]][1] < j) low = middle + 1; else high = middle;
    }
    before[k] = low ? ends[low - 1] : -1;
    ends[low] = k;
  });
  const found = [];
  for (let k = ends.at(-1); k >= 0; k = before[k]) found.push(pairs[k]);
  return found.reverse();
}

function subsequence(a, a0, a1, b, b0, b1) {
  const width = b1 - b0 + 1;
  const best = new Uint16Array((a1 - a0 + 1) * width);
  for (let i = a1 - a0 - 1; i >= 0; i--) {
    for (let j = b1 - b0 - 1; j >= 0; j--) {
      best[i * width + j] = a[a0 + i] === b[b0 + j]
        ? best[(i + 1) * width + j + 1] + 1
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  const found = [];
  for (let i = 0, j = 0; i < a1 - a0 && j < b1 - b0;) {
    if (a[a0 + i] === b[b0 + j]) found.push([a0 + i++, b0 + j++]);
    else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
    else j++;
  }
  return found;
}

/** [start, length] of the part of `text` that differs from `other`; null if little is alike. */
function changed(text, other) {
  const most = Math.min(text.length, other.length);
  let head = 0, tail = 0;
  while (head < most && text[head] === other[head]) head++;
  while (tail < most - head && text.at(-1 - tail) === other.at(-1 - tail)) tail++;
  return head + tail > 0.4 * Math.max(text.length, other.length) ? [head, text.length - head - tail] : null;
}
