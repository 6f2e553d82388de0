// The distributions, each beside its control. Drawn from the rows that the filter leaves.

// Below so many cases a distribution is a few accidents: the figure says so instead of drawing them.
const FEWEST = 10, FEWEST_OF_GROUP = 5;

const fewCases = (cases, what) => (cases < FEWEST ? `Too few cases for this figure: ${counted(cases, what)}, and it takes ${FEWEST}.` : "");

// few: why nothing can be drawn; "" if it can.
const plate = (title, says, few, draw) => {
  const holder = make("div", { class: "plot" });
  const figure = make("figure", { class: "chart" }, make("h2", {}, title), make("p", {}, says), holder);
  return { figure, draw: () => holder.replaceChildren(few ? make("p", { class: "few" }, few) : draw(Math.max(280, holder.clientWidth))) };
};

const KEY = () => make("p", { class: "key" },
  make("span", {}, make("i", { class: "k own" }), "against the own row"),
  make("span", {}, make("i", { class: "k control" }), "control: against another row"));

// The explanations of the rows that match.
const chosen = (match) => {
  const out = [];
  for (let row = 0; row < ROWS; row++) if (match[row]) for (let e = R.first[row]; e < R.first[row + 1]; e++) out.push(e);
  return out;
};
const rowOf = new Int32Array(E.text.length);
for (let row = 0; row < ROWS; row++) rowOf.fill(row, R.first[row], R.first[row + 1]);

const drawHistogram = (own, control) => (width) => {
  const domain = fveDomain(own, control), parts = Math.round((domain[1] - domain[0]) / 0.1) * (width > 480 ? 2 : 1);
  const a = histogram(own, domain, parts), b = histogram(control, domain, parts);
  const shares = ticksAround(0, Math.max(0.01, ...a.map((bar) => bar.share), ...b.map((bar) => bar.share)), 4);
  const plot = frame("Histogram of FVE against the own row and against another row", width, 250,
    { domain, label: "FVE", ticks: fveTicks(domain[0], width).filter((tick) => tick >= domain[0]) },
    { domain: between(shares), label: "share of explanations", format: percent, ticks: shares });
  for (const bar of a) {
    if (!bar.n) continue;
    plot.drawing.append(titled(svg("rect", { class: "own fill", x: plot.x(bar.lo) + 0.5, width: Math.max(1, plot.x(bar.hi) - plot.x(bar.lo) - 1),
      y: plot.y(bar.share), height: plot.bottom - plot.y(bar.share) }), `FVE ${number(bar.lo, 2)} to ${number(bar.hi, 2)}: ${count(bar.n)}`));
  }
  let d = `M${plot.x(domain[0])} ${plot.bottom}`;
  for (const bar of b) d += `V${plot.y(bar.share)}H${plot.x(bar.hi)}`;
  plot.drawing.append(svg("path", { class: "control line", d: `${d}V${plot.bottom}` }));
  return plot.drawing;
};

const drawRanks = (list) => (width) => {
  const among = Math.max(2, D.control_vectors), edges = [1, 2, 4, 11, 31, 101, 301].filter((edge) => edge <= among);
  const bars = edges.map((lo, i) => ({ lo, hi: (edges[i + 1] ?? among + 1) - 1, n: 0 }));
  let all = 0;
  for (const e of list) {
    if (!Number.isFinite(E.rank[e])) continue;
    all += 1;
    bars.findLast((bar) => bar.lo <= E.rank[e]).n += 1;
  }
  const chance = (bar) => (bar.hi - bar.lo + 1) / among;
  const shares = ticksAround(0, Math.max(...bars.map((bar) => Math.max(chance(bar), all ? bar.n / all : 0))), 4);
  const plot = frame("Retrieval rank beside chance", width, 250,
    { domain: [0, bars.length], label: `rank among ${count(among)} vectors`, ticks: bars.map((_, i) => i + 0.5), rules: false,
      format: (at) => { const { lo, hi } = bars[at - 0.5]; return lo === hi ? `${lo}` : width < 480 ? `${lo}+` : `${lo}\u2013${hi}`; } },
    { domain: between(shares), label: "share of explanations", format: percent, ticks: shares });
  bars.forEach((bar, i) => {
    const share = all ? bar.n / all : 0, x = plot.x(i + 0.18), w = plot.x(i + 0.82) - x;
    plot.drawing.append(
      titled(svg("rect", { class: "own fill", x, width: w, y: plot.y(share), height: plot.bottom - plot.y(share) }), `rank ${bar.lo} to ${bar.hi}: ${count(bar.n)} (${percent(share)})`),
      titled(svg("path", { class: "control line", d: `M${x - 4} ${plot.y(chance(bar))}h${w + 8}` }), `by chance ${percent(chance(bar))}`));
  });
  return plot.drawing;
};

const drawPositions = (list) => (width) => {
  const highest = list.reduce((most, e) => Math.max(most, R.position[rowOf[e]]), 0);
  const lowest = list.reduce((least, e) => Math.min(least, R.position[rowOf[e]]), highest);
  const size = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((s) => (highest - lowest + 1) / s <= width / 14) ?? 1000;
  const bins = new Map();
  for (const e of list) {
    const bin = Math.floor(R.position[rowOf[e]] / size);
    if (!bins.has(bin)) bins.set(bin, { own: [], control: [] });
    bins.get(bin).own.push(E.fve[e]);
    bins.get(bin).control.push(E.fveShuffled[e]);
  }
  const points = [...bins].sort(([a], [b]) => a - b).map(([bin, { own, control }]) => ({ lo: bin * size, own: spread(own), control: spread(control) })).filter((p) => p.own.n);
  const steps = fveTicks(Math.min(0, ...points.flatMap((p) => [p.own.least, p.control.least]).filter(Number.isFinite)), 400), lo = steps[0];
  const plot = frame("FVE by position: median and quartiles", width, 270,
    { domain: [lowest, highest + size], label: size > 1 ? `position in the sequence, in steps of ${size}` : "position in the sequence", ticks: ticks(lowest, highest + size, Math.floor(width / 90), true) },
    { domain: between(steps), label: "FVE", ticks: steps });
  for (const [kind, name] of [["control", "control"], ["own", "own row"]]) {
    const fits = points.filter((p) => p[kind].n), middle = (p) => plot.x(p.lo + size / 2);
    const edge = (list, q) => list.map((p) => `${middle(p)} ${plot.y(Math.max(p[kind][q], lo))}`).join("L");
    const back = [...fits].reverse();
    for (const [upper, lower] of fits.length > 1 ? [["most", "least"], ["high", "low"]] : [])
      plot.drawing.append(svg("path", { class: `${kind} band`, d: `M${edge(fits, upper)}L${edge(back, lower)}Z` }));
    if (fits.length) plot.drawing.append(svg("path", { class: `${kind} line`, d: `M${edge(fits, "mid")}` }));
    for (const p of fits) plot.drawing.append(titled(svg("circle", { class: `${kind} dot`, cx: middle(p), cy: plot.y(Math.max(p[kind].mid, lo)), r: 3 }),
      `position ${p.lo}${size > 1 ? ` to ${p.lo + size - 1}` : ""}, ${name}: median FVE ${number(p[kind].mid, 2)}, quartiles ${number(p[kind].low, 2)} to ${number(p[kind].high, 2)}, ${count(p[kind].n)}`));
  }
  return plot.drawing;
};

const drawClasses = (list) => (width) => {
  const groups = D.classes.map((name) => ({ name, own: [], control: [] }));
  for (const e of list) {
    const group = groups[R.class[rowOf[e]]];
    group.own.push(E.fve[e]);
    group.control.push(E.fveShuffled[e]);
  }
  const shown = groups.map(({ name, own, control }) => ({ name, own: spread(own), control: spread(control) })).filter((g) => g.own.n);
  const enough = shown.filter((g) => g.own.n >= FEWEST_OF_GROUP);
  const steps = fveTicks(Math.min(0, ...enough.flatMap((g) => [g.own.least, g.control.least]).filter(Number.isFinite)), width - 140), lo = steps[0];
  const plot = frame("FVE by class of token: median and quartiles", width, 66 + 38 * shown.length,
    { domain: between(steps), label: "FVE", ticks: steps }, { domain: [shown.length, 0], label: "class of the token read", ticks: [], margin: { left: 128, top: 24 } });
  shown.forEach((group, i) => {
    const label = svg("text", { x: 118, y: plot.y(i + 0.5) + 1, "text-anchor": "end", class: "name" });
    label.textContent = group.name;
    const amount = svg("text", { x: 118, y: plot.y(i + 0.5) + 13, "text-anchor": "end", class: "small" });
    amount.textContent = count(group.own.n);
    plot.drawing.append(label, amount);
    if (group.own.n < FEWEST_OF_GROUP) {
      const few = svg("text", { x: 140, y: plot.y(i + 0.5) + 4, class: "small" });
      few.textContent = "too few cases";
      plot.drawing.append(few);
      return;
    }
    for (const [kind, y] of [["own", plot.y(i + 0.36)], ["control", plot.y(i + 0.66)]]) {
      const q = group[kind];
      if (!q.n) continue;
      const x = (value) => plot.x(Math.max(value, lo));
      plot.drawing.append(svg("path", { class: `${kind} whisker`, d: `M${x(q.least)} ${y}H${x(q.most)}` }), svg("path", { class: `${kind} range`, d: `M${x(q.low)} ${y}H${x(q.high)}` }),
        titled(svg("circle", { class: `${kind} dot`, cx: x(q.mid), cy: y, r: 4.5 }), `${group.name}, ${kind === "own" ? "own row" : "control"}: median FVE ${number(q.mid, 2)}, quartiles ${number(q.low, 2)} to ${number(q.high, 2)}`));
    }
  });
  return plot.drawing;
};

const drawNorms = (list, choose) => (width) => {
  const sound = list.filter((e) => R.norm[rowOf[e]] > 0 && Number.isFinite(E.cos[e]));
  const norms = sound.map((e) => R.norm[rowOf[e]]);
  const least = norms.reduce((a, b) => Math.min(a, b), Infinity), most = norms.reduce((a, b) => Math.max(a, b), 0);
  const [from, to] = sound.length ? [least * 0.9, most * 1.1] : [1, 10];
  const bottom = sound.reduce((low, e) => Math.min(low, E.cos[e], E.cos_shuffled[e] || 0), 0);
  const steps = to / from < 5 ? ticks(from, to, 5) : decades(from, to), levels = ticksAround(bottom, 1, 5);
  const plot = frame("Norm against cos", width, 340,
    { domain: [from, to], label: "norm of the vector (logarithmic)", log: true, ticks: steps }, { domain: between(levels), label: "cos", ticks: levels });
  // Points on one pixel are drawn only once, since there may be many rows.
  const cloud = (kind, points) => {
    const seen = new Set(points.map(([x, y]) => `M${Math.round(x * 2) / 2} ${Math.round(y * 2) / 2}h0`));
    if (seen.size) plot.drawing.append(svg("path", { class: `${kind} cloud`, d: [...seen].join("") }));
  };
  const isSink = (e) => (R.flags[rowOf[e]] & SINK) !== 0;
  const at = (e) => [plot.x(R.norm[rowOf[e]]), plot.y(E.cos[e])];
  cloud("control", sound.filter((e) => Number.isFinite(E.cos_shuffled[e])).map((e) => [plot.x(R.norm[rowOf[e]]), plot.y(E.cos_shuffled[e])]));
  cloud("own", sound.filter((e) => !isSink(e)).map(at));
  for (const e of sound.filter(isSink).slice(0, 2000)) {
    const [x, y] = at(e);
    plot.drawing.append(svg("path", { class: "sink", d: `M${x} ${y - 5}l5 5l-5 5l-5-5Z` }));
  }
  plot.drawing.classList.add("points");
  plot.drawing.addEventListener("click", (event) => {
    const box = plot.drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) * width) / box.width, y = ((event.clientY - box.top) * 340) / box.height;
    let best = null, distance = 18 ** 2;
    for (const e of sound) {
      const [a, b] = at(e), d = (a - x) ** 2 + (b - y) ** 2;
      if (d < distance) { best = e; distance = d; }
    }
    if (best !== null) choose(rowOf[best]);
  });
  return plot.drawing;
};

const showCharts = (view, choose) => {
  const list = chosen(view.match), own = list.map((e) => E.fve[e]), control = list.map((e) => E.fveShuffled[e]);
  const rank = list.map((e) => E.rank[e]).filter(Number.isFinite), first = rank.filter((r) => r === 1).length;
  const sinks = list.some((e) => R.flags[rowOf[e]] & SINK);
  const few = fewCases(own.filter(Number.isFinite).length, "scored explanation");
  const across = new Set(list.map((e) => R.position[rowOf[e]])).size > 1 ? few : few || "Too few cases for this figure: every row is at the same position.";
  const points = list.filter((e) => R.norm[rowOf[e]] > 0 && Number.isFinite(E.cos[e])).length;
  const plates = [
    plate("How much came through", `Mean FVE ${number(mean(own), 2)}; control ${number(mean(control), 2)}. 1 is the whole vector, 0 is as good as always answering with the mean.`, few, drawHistogram(own, control)),
    plate("Does it find its own vector?", `${rank.length ? `${number((100 * first) / rank.length, 1)}%` : "None"} of reconstructions are nearest to their own vector. The bars across show chance.`, fewCases(rank.length, "ranked explanation"), drawRanks(list)),
    plate("By position", "FVE over the token\u2019s place in its sequence: median, the middle half, and the middle four fifths.", across, drawPositions(list)),
    plate("By class of token", "Median, the middle half (thick) and the middle four fifths (thin).", few, drawClasses(list)),
    plate("Norm against cos", `Each point is an explanation${sinks ? "; diamonds are attention sinks" : ""}. Click a point to read it.`, fewCases(points, "point"), drawNorms(list, choose)),
  ];
  plates[2].figure.classList.add("wide");
  const area = $("area-distributions");
  const subset = view.active ? make("p", { class: "subset" }, `Of the ${counted(view.rows, "row")} that the filter leaves.`) : "";
  area.replaceChildren(KEY(), subset, make("div", { class: "plates" }, list.length ? plates.map((p) => p.figure) : make("p", { class: "none" }, "No row fits. Widen the filter or clear it.")));
  if (list.length) for (const p of plates) p.draw();
};
