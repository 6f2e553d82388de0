"""Claims from its options to its summary: what explanations say, against what was read, by rules or a judge."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nla_engine.config import ClaimsOptions
from nla_engine.errors import RequestError
from nla_engine.models.load import load_model, pick_device
from nla_engine.ops.backends import Kernels
from nla_engine.ops.fp8 import check_fp8
from nla_engine.progress import Announce, Heard, Phases, Progress
from nla_engine.provenance import describe_run
from nla_engine.referee.claim_table import CLAIM, CLAUSE, FACT, ClaimsSummary, schema_of, summarise
from nla_engine.referee.claims import Claim, claims_of
from nla_engine.referee.clauses import CONTROL, clause_spans
from nla_engine.referee.judge import Judge, prompt_of, verdict
from nla_engine.referee.load import selected_texts
from nla_engine.referee.others import other_texts
from nla_engine.referee.truth import Context, Contexts, Said
from nla_engine.roundtrip.results import ResultTable, check_table
from nla_engine.roundtrip.rows import token_columns
from nla_engine.roundtrip.summary import FINISHING, LOADING
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.store import CaptureStore

CHECKING = "checking"
#: In the metadata of a table, under made_by.
CLAIMS = "claims"
#: Rows checked and committed together, without and with a judge.
_ROWS, _JUDGED_ROWS = 4096, 256
#: Sequences whose text is kept for the rows that ask for it next.
_SEQUENCES = 4096


def run_claims(
    options: ClaimsOptions, *, announce: Announce = lambda text: None, progress: Heard = Progress()
) -> ClaimsSummary:
    """Check what each text says, and write the table. Raises the errors of `nla_engine.errors`."""
    phases = Phases(progress)
    phases.phase(LOADING)
    store = CaptureStore.open(options.store)
    check_table(options.out, options.explained, resume=options.resume, overwrite=options.overwrite)
    store.check_tokens("nothing can be compared with them")
    texts = selected_texts(options, store)
    if len(texts.selected) < 2:
        raise RequestError(
            f"{options.explained}: one row has no control, which is the context of another: select two or more"
        )
    judge = None if options.judge is None else _judge(options)
    run = _Run(options, store, texts, judge)
    table = ResultTable.open(
        options.out,
        options=run.identity(),
        resume=options.resume,
        overwrite=options.overwrite,
        schema=schema_of(judge is not None),
    )
    checked = 0
    with table:
        if not table.finished:
            checked = run.fill(table, announce, phases)
            phases.phase(FINISHING)
            table.finish(run.metadata(), store=store)
    seconds = phases.seconds()
    working = sum(seconds.get(phase, 0.0) for phase in (CHECKING, FINISHING))
    return summarise(options.out, seconds, checked, working)


def _judge(options: ClaimsOptions) -> Judge:
    assert options.judge is not None
    device = pick_device(options.device)
    if options.precision == "fp8":
        check_fp8(device)
    lm = load_model(
        options.judge,
        device=device,
        dtype=options.dtype,
        base=options.judge_base,
        remote_code=options.trust_remote_code,
    )
    return Judge(lm, Kernels(options.kernels, options.precision), options.batch_size)


@dataclass(frozen=True)
class _Line:
    """One line of the table, before the columns of its row. text: the place of its text among all."""

    text: int
    side: str
    kind: str
    said: str
    start: int | None = None
    end: int | None = None
    holds: bool | None = None
    holds_control: bool | None = None
    agree: float | None = None
    agree_control: float | None = None


@dataclass(frozen=True)
class _Run:
    """One run, ready to start."""

    options: ClaimsOptions
    store: CaptureStore
    texts: TextFile
    judge: Judge | None

    @cached_property
    def _contexts(self) -> Callable[[int], Contexts]:
        """Those of the rows of a sequence, by its number."""
        return lru_cache(_SEQUENCES)(
            lambda number: Contexts(
                self.store.vocabulary, self.store.sequence(number).tokens, self.options.recent
            )
        )

    @cached_property
    def _words(self) -> list[str]:
        return self.texts.all()

    @cached_property
    def _partner(self) -> np.ndarray:
        """int64 [R]: place of the other row among the selected ones, for each of them."""
        rows = self.texts.selected
        sequence, position = (
            self.store.column(name)[rows].astype(np.int64) for name in ("sequence", "position")
        )
        return other_texts(rows, sequence, position, self.options.seed)

    def fill(self, table: ResultTable, announce: Announce, phases: Phases) -> int:
        """Check what the table does not hold yet. How many texts that were."""
        rows, total = self.texts.selected, len(self._words)
        at_once = _ROWS if self.judge is None else _JUDGED_ROWS
        judged = "" if self.judge is None else f", each clause judged by {self.judge.lm.name}"
        announce(
            f"{total:,} texts of {len(rows):,} rows, compared with what was read{judged}"
            + (f" ({table.done:,} lines already there)" if table.done else "")
        )
        phases.phase(CHECKING, self.texts.unit)
        before, checked = table.done, 0
        for start in range(0, len(rows), at_once):
            end = min(start + at_once, len(rows))
            first, last = self.texts.up_to_row(start), self.texts.up_to_row(end)
            lines = [line for place in range(start, end) for line in self._lines(place)]
            if before >= len(lines) and before:  # the part is there; one without lines adds none
                before -= len(lines)
                continue
            if lines:
                table.append(self._columns(lines))
            checked += last - first
            phases(last, total)
        return checked

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        given, judge = self.options.to_dict(), self.judge
        names = ("where", "limit", "recent", "judge_context", "seed", "precision")
        return {name: given[name] for name in names} | {
            "judge": None if judge is None else judge.lm.fingerprint(),
            "dtype": None if judge is None else str(judge.lm.dtype).removeprefix("torch."),
            "store": self.store.attributes["store_id"],
            "selection": hashlib.sha256(self.texts.selected.tobytes()).hexdigest()[:16],
            "texts": self.texts.fingerprint(),
        }

    def metadata(self) -> dict[str, Any]:
        """Of the table."""
        lm = None if self.judge is None else self.judge.lm
        layer = self.texts.layer
        return {
            **describe_run(),
            "made_by": CLAIMS,
            "run": self.options.to_dict(),
            **self.texts.written_by(),
            "layer": None if layer is None else str(layer),
            "rows": len(self.texts.selected),
            "explanations": len(self._words),
            "judge": None if lm is None else lm.name,
            "judge_revision": None if lm is None else lm.revision,
        }

    def _texts_of(self, place: int) -> range:
        return range(self.texts.up_to_row(place), self.texts.up_to_row(place + 1))

    def _context(self, place: int) -> Context:
        """The context of a selected row."""
        row = self.texts.selected[place]
        return self._contexts_of(place).at(int(self.store.column("position")[row]))

    def _contexts_of(self, place: int) -> Contexts:
        return self._contexts(int(self.store.column("sequence")[self.texts.selected[place]]))

    def _lines(self, place: int) -> Iterator[_Line]:
        """Every line of a row: of each of its texts the claims, the facts, and the clauses if there is a judge."""
        partner = int(self._partner[place])
        own, other = self._context(place), self._context(partner)
        texts, beside = self._texts_of(place), self._texts_of(partner)
        claims = [claims_of(self._words[text]) for text in texts]
        claims_beside = [claims_of(self._words[text]) for text in beside]
        counts = Counter(key for each in claims for key in {claim.key for claim in each})
        counts_beside = Counter(key for each in claims_beside for key in {claim.key for claim in each})
        for number, text in enumerate(texts):
            words = self._words[text]
            said = Said(words, claims[number])
            same = number % len(beside)
            said_beside = Said(self._words[beside[same]], claims_beside[same])
            for claim in claims[number]:
                yield self._claim(text, claim, own, other, counts, counts_beside, len(texts), len(beside))
            for fact in own.facts():
                holds, control = said.names(fact, own), said_beside.names(fact, own)
                yield _Line(text, FACT, fact.kind, fact.text, holds=holds, holds_control=control)
            if self.judge is not None:
                for start, end in clause_spans(words):
                    yield _Line(text, CLAIM, CLAUSE, words[start:end], start, end)

    def _claim(
        self,
        text: int,
        claim: Claim,
        own: Context,
        other: Context,
        counts: Counter[tuple[str, str]],
        counts_beside: Counter[tuple[str, str]],
        samples: int,
        samples_beside: int,
    ) -> _Line:
        agree = control = None
        if samples > 1:
            agree = (counts[claim.key] - 1) / (samples - 1)
            control = counts_beside[claim.key] / samples_beside
        return _Line(
            text,
            CLAIM,
            claim.kind,
            claim.text,
            claim.start,
            claim.end,
            own.holds(claim),
            other.holds(claim),
            agree,
            control,
        )

    def _columns(self, lines: list[_Line]) -> dict[str, Any]:
        store, texts = self.store, [line.text for line in lines]
        places = np.array([self.texts.rows_of(text) for text in texts])
        rows, partners = self.texts.selected[places], self.texts.selected[self._partner[places]]
        names = ("side", "kind", "said", "start", "end", "holds", "agree")
        return {
            **token_columns(store, rows),
            "sample": [text - self.texts.up_to_row(int(at)) for text, at in zip(texts, places, strict=True)],
            **{name: [getattr(line, name) for line in lines] for name in names},
            "partner": partners,
            "holds" + CONTROL: [line.holds_control for line in lines],
            "agree" + CONTROL: [line.agree_control for line in lines],
            **(self._judged(lines, places) if self.judge is not None else {}),
        }

    def _judged(self, lines: list[_Line], places: np.ndarray) -> dict[str, list[str | None]]:
        """What the judge says of each clause, with the context of its own row and of the other one."""
        assert self.judge is not None
        out: dict[str, list[str | None]] = {}
        asked = [number for number, line in enumerate(lines) if line.kind == CLAUSE]
        for side, seen in (("", places), (CONTROL, self._partner[places])):
            prompts = [self._prompt(lines[number].said, int(seen[number])) for number in asked]
            answers = self.judge.answers(prompts)
            columns = {
                "prompt": prompts,
                "answer": answers,
                "judged": [verdict(answer) for answer in answers],
            }
            for name, values in columns.items():
                column: list[str | None] = [None] * len(lines)
                for number, value in zip(asked, values, strict=True):
                    column[number] = value
                out[name + side] = column
        return out

    def _prompt(self, clause: str, place: int) -> str:
        assert self.judge is not None
        context = self._context(place)
        position = int(self.store.column("position")[self.texts.selected[place]])
        harmless = self.judge.harmless
        recent = self._contexts_of(place).last(position, self.options.judge_context)
        following = None if context.next is None else harmless(context.next)
        return prompt_of(harmless(recent), following, harmless(clause))
