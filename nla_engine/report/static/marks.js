// What charts are made of: scales, ticks, quantiles, histograms and SVG elements.

const svg = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

const scale = ([a, b], [c, d]) => (value) => c + ((value - a) / (b - a || 1)) * (d - c);

// Round numbers that divide [lo, hi] into about `parts`; integers only if `whole`.
const ticks = (lo, hi, parts, whole = false) => {
  const rough = (hi - lo) / parts || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const nice = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= rough) ?? 10);
  const step = whole ? Math.ceil(nice) : nice;
  const out = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-6; i++) out.push(+(i * step).toPrecision(12));
  return out;
};

// The same, and one more at each end where the values go beyond them: nothing is drawn past the last tick.
const ticksAround = (lo, hi, parts) => {
  const out = ticks(lo, hi, parts), step = out.length > 1 ? out[1] - out[0] : 1;
  if (out[0] > lo + 1e-9) out.unshift(+(out[0] - step).toPrecision(12));
  if (out.at(-1) < hi - 1e-9) out.push(+(out.at(-1) + step).toPrecision(12));
  return out;
};
const between = (list) => [list[0], list.at(-1)];

// 1, 2 and 5 times every power of ten within [lo, hi]; only the powers if there are many.
const decades = (lo, hi) => {
  const parts = hi / lo > 1e4 ? [1] : [1, 2, 5], out = [];
  for (let power = Math.floor(Math.log10(lo)); power <= Math.log10(hi); power++)
    out.push(...parts.map((part) => part * 10 ** power).filter((tick) => tick >= lo && tick <= hi));
  return out;
};

// Of an ascending array, with linear interpolation.
const quantile = (sorted, q) => {
  if (!sorted.length) return NaN;
  const at = q * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
};

// Deciles and quartiles of the finite values.
const spread = (values) => {
  const sorted = Float64Array.from(values.filter(Number.isFinite)).sort();
  const [least, low, mid, high, most] = [0.1, 0.25, 0.5, 0.75, 0.9].map((q) => quantile(sorted, q));
  return { n: sorted.length, least, low, mid, high, most };
};

// The FVE axis of a figure: ticks from below the lowest value (at least -3) up to 1.
const fveTicks = (lo, width) => {
  const step = [0.25, 0.5, 1].find((each) => ((1 - Math.max(lo, -3)) / each + 1) * 44 <= width) ?? 1, out = [];
  for (let tick = 1; tick > Math.max(lo, -3) - step + 1e-9; tick -= step) out.unshift(tick);
  return out;
};

// The domain of FVE: from a multiple of 0.25 below nearly all values (at least -3) up to 1.
const fveDomain = (...lists) => {
  let lo = 0;
  for (const values of lists) {
    const sorted = Float64Array.from(values.filter(Number.isFinite)).sort();
    if (sorted.length) lo = Math.min(lo, quantile(sorted, 0.005));
  }
  return [Math.max(-3, Math.floor(lo * 4) / 4), 1];
};

// `parts` bars over the domain: { lo, hi, n, share }. Values beyond an end count in its bar.
const histogram = (values, [lo, hi], parts) => {
  const width = (hi - lo) / parts;
  const bars = Array.from({ length: parts }, (_, i) => ({ lo: lo + i * width, hi: lo + (i + 1) * width, n: 0, share: 0 }));
  let all = 0;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    all += 1;
    bars[Math.min(parts - 1, Math.max(0, Math.floor((value - lo) / width)))].n += 1;
  }
  for (const bar of bars) bar.share = all ? bar.n / all : 0;
  return bars;
};

const MARGIN = { top: 28, right: 12, bottom: 38, left: 46 };

// An empty plot with axes. x, y: { domain, label, ticks?, format?, log? }. Returns { drawing, x, y, width, height }.
const frame = (label, width, height, x, y) => {
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  const m = { ...MARGIN, ...y.margin };
  const transform = (axis) => (axis.log ? Math.log10 : (value) => value);
  const place = (axis, range) => {
    const f = transform(axis), s = scale(axis.domain.map(f), range);
    return (value) => s(f(value));
  };
  const px = place(x, [m.left, width - m.right]), py = place(y, [height - m.bottom, m.top]);
  const write = (text, attributes) => {
    const element = svg("text", attributes);
    element.textContent = text;
    drawing.append(element);
  };
  for (const tick of y.ticks ?? ticks(...y.domain, 5)) {
    drawing.append(svg("path", { class: tick === 0 ? "grid zero" : "grid", d: `M${m.left} ${py(tick)}H${width - m.right}` }));
    write((y.format ?? axisNumber)(tick), { x: m.left - 8, y: py(tick) + 4, "text-anchor": "end" });
  }
  for (const tick of x.ticks ?? ticks(...x.domain, Math.max(3, Math.floor(width / 90)))) {
    if (x.rules !== false) drawing.append(svg("path", { class: "tick", d: `M${px(tick)} ${height - m.bottom}v5` }));
    write((x.format ?? axisNumber)(tick), { x: px(tick), y: height - m.bottom + 18, "text-anchor": "middle" });
  }
  if (y.label) write(y.label, { x: y.margin?.left ? 0 : 4, y: 12, class: "axis" });
  write(x.label, { x: width - m.right, y: height - 4, "text-anchor": "end", class: "axis" });
  return { drawing, x: px, y: py, width, height, margin: m, bottom: height - m.bottom };
};

const axisNumber = (value) => String(+value.toPrecision(6)).replace("-", "\u2212");
const percent = (share) => `${+(100 * share).toFixed(share && share < 0.1 ? 1 : 0)}%`;

const titled = (element, text) => {
  const title = svg("title");
  title.textContent = text;
  element.append(title);
  return element;
};
