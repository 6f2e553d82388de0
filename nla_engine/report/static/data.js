// The page's data as columns, and what follows from them.

const { texts, sequences: S, rows: R, explanations: E } = D;
const ROWS = R.row.length;
const SCORED = D.scored;  // else no AR has read the texts: there is no FVE, no colour and no distribution
const ASKED = D.asked;  // the texts are an oracle's answers to questions
const SEQUENCES = S.number.length;
for (const name of ["cos", "cos_shuffled", "rank"]) E[name] = numbers(E[name]);
R.norm = numbers(R.norm);

const GENERATED = 1, EARLY = 8, SINK = 16, NONFINITE = 32;
const FINISH_LENGTH = 1;

// fve_nrm = 1 - 2 (1 - cos) / Var
const fveOf = (cos) => (D.variance > 0 ? 1 - (2 * (1 - cos)) / D.variance : NaN);
E.fve = E.cos.map(fveOf);
E.fveShuffled = E.cos_shuffled.map(fveOf);
const BEST = new Set(E.best);

// The explanations of row i are first[i] .. first[i + 1] - 1; a row's own FVE is their mean, so that no explanation is chosen by its score.
const explanationsOf = (row) =>
  Array.from({ length: R.first[row + 1] - R.first[row] }, (_, i) => R.first[row] + i);
const rowFve = Float64Array.from({ length: ROWS }, (_, row) => mean(E.fve.subarray(R.first[row], R.first[row + 1])));

const sequenceOf = new Int32Array(ROWS);
for (let s = 0; s < SEQUENCES; s++) sequenceOf.fill(s, S.first[s], S.first[s + 1]);
const rowIndex = new Map(R.row.map((row, index) => [row, index]));

const tokenText = (row) => texts[R.token[row]];
const nextText = (row) => (R.next[row] === null ? null : texts[R.next[row]]);

const stepClass = (fve) => (Number.isFinite(fve) ? `s${stepOf(fve)}` : SCORED ? "unscored" : "told");
const stepName = (step) => (step < 0 ? "no score" : step === 0 ? "below 0" : `${STEPS[step]} to ${STEPS[step + 1] ?? 1}`);
