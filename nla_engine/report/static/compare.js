// The rows of a comparison: the texts of all sides next to each other, in the order that the reader chooses.

const { names, rows: R, texts, values } = D;
const COUNT = R.token.length, AT_ONCE = 40;
const form = $("filter");

// Words in lower case without the marks around them, which tell two texts apart.
const bare = (word) => word.toLowerCase().replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "");
const wordsOf = (side, row) => new Set(texts[side][row].flatMap((text) => text.split(/\s+/)).map(bare));

// A text with the words marked that no other side has.
const markedText = (text, others) =>
  visible(text).replace(/\u21b5\n/g, "\n").split(/(\s+)/).map((part) => {
    const word = bare(part);
    return word && !others.some((words) => words.has(word)) ? make("mark", {}, part) : part;
  });

const sideElement = (side, row, words) => {
  const value = values ? values[side][row] ?? NaN : NaN;
  const step = D.coloured && Number.isFinite(value) ? `s${stepOf(value)}` : "";
  const others = words.filter((_, other) => other !== side);
  return make("section", { class: `side ${step}` },
    make("h3", {}, names[side], values ? make("b", {}, `${D.measure} ${number(value, 2)}`) : ""),
    texts[side][row].map((text) => make("p", {}, text ? markedText(text, others) : "no text")));
};

const entry = (row) => {
  const words = names.map((_, side) => wordsOf(side, row));
  const next = R.next[row] === null ? "" : `, next ${quoted(R.next[row])}`;
  const around = R.before
    ? make("p", { class: "around" }, visible(R.before[row]), make("mark", {}, visible(R.token[row])), visible(R.behind[row]))
    : make("p", { class: "around" }, make("mark", {}, signs(R.token[row])));
  const apart = D.measure ? `${D.measure} apart by ${number(R.apart[row], 2)}; ` : "";
  return make("article", { class: "entry" },
    make("header", {}, make("span", {}, `sequence ${count(R.sequence[row])}, position ${count(R.position[row])}: read ${quoted(R.token[row])}${next}`),
      make("span", {}, `${apart}${Math.round(100 * R.differ[row])}% of the words differ`)),
    around, make("div", { class: "beside" }, names.map((_, side) => sideElement(side, row, words))));
};

const ORDERS = [
  ...(values ? [["scores differ most", (row) => -R.apart[row]]] : []),
  ["words differ most", (row) => -R.differ[row]],
  ["as in the store", (row) => R.sequence[row] * 1e7 + R.position[row]],
  ...(values ? names.map((name, side) => [`${name} ahead`, (row) => -D.better * lead(side, row)]) : []),
];

// How far a side's value lies above the best of the others, in the sense of the measure.
const lead = (side, row) => {
  const others = values.filter((_, other) => other !== side).map((each) => (each[row] ?? NaN) * D.better);
  const ahead = (values[side][row] ?? NaN) * D.better - Math.max(...others);
  return Number.isFinite(ahead) ? ahead * D.better : -Infinity * D.better;
};

let shown = [], until = 0;
const more = () => {
  $("entries").append(...shown.slice(until, until + AT_ONCE).map(entry));
  until = Math.min(until + AT_ONCE, shown.length);
  $("further").hidden = until === shown.length;
};

const refresh = () => {
  const wanted = form.q.value.toLowerCase().trim();
  const fits = (row) => !wanted || texts.some((side) => side[row].some((text) => text.toLowerCase().includes(wanted)));
  const key = ORDERS[Number(form.order.value)][1];
  const keys = Array.from({ length: COUNT }, (_, row) => key(row));
  shown = keys.map((_, row) => row).filter(fits).sort((a, b) => keys[a] - keys[b] || a - b);
  until = 0;
  $("entries").replaceChildren();
  $("found").textContent = wanted ? `${count(shown.length)} of ${counted(COUNT, "row")}` : counted(COUNT, "row");
  more();
};

const open = (name) => {
  for (const each of ["texts", "measures"]) {
    $(`tab-${each}`).setAttribute("aria-selected", each === name);
    $(`area-${each}`).hidden = each !== name;
  }
};

form.order.append(...ORDERS.map(([name], at) => make("option", { value: at }, name)));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", refresh);
$("further").addEventListener("click", more);
for (const name of ["texts", "measures"]) $(`tab-${name}`).addEventListener("click", () => { open(name); history.replaceState(null, "", `#tab=${name}`); });
document.body.classList.remove("unpacking");
refresh();
open(location.hash === "#tab=measures" ? "measures" : "texts");
