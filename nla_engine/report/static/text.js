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
  const text = tokenText(row), blank = /^ +$/.test(text);
  span.className = `t ${stepClass(rowFve[row])}${text[0] === " " && !blank ? " sp" : ""}${D.classes[R.class[row]] === "special" ? " markup" : ""}`;
  span.dataset.i = row;
  span.textContent = blank ? signs(text) : visible(text);
  spans[row] = span;
  return span;
};

// Runs of a chat template's own tokens, with the role and the line ends that belong to them.
const ROLES = "system|developer|user|assistant|model|tool|ipython";
const SPECIAL = "<\\|[^<>|\\s]{1,40}\\|>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|\\[/?INST\\]|<</?SYS>>";
const MARKUP = new RegExp(`(?:(?:${SPECIAL})(?:(?:${ROLES})(?=\\n|<))?\\n*)+`, "g");
const ROLE = new RegExp(`(?:${ROLES})(?=\\n|<)`, "g");

// Text with the chat markup in elements of their own, which can be folded to the name of the role.
const marked = (text) => {
  const out = [];
  let at = 0;
  for (const { 0: run, index } of text.matchAll(MARKUP)) {
    if (index > at) out.push(visible(text.slice(at, index)));
    out.push(make("span", { class: "markup", "data-role": run.match(ROLE)?.at(-1) ?? "" }, make("span", { class: "raw" }, visible(run))));
    at = index + run.length;
  }
  return at < text.length ? [...out, visible(text.slice(at))] : out;
};
const hasMarkup = () => R.class.some((c) => D.classes[c] === "special") || S.gaps.some((gaps) => gaps.some(([, text]) => text.search(MARKUP) >= 0));
const UNTOLD = ASKED ? "not the first of a prompt" : "not explained";

// Text without explained rows. A long one shows its ends, and its middle on a click.
const gapElement = ([, text, tokens, generated]) => {
  const element = make("span", { class: "gap", title: `${counted(tokens, "token")}, ${UNTOLD}` });
  if (text.length <= LONG_GAP) {
    element.append(...marked(text));
  } else {
    const middle = make("button", { type: "button", class: "unfold" }, `\u2026 ${count(text.length - 2 * GAP_END)} characters \u2026`);
    middle.addEventListener("click", () => element.replaceChildren(...marked(text)));
    element.append(...marked(text.slice(0, GAP_END)), middle, ...marked(text.slice(-GAP_END)));
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
  blocks.slice(0, AT_ONCE).forEach(build);
  for (const block of blocks) near.observe(block.element);
  buildInTime(view, AT_ONCE);
};

// The legend: how many rows have each colour. A click leaves those alone; an empty colour cannot be chosen.
const showScale = (view, form, choose) => {
  if (!SCORED) {
    $("scale").removeAttribute("aria-label");
    $("scale").replaceChildren(make("p", { class: "name" }, "Not scored"),
      make("p", {}, make("span", { class: "mark told" }, "marked"), ASKED ? " tokens are the first of a prompt to the oracle" : " tokens have an explanation; no AR has read it"));
    return;
  }
  const buttons = view.counts.map((amount, step) => {
    const lo = step ? String(STEPS[step]) : "", hi = String(STEPS[step + 1] ?? "");
    const pressed = form.lo.value === lo && form.hi.value === hi;
    const range = step ? `${short(STEPS[step])}\u2013${short(STEPS[step + 1] ?? 1)}` : "< 0";
    const button = make("button",
      { type: "button", class: `step ${amount ? `s${step}` : "empty"}`, "aria-pressed": String(pressed), "data-step": step, disabled: !amount && !pressed,
        title: amount ? `FVE ${stepName(step)}: ${counted(amount, "row")}. Click to see ${pressed ? "all" : "only these"}` : `FVE ${stepName(step)}: no row` },
      make("span", { class: "range" }, range), make("span", { class: "amount" }, count(amount)));
    button.addEventListener("click", () => choose(pressed ? "" : lo, pressed ? "" : hi));
    return button;
  });
  $("scale").replaceChildren(make("p", { class: "name" }, "FVE"), make("div", { class: "steps" }, buttons),
    view.unscored ? make("p", { class: "grey" }, make("span", { class: "dotted" }, "dotted"), ` no score (${count(view.unscored)})`) : "");
};

const short = (value) => String(value).replace(/^0\./, ".");
