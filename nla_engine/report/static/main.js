// The page's state (area, filter, row) and what changes it: clicks, keys, the form and the address.

const form = $("filter");
if (!SCORED) {
  $("tab-distributions").remove();
  for (const field of [form.lo.parentElement, form.order.parentElement]) field.hidden = true;
}
const tabs = [...document.querySelectorAll("[role=tab]")].map((tab) => tab.id.slice(4));
const state = { tab: "text", row: -1, element: null, view: null, drawn: null, inText: false };

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
  notify("");
  show();
  showScale(view, form, (lo, hi) => { form.lo.value = lo; form.hi.value = hi; refilter(); remember(); });
  const all = counted(ROWS, ASKED ? "row" : "explained row"), shown = counted(view.order.length, "sequence");
  $("found").textContent = view.active ? `${count(view.rows)} of ${all}, in ${shown}` : `${all} in ${shown}`;
  $("clear").hidden = !view.active && !form.order.value;
  state.drawn = null;
  if (state.tab === "distributions") drawCharts();
};

// Hits are a list, unless the reader wants them in their text.
const listing = () => state.view.active && !state.inText;

const show = () => {
  const { view } = state, list = listing();
  $("hits").hidden = !list || !view.rows;
  $("sequences").hidden = list;
  $("none").hidden = view.rows > 0;
  $("views").hidden = !view.active;
  $("as-list").setAttribute("aria-pressed", list);
  $("as-text").setAttribute("aria-pressed", !list);
  $("fold").hidden = list || !state.markup;
  if (list) showHits(view); else showSequences(view);
  point();
};

const elementOf = (row) => (listing() ? hitOf(row) : spanOf(row));

// Mark the chosen row where it is shown now.
const point = () => {
  state.element?.classList.remove("here");
  state.element?.removeAttribute("aria-current");
  state.element = state.row >= 0 && state.view.match[state.row] ? elementOf(state.row) : null;
  state.element?.classList.add("here");
  state.element?.setAttribute("aria-current", "true");
};

const showAs = (inText) => {
  state.inText = inText;
  show();
  if (state.element) reveal(state.element, "center");
  remember();
};

// One line for what a link asks for and this page does not have. "" hides it.
const notify = (text) => {
  $("notice").hidden = !text;
  $("notice").textContent = text;
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
  document.querySelector(".views").hidden = state.tab !== "text";
  $("bar").hidden = !["text", "distributions"].includes(state.tab);
  if (state.tab === "distributions") drawCharts();
};

// The index of a row among the explained ones; -1 if it is not among them.
const choose = (row, scroll = true) => {
  notify("");
  state.row = row;
  if (row < 0) {
    point();
    showStart(choose);
  } else {
    if (!state.view.match[row]) {
      form.reset();
      refilter();
    }
    if (state.tab !== "text") openTab("text");
    point();
    showRow(row, (by) => (by ? step(by) : choose(-1)), listing() && (() => { showAs(true); choose(row, false); }));
    if (scroll) reveal(state.element);
  }
  remember();
};

// Twice: blocks that are laid out during the first scroll move the token.
const reveal = (element, block = "nearest") => {
  element.scrollIntoView({ block, inline: "nearest" });
  requestAnimationFrame(() => element.scrollIntoView({ block, inline: "nearest" }));
};

// The shown rows in reading order.
const reading = () => {
  if (state.view.readAs !== listing()) {
    state.view.readAs = listing();
    state.view.reading = listing() ? state.view.list : state.view.order.flatMap((s) => {
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

// Inside a notebook the page is the source of a frame: it has no address, so nothing can be kept in it or link to it.
const framed = location.protocol === "about:";
addEventListener("click", (event) => { if (framed && event.target.closest("a[href^='#']")) event.preventDefault(); });

const remember = () => {
  if (framed) return;
  const parts = new URLSearchParams();
  if (state.row >= 0) parts.set("row", R.row[state.row]);
  if (state.inText && state.view.active) parts.set("show", "text");
  if ($("fold").getAttribute("aria-pressed") === "true") parts.set("fold", "1");
  if (state.tab !== "text") parts.set("tab", state.tab);
  const values = wanted();
  for (const name of FIELDS) if (values[name] && (name !== "field" || values.value)) parts.set(name, values[name]);
  const hash = parts.toString();
  try {
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  } catch { /* inside a notebook's frame the address cannot be changed */ }
};

// What is wrong with a link's row, in words; "" if it can be shown.
const rowFault = (asked) => {
  if (!/^\d+$/.test(asked)) return `The link asks for row \u201c${asked}\u201d, which is no row number.`;
  if (rowIndex.has(Number(asked))) return "";
  if (Number(asked) >= D.rows_in_store) return `The link asks for row ${asked}, but the store has only ${counted(D.rows_in_store, "row")}, counted from 0.`;
  return `The link asks for row ${asked}, which is in the store but was not explained.`;
};

const follow = () => {
  const parts = new URLSearchParams(location.hash.slice(1)), faults = [];
  form.reset();
  for (const name of FIELDS) {
    if (!parts.has(name)) continue;
    const control = form.elements[name];
    control.value = parts.get(name);
    if (control.value !== parts.get(name)) {
      control.value = control.options?.[0].value ?? "";
      faults.push(`The link filters by ${name} \u201c${parts.get(name)}\u201d, which this page does not have.`);
    }
  }
  state.inText = parts.get("show") === "text";
  fold(parts.get("fold") === "1");
  fillValues(form.field.value);
  refilter();
  const tab = parts.get("tab") ?? "text";
  if (!tabs.includes(tab)) faults.push(`The link leads to \u201c${tab}\u201d, which this page does not have.`);
  openTab(tab);
  const fault = parts.has("row") ? rowFault(parts.get("row")) : "";
  if (fault) faults.push(fault);
  const row = parts.has("row") && !fault ? rowIndex.get(Number(parts.get("row"))) : -1;
  if (row >= 0 && !state.view.match[row]) faults.push(`The link\u2019s filter hides row ${R.row[row]}: it was cleared.`);
  choose(row);
  notify(faults.join(" "));
  if (row >= 0) reveal(state.element, "center");
};

const fold = (folded) => {
  $("fold").setAttribute("aria-pressed", folded);
  $("sequences").classList.toggle("folded", folded);
};

// What stands below the search must not lie under it.
new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`)).observe($("bar"));

state.markup = hasMarkup();
fillFilter(form);
document.body.classList.remove("unpacking");  // before anything is measured
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
// Enter goes from the form to what was found, where the arrow keys work.
form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing || event.target.tagName !== "INPUT") return;
  event.preventDefault();
  clearTimeout(typing);
  refilter();
  remember();
  $(listing() ? "hits" : "sequences").focus({ preventScroll: true });
});
$("clear").addEventListener("click", () => { form.reset(); refilter(); remember(); });
$("more").addEventListener("click", () => {
  const open = form.classList.toggle("expanded");
  $("more").setAttribute("aria-expanded", open);
});

for (const id of ["sequences", "hits"]) {
  $(id).addEventListener("click", (event) => {
    const element = event.target.closest("[data-i]");
    if (element) choose(Number(element.dataset.i), false);
  });
}
$("as-list").addEventListener("click", () => showAs(false));
$("as-text").addEventListener("click", () => showAs(true));
$("fold").addEventListener("click", () => {
  fold($("fold").getAttribute("aria-pressed") !== "true");
  remember();
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
  if (["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName) || $("bar").hidden) return;
  if (event.key === "/") {
    event.preventDefault();
    form.q.focus();
  }
  if (state.tab !== "text") return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!by && !(down && (state.row >= 0 || listing()))) return;
  event.preventDefault();
  if (by || listing()) step(by || down); else stepSequence(down);
});
