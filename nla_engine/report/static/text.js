// The sequences as text, one element a token. The browser lays out only what is near the window (content-visibility).

const LINE_CHARACTERS = 72, LINE_PIXELS = 28;
const LONG_GAP = 700, GAP_END = 220;

const spans = new Array(ROWS);
const articles = new Array(SEQUENCES);

const tokenElement = (row) => {
  const span = document.createElement("span");
  span.className = `t ${stepClass(rowFve[row])}`;
  span.dataset.i = row;
  span.textContent = visible(tokenText(row));
  spans[row] = span;
  return span;
};

// Text that no row was explained of. A long one shows its ends; the middle comes on a click.
const gapElement = ([, text, tokens, generated]) => {
  const element = make("span", { class: "gap", title: `${counted(tokens, "token")}, not explained` });
  if (text.length <= LONG_GAP) {
    element.append(text);
  } else {
    const middle = make("button", { type: "button", class: "unfold" }, `\u2026 ${count(text.length - 2 * GAP_END)} characters \u2026`);
    middle.addEventListener("click", () => element.replaceChildren(text));
    element.append(text.slice(0, GAP_END), middle, text.slice(-GAP_END));
  }
  element.dataset.generated = generated;
  return element;
};

const heading = (s) => {
  const fields = Object.entries(S.fields).map(([name, values]) => [name, values[s]]).filter(([, value]) => value !== null);
  const shown = fields.slice(0, 6).map(([name, value]) => make("span", {}, make("i", {}, name), ` ${String(value).slice(0, 40)}`));
  const rows = S.first[s + 1] - S.first[s];
  const fve = mean(rowFve.subarray(S.first[s], S.first[s + 1]));
  return make("header", {},
    make("h2", {}, count(S.number[s])),
    make("p", { class: "record" }, shown),
    make("p", { class: "mean" }, `FVE ${number(fve, 2)} over ${counted(rows, "row")}`,
      S.finish[s] === FINISH_LENGTH ? "; reply cut off" : ""));
};

const sequenceElement = (s) => {
  const body = make("p", { class: "tokens" });
  let characters = 0, generated = null;
  const put = (element, isGenerated) => {
    if (generated === false && isGenerated) body.append(make("span", { class: "turn", title: "from here on the model wrote" }));
    generated = isGenerated;
    characters += element.textContent.length;
    body.append(element);
  };
  let row = S.first[s];
  const putRows = (stop) => { for (; row < stop; row++) put(tokenElement(row), (R.flags[row] & GENERATED) !== 0); };
  for (const gap of S.gaps[s]) {
    putRows(S.first[s] + gap[0]);
    put(gapElement(gap), gap[3] === 1);
  }
  putRows(S.first[s + 1]);
  const article = make("article", {}, heading(s), body);
  const lines = Math.ceil(characters / LINE_CHARACTERS) + body.textContent.split("\n").length - 1;
  article.style.containIntrinsicSize = `auto ${64 + lines * LINE_PIXELS}px`;
  articles[s] = article;
  return article;
};

const showSequences = (view) => {
  $("sequences").replaceChildren(...view.order.map((s) => articles[s]));
  $("sequences").classList.toggle("filtered", view.active);
  for (let row = 0; row < ROWS; row++) spans[row].classList.toggle("hit", view.active && view.match[row] === 1);
  $("none").hidden = view.rows > 0;
};

// The legend: how many of the shown rows have each colour. It filters, too.
const showScale = (view, form, choose) => {
  const counts = new Array(STEPS.length).fill(0);
  let without = 0;
  for (let row = 0; row < ROWS; row++) {
    if (!view.match[row]) continue;
    const step = stepOf(rowFve[row]);
    if (step < 0) without += 1; else counts[step] += 1;
  }
  const most = Math.max(1, ...counts);
  const buttons = counts.map((amount, step) => {
    const lo = step ? String(STEPS[step]) : "", hi = String(STEPS[step + 1] ?? "");
    const pressed = form.lo.value === lo && form.hi.value === hi;
    const bar = make("span", { class: `bar s${step}` });
    bar.style.height = `${amount ? 3 + (21 * amount) / most : 0}px`;
    const button = make("button",
      { type: "button", "aria-pressed": String(pressed), "data-step": step, title: `FVE ${stepName(step)}: ${counted(amount, "row")}` },
      make("span", { class: "well" }, bar), make("span", { class: `swatch s${step}` }, step ? String(STEPS[step]) : "< 0"));
    button.addEventListener("click", () => choose(pressed ? "" : lo, pressed ? "" : hi));
    return button;
  });
  const grey = make("p", { class: "grey" }, make("span", {}, "grey"), " not explained");
  if (without) grey.append(`, or without a score (${count(without)}, dotted)`);
  $("scale").replaceChildren(make("p", { class: "name" }, "FVE"), make("div", { class: "steps" }, buttons), grey);
};
