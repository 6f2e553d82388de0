// The page's state (area, filter, row) and what changes it: clicks, keys, the form and the address.

const form = $("filter");
if (!SCORED) {
  $("tab-distributions").remove();
  for (const field of [form.lo.parentElement, form.order.parentElement]) field.hidden = true;
}
const tabs = [...document.querySelectorAll("[role=tab]")].map((tab) => tab.id.slice(4));
const state = { tab: "text", row: -1, view: null, drawn: null };

const wanted = () => Object.fromEntries(FIELDS.map((name) => [name, form.elements[name].value]));

const refilter = () => {
  let view;
  try {
    view = select(wanted());
    $("found").classList.remove("wrong");
  } catch (error) {
    $("found").textContent = `Not a valid pattern: ${error.message}`;
    $("found").classList.add("wrong");
    return;
  }
  state.view = view;
  showSequences(view);
  showScale(view, form, (lo, hi) => { form.lo.value = lo; form.hi.value = hi; refilter(); remember(); });
  const all = counted(ROWS, ASKED ? "row" : "explained row"), shown = counted(view.order.length, "sequence");
  $("found").textContent = view.active ? `${count(view.rows)} of ${all}, in ${shown}` : `${all} in ${shown}`;
  $("clear").hidden = !view.active && !form.order.value;
  state.drawn = null;
  if (state.tab === "distributions") drawCharts();
};

const drawCharts = () => {
  const width = $("area-distributions").clientWidth;
  if (!state.view || state.drawn === width) return;
  state.drawn = width;
  showCharts(state.view, choose);
};

const openTab = (name) => {
  state.tab = tabs.includes(name) ? name : "text";
  for (const tab of tabs) {
    $(`tab-${tab}`).setAttribute("aria-selected", tab === state.tab);
    $(`tab-${tab}`).tabIndex = tab === state.tab ? 0 : -1;
    $(`area-${tab}`).hidden = tab !== state.tab;
  }
  form.hidden = !["text", "distributions"].includes(state.tab);
  if (state.tab === "distributions") drawCharts();
};

// The index of a row among the explained ones; -1 if it is not among them.
const choose = (row, scroll = true) => {
  if (state.row >= 0) {
    spans[state.row].classList.remove("here");
    spans[state.row].removeAttribute("aria-current");
  }
  state.row = row;
  if (row < 0) {
    showStart(choose);
  } else {
    if (!state.view.match[row]) {
      form.reset();
      refilter();
    }
    if (state.tab !== "text") openTab("text");
    spanOf(row).classList.add("here");
    spans[row].setAttribute("aria-current", "true");
    showRow(row, (by) => (by ? step(by) : choose(-1)));
    if (scroll) reveal(spans[row]);
  }
  remember();
};

// Twice: blocks that are laid out during the first scroll move the token.
const reveal = (span) => {
  span.scrollIntoView({ block: "nearest", inline: "nearest" });
  requestAnimationFrame(() => span.scrollIntoView({ block: "nearest", inline: "nearest" }));
};

// The shown rows in reading order.
const reading = () => {
  if (!state.view.reading) {
    state.view.reading = state.view.order.flatMap((s) => {
      const rows = [];
      for (let row = S.first[s]; row < S.first[s + 1]; row++) if (state.view.match[row]) rows.push(row);
      return rows;
    });
    state.view.place = new Map(state.view.reading.map((row, place) => [row, place]));
  }
  return state.view.reading;
};

const step = (by) => {
  const rows = reading();
  if (!rows.length) return;
  // No row is chosen, or the filter hides it: start at one end.
  const place = state.view.place.get(state.row) ?? (by > 0 ? -1 : rows.length);
  choose(rows[Math.min(rows.length - 1, Math.max(0, place + by))]);
};

// To the previous or next sequence, at the same place counted in shown rows.
const stepSequence = (by) => {
  const { order, match } = state.view;
  const rowsOf = (s) => reading().filter((row) => sequenceOf[row] === s && match[row]);
  const at = order.indexOf(sequenceOf[state.row]), to = order[at + by];
  if (to === undefined) return;
  const rows = rowsOf(to), place = rowsOf(order[at]).indexOf(state.row);
  choose(rows[Math.max(0, Math.min(place, rows.length - 1))]);
};

const remember = () => {
  const parts = new URLSearchParams();
  if (state.row >= 0) parts.set("row", R.row[state.row]);
  if (state.tab !== "text") parts.set("tab", state.tab);
  const values = wanted();
  for (const name of FIELDS) if (values[name] && (name !== "field" || values.value)) parts.set(name, values[name]);
  const hash = parts.toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
};

const follow = () => {
  const parts = new URLSearchParams(location.hash.slice(1));
  form.reset();
  for (const name of FIELDS) if (parts.has(name)) form.elements[name].value = parts.get(name);
  fillValues(form.field.value);
  refilter();
  openTab(parts.get("tab") ?? "text");
  const row = parts.has("row") ? rowIndex.get(Number(parts.get("row"))) : -1;
  if (row === undefined) {
    choose(-1);
    showStart(choose, `Row ${parts.get("row")} is not among the explained rows.`);
  } else {
    choose(row);
    if (row >= 0) spans[row].scrollIntoView({ block: "center" });
  }
};

fillFilter(form);
follow();

addEventListener("hashchange", follow);
addEventListener("resize", () => { if (state.tab === "distributions") drawCharts(); });

for (const name of tabs) $(`tab-${name}`).addEventListener("click", () => { openTab(name); remember(); });

let typing;
form.addEventListener("input", (event) => {
  if (event.target === form.field) fillValues(form.field.value);
  clearTimeout(typing);
  typing = setTimeout(() => { refilter(); remember(); }, event.target.tagName === "SELECT" ? 0 : 150);
});
form.addEventListener("submit", (event) => event.preventDefault());
$("clear").addEventListener("click", () => { form.reset(); refilter(); remember(); });
$("more").addEventListener("click", () => {
  const open = form.classList.toggle("expanded");
  $("more").setAttribute("aria-expanded", open);
});

$("sequences").addEventListener("click", (event) => {
  const span = event.target.closest(".t");
  if (span) choose(Number(span.dataset.i), false);
});
$("sequences").addEventListener("pointerover", (event) => {
  const span = event.target.closest(".t");
  if (!span || span.title) return;
  const row = Number(span.dataset.i), next = nextText(row);
  span.title = [SCORED && `FVE ${number(rowFve[row])}`, next !== null && `next ${quoted(next)}`].filter(Boolean).join(", ");
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  if (target.getAttribute?.("role") === "tab") {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const tab = tabs[(tabs.indexOf(state.tab) + by + tabs.length) % tabs.length];
    openTab(tab);
    $(`tab-${tab}`).focus();
    remember();
    return;
  }
  if (event.key === "Escape" && state.row >= 0) {
    choose(-1);
    return;
  }
  if (["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName) || form.hidden) return;
  if (event.key === "/") {
    event.preventDefault();
    form.q.focus();
  }
  if (state.tab !== "text") return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!by && !(down && state.row >= 0)) return;
  event.preventDefault();
  if (by) step(by); else stepSequence(down);
});
