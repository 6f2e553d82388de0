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

// -> { match: one byte per row, rows: how many match, order: sequences to show, active }. Throws on an invalid pattern.
const select = (wanted) => {
  const tests = [];
  const text = matcher(wanted.q), token = matcher(wanted.token), value = matcher(wanted.value);
  const bound = (given, otherwise) => (given === "" || !Number.isFinite(+given) ? otherwise : +given);
  const lo = bound(wanted.lo, -Infinity), hi = bound(wanted.hi, Infinity);
  // A range excludes its upper edge, except 1, the largest FVE.
  if (lo > -Infinity || hi < Infinity) tests.push((row) => rowFve[row] >= lo && (rowFve[row] < hi || (hi >= 1 && rowFve[row] <= hi)));
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

  const match = new Uint8Array(ROWS);
  let rows = 0;
  for (let row = 0; row < ROWS; row++) if (tests.every((test) => test(row))) { match[row] = 1; rows += 1; }
  return { match, rows, order: order(match, wanted.order), active: tests.length > 0 };
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
  if (!by) return shown;
  const sign = by === "low" ? 1 : -1;
  // Sequences without a score come last in both orders.
  const rank = (s) => (Number.isFinite(score[s]) ? sign * score[s] : Infinity);
  return shown.sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) - rank(b)));
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
