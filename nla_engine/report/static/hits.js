// What the filter leaves, as a list: the token, a part of its explanation with the match marked, and its FVE.
// The list is built as far as it is read, since there may be many thousand hits.

const HITS_AT_ONCE = 60, BEFORE_MATCH = 60, SNIPPET = 200;

let hits = { view: null, built: 0, elements: new Map() };

// A part of a text around the first match, the match in <mark>; the text's beginning without one.
const snippet = (text, find) => {
  const found = find?.(text) ?? null;
  let from = found ? Math.max(0, found[0] - BEFORE_MATCH) : 0;
  if (from) from = text.indexOf(" ", from) + 1 || from;  // whole words, where there are any
  if (found && from > found[0]) from = found[0];
  const stop = Math.min(text.length, Math.max(from + SNIPPET, found ? Math.min(found[1], from + 2 * SNIPPET) : 0));
  const part = (a, b) => text.slice(a, b).replace(/\s+/g, " ");
  const parts = [from ? "\u2026 " : ""];
  if (found && found[1] > found[0]) parts.push(part(from, found[0]), make("mark", {}, part(found[0], Math.min(found[1], stop))), part(Math.min(found[1], stop), stop));
  else parts.push(part(from, stop));
  return [...parts, stop < text.length ? " \u2026" : ""];
};

const hitElement = (row, view) => {
  const s = sequenceOf[row], next = nextText(row), { text, value } = view.finders, of = explanationsOf(row);
  const fits = (each) => (!text || text(E.text[each])) && (!view.status || E.status[each] === view.status);
  const e = of.find(fits) ?? of.find((each) => text?.(E.text[each])) ?? of[0];
  const field = value && fieldText(view.field, s);
  return make("button", { type: "button", class: "entry", "data-i": row },
    make("span", { class: "about" },
      make("small", {}, "read "), make("span", { class: `mark ${stepClass(rowFve[row])}` }, signs(tokenText(row))),
      next !== null && make("span", { class: "next" }, " next ", make("span", { class: "mono" }, signs(next)))),
    make("span", { class: "words" }, E.text[e] ? snippet(E.text[e], text) : make("i", {}, STATUS[E.status[e]] ?? E.status[e]),
      field && make("span", { class: "field" }, view.field === SEQUENCE_TEXT ? "text: " : `${view.field}: `, snippet(field, value))),
    make("span", { class: "end" }, SCORED && make("b", {}, number(rowFve[row], 2)),
      make("small", {}, `sequence ${count(S.number[s])}, position ${count(R.position[row])}`)));
};

const extendHits = (upTo) => {
  const { view } = hits, stop = Math.min(view.list.length, upTo), fresh = [];
  for (; hits.built < stop; hits.built++) {
    const row = view.list[hits.built], element = hitElement(row, view);
    hits.elements.set(row, element);
    fresh.push(element);
  }
  $("hits").append(...fresh);
  if (fresh.length) ahead.observe(fresh.at(-1));
};

// The end of the list comes near: build more.
const ahead = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    ahead.unobserve(target);
    extendHits(hits.built + HITS_AT_ONCE);
  }
}, { rootMargin: "900px 0px" });

// The element of a row in the list.
const hitOf = (row) => {
  if (!hits.elements.has(row)) extendHits(hits.view.list.indexOf(row) + 1);
  return hits.elements.get(row);
};

const showHits = (view) => {
  ahead.disconnect();
  hits = { view, built: 0, elements: new Map() };
  $("hits").replaceChildren();
  extendHits(HITS_AT_ONCE);
};
