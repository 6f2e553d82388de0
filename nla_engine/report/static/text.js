// The sequences as text, one element per token, in blocks. A block is built when it comes near the window or when there
// is time. The browser lays out only the blocks near the window (content-visibility).

const LINE_CHARACTERS = 72, LINE_PIXELS = 28, HEAD_PIXELS = 64;
const BLOCK = 24, AT_ONCE = 2;
const LONG_GAP = 700, GAP_END = 220;

const spans = new Array(ROWS);
const articles = new Array(SEQUENCES);
const blockOf = new Int32Array(SEQUENCES);
let blocks = [];

const tokenElement = (row) => {
  const span = document.createElement("span");
  span.className = `t ${stepClass(rowFve[row])}`;
  span.dataset.i = row;
  span.textContent = visible(tokenText(row));
  spans[row] = span;
  return span;
};

const UNTOLD = ASKED ? "not the first of a prompt" : "not explained";

// Text without explained rows. A long one shows its ends, and its middle on a click.
const gapElement = ([, text, tokens, generated]) => {
  const element = make("span", { class: "gap", title: `${counted(tokens, "token")}, ${UNTOLD}` });
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
    make("p", { class: "mean" }, SCORED ? `FVE ${number(fve, 2)} over ${counted(rows, "row")}` : counted(rows, "row"),
      S.finish[s] === FINISH_LENGTH ? "; reply cut off" : ""));
};

const sequenceElement = (s) => {
  const body = make("p", { class: "tokens" });
  let generated = null;
  const put = (element, isGenerated) => {
    if (generated === false && isGenerated) body.append(make("span", { class: "turn", title: "from here on the model wrote" }));
    generated = isGenerated;
    body.append(element);
  };
  let row = S.first[s];
  const putRows = (stop) => { for (; row < stop; row++) put(tokenElement(row), (R.flags[row] & GENERATED) !== 0); };
  for (const gap of S.gaps[s]) {
    putRows(S.first[s] + gap[0]);
    put(gapElement(gap), gap[3] === 1);
  }
  putRows(S.first[s + 1]);
  return make("article", {}, heading(s), body);
};

// About how tall a sequence will be: its block takes this much space until it is laid out.
const heightOf = (s) => {
  let lines = 1, characters = 0;
  for (const [, text] of S.gaps[s]) {
    characters += Math.min(text.length, LONG_GAP);
    for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) lines += 1;
  }
  for (let row = S.first[s]; row < S.first[s + 1]; row++) characters += tokenText(row).length;
  return HEAD_PIXELS + LINE_PIXELS * (lines + Math.floor(characters / LINE_CHARACTERS));
};

const build = (block) => {
  if (block.element.firstChild) return;
  for (const s of block.sequences) {
    articles[s] ??= sequenceElement(s);
    for (let row = S.first[s]; row < S.first[s + 1]; row++)
      spans[row].classList.toggle("hit", block.view.active && block.view.match[row] === 1);
    block.element.append(articles[s]);
  }
};

// The element of a row that is shown.
const spanOf = (row) => {
  build(blocks[blockOf[sequenceOf[row]]]);
  return spans[row];
};

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) build(blocks[Number(target.dataset.block)]);
}, { rootMargin: "1200px 0px" });

// Build the rest, so that the browser's own search finds it.
const buildInTime = (view, first) => {
  const when = window.requestIdleCallback ?? ((go) => setTimeout(() => go({ timeRemaining: () => 12 }), 30));
  when((deadline) => {
    let next = first;
    while (next < blocks.length && blocks[0].view === view && deadline.timeRemaining() > 6) build(blocks[next++]);
    if (next < blocks.length && blocks[0].view === view) buildInTime(view, next);
  });
};

const showSequences = (view) => {
  near.disconnect();
  blocks = [];
  for (let at = 0; at < view.order.length; at += BLOCK) {
    const sequences = view.order.slice(at, at + BLOCK), element = make("div", { class: "block", "data-block": blocks.length });
    element.style.containIntrinsicSize = `auto ${sequences.reduce((sum, s) => sum + heightOf(s), 0)}px`;
    for (const s of sequences) blockOf[s] = blocks.length;
    blocks.push({ element, sequences, view });
  }
  $("sequences").replaceChildren(...blocks.map((block) => block.element));
  $("sequences").classList.toggle("filtered", view.active);
  $("none").hidden = view.rows > 0;
  blocks.slice(0, AT_ONCE).forEach(build);
  for (const block of blocks) near.observe(block.element);
  buildInTime(view, AT_ONCE);
};

// The legend: how many shown rows have each colour. A click filters by it.
const showScale = (view, form, choose) => {
  if (!SCORED) {
    $("scale").removeAttribute("aria-label");
    $("scale").replaceChildren(make("p", { class: "name" }, "Not scored"),
      make("p", {}, make("span", { class: "mark told" }, "marked"), ASKED ? " tokens are the first of a prompt to the oracle" : " tokens have an explanation; no AR has read it"));
    return;
  }
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
  const grey = make("p", { class: "grey" }, make("span", {}, "grey"), ` ${UNTOLD}`);
  if (without) grey.append(`, or without a score (${count(without)}, dotted)`);
  $("scale").replaceChildren(make("p", { class: "name" }, "FVE"), make("div", { class: "steps" }, buttons), grey);
};
