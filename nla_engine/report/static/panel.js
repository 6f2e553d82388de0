// The side panel: everything about the chosen token; before a choice, where to begin.

const STATUS = {
  ok: "",
  unclosed: ASKED ? "The oracle reached its limit of tokens before it ended its answer." : "The AV reached its limit of tokens before the text was finished.",
  given: "",
  untagged: "No opening tag: all that the AV wrote is shown.",
  zero_vector: ASKED ? "A vector is zero: nothing was asked." : "The vector is zero: there is nothing to explain.",
  nonfinite_vector: ASKED ? "A vector holds NaN or Inf: nothing was asked." : "The vector holds NaN or Inf: there is nothing to explain.",
};

const medianOf = (values) => quantile(Float64Array.from(values.filter(Number.isFinite)).sort(), 0.5);
const NORM_MEDIAN = medianOf(R.norm);

// [name, own value, control]
const scores = (e) => [
  ["FVE", number(E.fve[e]), number(E.fveShuffled[e])],
  ["cos", number(E.cos[e]), number(E.cos_shuffled[e])],
  [`rank among ${count(D.control_vectors)}`, Number.isFinite(E.rank[e]) ? count(E.rank[e]) : "\u2013", `${count(Math.round((D.control_vectors + 1) / 2))} by chance`],
];

const scoreTable = (e) => make("table", { class: "scores" },
  make("thead", {}, make("tr", {}, make("td"), make("th", { scope: "col" }, "own row"), make("th", { scope: "col" }, "another row"))),
  make("tbody", {}, scores(e).map(([name, own, other]) =>
    make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "own" }, own), make("td", {}, other)))));

const questionElement = (e) => make("section", { class: "sample" },
  make("h3", {}, E.question[e]),
  make("p", { class: "kind" }, [E.about[e], D.samples > 1 && `sample ${E.sample[e] + 1} of ${D.samples}`].filter(Boolean).join(" \u00b7 ")),
  E.text[e] ? make("p", { class: "explanation" }, E.text[e]) : "",
  STATUS[E.status[e]] !== "" && make("p", { class: "status" }, make("b", {}, E.status[e]), " ", STATUS[E.status[e]] ?? ""));

const sampleElement = (e, index, of) => make("section", { class: "sample" },
  of > 1 && make("h3", {}, `Sample ${index + 1} of ${of}`, BEST.has(e) ? make("em", {}, " best cos") : ""),
  E.text[e] ? make("p", { class: "explanation" }, E.text[e]) : "",
  STATUS[E.status[e]] !== "" && make("p", { class: "status" }, make("b", {}, E.status[e]), " ", STATUS[E.status[e]] ?? ""),
  SCORED && scoreTable(e));

const describe = (row) => {
  const flags = R.flags[row];
  const words = [(flags & GENERATED) ? "generated" : "prompt", D.classes[R.class[row]]];
  if (R.position[row] < D.early.below) words.push(D.early.known ? `before position ${D.early.below}, where this pair was not trained` : `among the first ${D.early.below} tokens`);
  if (flags & SINK) words.push("attention sink");
  if (flags & NONFINITE) words.push("NaN or Inf");
  return words.join(" \u00b7 ");
};

const pairs = (entries) => make("dl", { class: "pairs" },
  entries.map(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));

const showRow = (row, move, inText) => {
  const s = sequenceOf[row], next = nextText(row), list = explanationsOf(row);
  const step = (by, label, sign) => {
    const button = make("button", { type: "button", "aria-label": label, title: label }, sign);
    button.addEventListener("click", () => move(by));
    return button;
  };
  const record = Object.entries(S.fields).map(([name, values]) => [name, values[s]]).filter(([, value]) => value !== null);
  const relative = R.norm[row] / NORM_MEDIAN;
  const there = inText && make("button", { type: "button", class: "there" }, "Show in its text");
  if (there) there.addEventListener("click", inText);
  $("panel").replaceChildren(
    make("div", { class: "steps" }, step(-1, "Previous token (left arrow)", "\u2190"), step(1, "Next token (right arrow)", "\u2192"),
      make("a", { href: `#row=${R.row[row]}`, title: "Link to this row" }, `row ${R.row[row]}`),
      step(0, "Close (Escape)", "\u00d7")),
    make("h2", { class: "read" }, make("small", {}, "read "), make("span", { class: `mark ${stepClass(rowFve[row])}` }, signs(tokenText(row))),
      make("small", {}, next === null ? ", the last token" : [", next ", make("span", { class: "mono" }, signs(next))])),
    make("p", { class: "kind" }, describe(row)),
    there || "",
    ...list.map((e, index) => (ASKED ? questionElement(e) : sampleElement(e, index, list.length))),
    strip(row),
    pairs([
      ["norm", Number.isFinite(R.norm[row]) ? `${R.norm[row]}, ${number(relative, 2)} of the median` : "not finite"],
      ["position", `${count(R.position[row])} in sequence ${count(S.number[s])}`],
      list.every((e) => E.tokens[e] !== null) && [ASKED ? "oracle wrote" : "AV wrote", list.map((e) => counted(E.tokens[e], "token")).join(", ")],
    ].filter(Boolean)),
    record.length ? make("details", { class: "record", open: true }, make("summary", {}, "Prompt record"), pairs(record)) : "");
  $("panel").classList.add("open");
  $("panel").scrollTop = 0;
};

// Where this row's FVE lies among all rows.
const strip = (row) => {
  const fve = rowFve[row];
  if (!Number.isFinite(fve)) return "";
  const width = 340, height = 46;
  const domain = fveDomain(rowFve, rowFve);
  const x = scale(domain, [0, width]);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "strip", role: "img", "aria-label": "FVE of this row among all rows" });
  const bars = histogram(rowFve, domain, 68), most = Math.max(...bars.map((bar) => bar.share));
  for (const bar of bars) {
    if (!bar.share) continue;
    const tall = Math.max(1, (bar.share / most) * 26);
    drawing.append(svg("rect", { x: x(bar.lo) + 0.5, y: 32 - tall, width: x(bar.hi) - x(bar.lo) - 1, height: tall, class: stepClass(bar.lo + 1e-9) }));
  }
  const at = x(Math.max(fve, domain[0]));
  drawing.append(svg("path", { d: `M0 32.5H${width}`, class: "grid" }), svg("path", { d: `M${at} 2V34`, class: "here" }));
  let below = 0, all = 0;
  for (const other of rowFve) if (Number.isFinite(other)) { all += 1; if (other < fve) below += 1; }
  const end = at > width * 0.6;
  const text = svg("text", { x: end ? Math.min(at + 4, width) : Math.max(at - 4, 0), y: 45, "text-anchor": end ? "end" : "start" });
  text.textContent = `above ${Math.round((100 * below) / all)}% of rows`;
  drawing.append(text);
  return drawing;
};

// Before a choice: the rows with the lowest, middle and highest FVE, and the keys.
const showStart = (choose) => {
  const scored = [...rowFve.keys()].filter((row) => Number.isFinite(rowFve[row])).sort((a, b) => rowFve[a] - rowFve[b]);
  const cards = scored.length < 3 ? [] : [
    ["Lowest FVE", scored[0]], ["Median", scored[scored.length >> 1]], ["Highest", scored.at(-1)],
  ].map(([name, row]) => {
    const button = make("button", { type: "button", class: "card" },
      make("b", {}, name, make("i", {}, number(rowFve[row], 2))),
      make("span", { class: "words" }, `${quoted(tokenText(row))} ${E.text[R.first[row]]}`));
    button.addEventListener("click", () => choose(row));
    return button;
  });
  $("panel").replaceChildren(
    make("h2", { class: "begin" }, "Choose a token"),
    make("p", { class: "hint" }, SCORED ? "A token\u2019s colour says how much of its activation could be rebuilt from the explanation alone. On an orange one even a fluent text is no evidence."
      : ASKED ? "Each marked token is the first of a prompt, and has the oracle\u2019s answers. Nothing was scored, and even a fluent answer is no evidence."
      : "Each marked token has an explanation. Nothing was scored: no AR has read the explanations, and even a fluent one is no evidence."),
    make("div", { class: "cards" }, cards),
    make("p", { class: "keys" }, make("kbd", {}, "\u2190"), make("kbd", {}, "\u2192"), " tokens ", make("kbd", {}, "\u2191"), make("kbd", {}, "\u2193"), " sequences ", make("kbd", {}, "/"), " search ", make("kbd", {}, "Esc"), " close"));
  $("panel").classList.remove("open");
};
