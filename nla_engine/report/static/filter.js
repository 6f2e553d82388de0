// Which rows are shown: the form's values, turned into one test per row.

const FIELDS = ["q", "token", "lo", "hi", "status", "field", "value", "order"];
const SEQUENCE_TEXT = " text";

// "exactly this", /a pattern/i, or words that occur in the text, ignoring case. null: every text matches.
const matcher = (wanted) => {
  if (wanted === "") return null;
  const pattern = /^\/(.+)\/(i?)$/s.exec(wanted);
  if (pattern) {
    const expression = new RegExp(pattern[1], pattern[2] + "u");
    return (text) => expression.test(text);
  }
  const exact = /^"(.*)"$/s.exec(wanted);
  if (exact) return (text) => text === exact[1];
  const low = wanted.toLowerCase();
  return (text) => text.toLowerCase().includes(low);
};

// Where a text fits: text -> [from, to] of the first match, or null. The same forms as `matcher`.
const finder = (wanted) => {
  if (wanted === "") return null;
  const pattern = /^\/(.+)\/(i?)$/s.exec(wanted), exact = /^"(.*)"$/s.exec(wanted);
  const plain = (exact ? exact[1] : wanted).replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  const expression = pattern ? new RegExp(pattern[1], pattern[2] + "u") : new RegExp(plain, exact ? "u" : "iu");
  return (text) => {
    const found = expression.exec(text);
    return found && [found.index, found.index + found[0].length];
  };
};

const sequenceText = (s) => {
  const parts = [];
  let row = S.first[s];
  for (const [before, text] of S.gaps[s]) {
    for (; row < S.first[s] + before; row++) parts.push(tokenText(row));
    parts.push(text);
  }
  for (; row < S.first[s + 1]; row++) parts.push(tokenText(row));
  return parts.join("");
};

const fieldText = (field, s) => {
  if (field === SEQUENCE_TEXT) return sequenceText(s);
  const value = S.fields[field]?.[s];
  return value === null || value === undefined ? null : String(value);
};

// The test of each of `size` items, run once at first use: texts are long and rows many.
const remembered = (size, test) => {
  const known = new Int8Array(size).fill(-1);
  return (i) => (known[i] < 0 ? (known[i] = test(i) ? 1 : 0) : known[i]) === 1;
};

// -> { match: one byte per row, rows: how many match, list: these rows and order: their sequences, as they are shown,
// counts: rows of each colour that fit all but the range, active, finders, field, status }. Throws on an invalid pattern.
const select = (wanted) => {
  const tests = [];
  const text = matcher(wanted.q), token = matcher(wanted.token), value = matcher(wanted.value);
  const bound = (given, otherwise) => (given === "" || !Number.isFinite(+given) ? otherwise : +given);
  const lo = bound(wanted.lo, -Infinity), hi = bound(wanted.hi, Infinity);
  // A range excludes its upper edge, except 1, the largest FVE.
  const ranged = lo > -Infinity || hi < Infinity;
  const within = (row) => !ranged || (rowFve[row] >= lo && (rowFve[row] < hi || (hi >= 1 && rowFve[row] <= hi)));
  if (token) {
    const fits = remembered(texts.length, (i) => token(texts[i]));
    tests.push((row) => fits(R.token[row]));
  }
  if (value) {
    const fits = remembered(SEQUENCES, (s) => {
      const found = fieldText(wanted.field, s);
      return found !== null && value(found);
    });
    tests.push((row) => fits(sequenceOf[row]));
  }
  if (wanted.status) tests.push((row) => explanationsOf(row).some((e) => E.status[e] === wanted.status));
  if (text) tests.push((row) => explanationsOf(row).some((e) => text(E.text[e]) || (ASKED && text(E.question[e]))));

  const match = new Uint8Array(ROWS), list = [], counts = new Array(STEPS.length).fill(0);
  let unscored = 0;
  for (let row = 0; row < ROWS; row++) {
    if (!tests.every((test) => test(row))) continue;
    const step = stepOf(rowFve[row]);
    if (step < 0) unscored += 1; else counts[step] += 1;
    if (within(row)) { match[row] = 1; list.push(row); }
  }
  return { match, rows: list.length, list: sorted(list, wanted.order, (row) => rowFve[row]), order: order(match, wanted.order), counts, unscored,
    active: tests.length > 0 || ranged, finders: { text: finder(wanted.q), value: finder(wanted.value) }, field: wanted.field, status: wanted.status };
};

// By FVE, lowest or highest first; what has none comes last in both orders.
const sorted = (items, by, fveOf) => {
  if (!by) return items;
  const sign = by === "low" ? 1 : -1;
  const rank = (item) => (Number.isFinite(fveOf(item)) ? sign * fveOf(item) : Infinity);
  return items.sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) - rank(b)));
};

const order = (match, by) => {
  const shown = [], score = new Float64Array(SEQUENCES);
  for (let s = 0; s < SEQUENCES; s++) {
    const fve = [];
    for (let row = S.first[s]; row < S.first[s + 1]; row++) if (match[row]) fve.push(rowFve[row]);
    if (!fve.length) continue;
    shown.push(s);
    score[s] = mean(fve);
  }
  return sorted(shown, by, (s) => score[s]);
};

const fillFilter = (form) => {
  for (const status of [...new Set(E.status)].sort()) form.status.append(make("option", { value: status }, status));
  form.field.append(...Object.keys(S.fields).map((name) => make("option", { value: name }, name)));
  form.field.append(make("option", { value: SEQUENCE_TEXT }, "(text of the sequence)"));
};

// The field's values, offered as choices; matched exactly, so that 4 does not find 24.
const fillValues = (field) => {
  const values = field === SEQUENCE_TEXT ? [] : [...new Set((S.fields[field] ?? []).filter((v) => v !== null).map(String))];
  const sorted = values.sort((a, b) => a.localeCompare(b, "en", { numeric: true })).slice(0, 500);
  $("values").replaceChildren(...sorted.map((value) => make("option", { value: `"${value}"` })));
};
