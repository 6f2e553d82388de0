"""Clauses from its options to its summary: explanations with one clause changed, read again by the AR."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from nla_engine.config import ClausesOptions
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel
from nla_engine.progress import Announce, Heard, Phases, Progress
from nla_engine.provenance import describe_run
from nla_engine.referee.clause_table import ClausesSummary, schema_of, summarise
from nla_engine.referee.clauses import WHOLE, Changed, changed_texts, clauses_of
from nla_engine.referee.load import (
    check_captured,
    check_revision,
    load_checked,
    read_by,
    reading_options,
    selected_texts,
)
from nla_engine.referee.others import named_others, other_texts
from nla_engine.referee.patcher import Patcher
from nla_engine.referee.trial import Places, try_lanes
from nla_engine.referee.variants import RECONSTRUCTION, Lane
from nla_engine.roundtrip.pair import Pair, choose_layer
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import ResultTable, check_table, nullable
from nla_engine.roundtrip.rows import row_columns
from nla_engine.roundtrip.score import cosine, fve_nrm, mse_nrm, unit
from nla_engine.roundtrip.summary import FINISHING, LOADING, PREPARING
from nla_engine.roundtrip.text_checks import check_layer, check_lengths
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.roundtrip.variance import layer_variance
from nla_engine.store import CaptureStore, LayerReader

READING = "reading"
#: In the metadata of a table, under made_by.
CLAUSES = "clauses"
#: Texts read and committed together, and tokens of the sequences that are patched for them, padding included.
_TEXTS = {"cpu": 256, "cuda": 4096}
_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class Reading:
    """One text for the AR. place: of its row among the selected ones; text: place of the explanation among all."""

    place: int
    text: int
    units: int
    partner: int | None
    changed: Changed


def run_clauses(
    options: ClausesOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
    others: Mapping[int, int] | None = None,
) -> ClausesSummary:
    """Read every changed text, and write the table. Raises the errors of `nla_engine.errors`.

    reconstructor: the AR, if it is loaded; rows: int64 [n], only these; others: for rows the row, one of them too,
    from whose first text foreign clauses are; without one there are none. None: they are drawn
    """
    phases = Phases(progress)
    phases.phase(LOADING)
    store = CaptureStore.open(options.store)
    check_table(options.out, options.explained, resume=options.resume, overwrite=options.overwrite)
    if options.model is not None:
        check_captured(store)
    texts = selected_texts(options, store, rows)
    if len(texts.selected) < 2:
        raise RequestError(
            f"{options.explained}: one row has no control, which is the text of another: select two or more"
        )
    reading = reading_options(options, texts)
    pair = read_by(options, reading, announce, reconstructor)
    check_revision(options, texts, pair.ar.lm.revision)
    site = choose_layer(store, reading, pair)
    check_layer(texts, site, reading.ar)
    check_lengths(texts, pair.ar)
    with ExitStack() as open_:
        patcher, weights = None, None
        if options.model is not None:
            lm, weights = load_checked(options, store, pair.device, pair.ar.lm.dtype)
            patcher = open_.enter_context(Patcher(lm, site.layer, pair.ar.kernels))
        open_.callback(pair.close)
        phases.phase(PREPARING)
        layer = store.layer(site.layer)
        measured = layer_variance(layer, options.seed, pair.device) if options.variance is None else None
        variance = options.variance if measured is None else measured.value
        if not variance or not np.isfinite(variance):
            raise RequestError(
                f"{options.store}: its rows have no variance, so FVE is not defined: give --variance"
            )
        about = {
            "layer": site.layer,
            "variance": variance,
            "variance_rows": 0 if measured is None else measured.rows,
        }
        run = _Run(options, store, layer, texts, pair, patcher, variance, others)
        table = ResultTable.open(
            options.out,
            options=run.identity(weights) | {"layer": site.layer},
            resume=options.resume,
            overwrite=options.overwrite,
            schema=schema_of(patcher is not None),
        )
        before = table.done
        with table:
            if not table.finished:
                run.fill(table, announce, phases)
                phases.phase(FINISHING)
                table.finish(
                    run.metadata(weights) | about,
                    lambda part: {"fve_nrm": nullable(fve_nrm(part["mse_nrm"].to_numpy(), variance))},
                    store,
                )
    seconds = phases.seconds()
    working = sum(seconds.get(phase, 0.0) for phase in (READING, FINISHING))
    return summarise(options.out, seconds, table.done - before, working)


@dataclass(frozen=True)
class _Run:
    """One run, ready to start. patcher: None without the captured model; others: see `run_clauses`."""

    options: ClausesOptions
    store: CaptureStore
    reader: LayerReader
    texts: TextFile
    pair: Pair
    patcher: Patcher | None
    variance: float
    others: Mapping[int, int] | None

    def fill(self, table: ResultTable, announce: Announce, phases: Phases) -> None:
        """Read what the table does not hold yet."""
        words = self.texts.all()
        clauses = [clauses_of(text) for text in words]
        total = len(words)
        announce(
            f"{total:,} texts of {len(self.texts.selected):,} rows, {sum(map(len, clauses)):,} clauses: each left out, "
            "swapped and negated, with controls"
            + (f" ({table.done:,} readings already there)" if table.done else "")
        )
        phases.phase(READING, self.texts.unit)
        readings = islice(self._readings(words, clauses), table.done, None)
        checked = self.patcher is None
        for chunk in self._chunks(readings):
            if not checked:
                self._check(chunk[0].place)
                checked = True
            table.append(self._columns(chunk))
            phases(chunk[-1].text + 1, total)

    def identity(self, weights: str | None) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        given = self.options.to_dict()
        return {name: given[name] for name in ("where", "limit", "seed", "precision")} | {
            "variance": self.variance,
            "base": weights,
            "dtype": str(self.pair.ar.lm.dtype).removeprefix("torch."),
            "store": self.store.attributes["store_id"],
            "selection": hashlib.sha256(self.texts.selected.tobytes()).hexdigest()[:16],
            "texts": self.texts.fingerprint(),
            "ar": self.pair.ar.fingerprint(),
            **named_others(self.others),
        }

    def metadata(self, weights: str | None) -> dict[str, Any]:
        """Of the table."""
        lm: LanguageModel | None = None if self.patcher is None else self.patcher.lm
        return {
            **describe_run(),
            "made_by": CLAUSES,
            "run": self.options.to_dict(),
            **self.texts.written_by(),
            **self.pair.describe(),
            "model": None if lm is None else lm.name,
            "weights": weights,
        }

    def _readings(self, words: list[str], clauses: list[list[str]]) -> Iterator[Reading]:
        """Every text to read, in the order of the texts. The same whatever was read before."""
        rows = self.texts.selected
        per_row = np.diff([self.texts.up_to_row(place) for place in range(len(rows) + 1)])
        place = np.repeat(np.arange(len(rows)), per_row)
        sequence, position = (
            self.store.column(name)[rows[place]].astype(np.int64) for name in ("sequence", "position")
        )
        units = np.array([len(parts) for parts in clauses], np.int64)
        if self.others is None:
            partner = other_texts(rows[place], sequence, position, self.options.seed, units)
        else:
            first_text = {int(row): self.texts.up_to_row(at) for at, row in enumerate(rows)}
            named = [self.others.get(int(row), -1) for row in rows[place]]
            partner = np.array([first_text[row] if row >= 0 else -1 for row in named], np.int64)
        norms = self.reader.norm_at(rows)
        first = np.searchsorted(place, place)
        for text, whole in enumerate(words):
            at, other = int(place[text]), int(partner[text])
            source = int(rows[place[other]]) if other >= 0 else None
            yield Reading(at, text, len(clauses[text]), None, Changed(WHOLE, -1, "", whole))
            if not (np.isfinite(norms[at]) and norms[at] > 0):
                continue
            counter = [int(position[text]), int(sequence[text]), text - int(first[text]), 1]
            draw = np.random.Generator(np.random.Philox(key=self.options.seed, counter=counter))
            for changed in changed_texts(whole, clauses[other] if other >= 0 else None, draw):
                yield Reading(at, text, len(clauses[text]), source if changed.foreign else None, changed)

    def _chunks(self, readings: Iterator[Reading]) -> Iterator[list[Reading]]:
        """Readings that are read together: those of a text in one chunk, as all are compared with `whole`."""
        kind, rows = self.pair.device.type, self.texts.selected
        size, number = self.store.column("position")[rows] + 1, self.store.column("sequence")[rows]
        chunk: list[Reading] = []
        text: list[Reading] = []
        longest, sequences = 0, set[int]()

        def fits(new: list[Reading]) -> bool:
            place = new[0].place
            padded = max(longest, int(size[place])) * len(sequences | {int(number[place])})
            return len(chunk) + len(new) <= _TEXTS[kind] and (self.patcher is None or padded <= _TOKENS[kind])

        for reading in readings:
            if text and reading.text != text[0].text:
                if chunk and not fits(text):
                    yield chunk
                    chunk, longest, sequences = [], 0, set()
                chunk += text
                longest = max(longest, int(size[text[0].place]))
                sequences.add(int(number[text[0].place]))
                text = []
            text.append(reading)
        if chunk and text and not fits(text):
            yield chunk
            chunk = []
        if chunk + text:
            yield chunk + text

    def _columns(self, chunk: list[Reading]) -> dict[str, Any]:
        store, reader, device = self.store, self.reader, self.pair.device
        rows = self.texts.selected[[each.place for each in chunk]]
        unique, of = np.unique(rows, return_inverse=True)
        stored = reader.torch(unique, device)
        sound = np.isfinite(reader.norm_at(unique)) & (reader.norm_at(unique) > 0)
        kept = np.flatnonzero(sound[of])
        read = torch.full((len(chunk), stored.shape[1]), torch.nan, device=device)
        if len(kept):
            read[torch.from_numpy(kept).to(device)] = self.pair.ar.reconstruct(
                [chunk[place].changed.text for place in kept]
            )
        cos = cosine(stored[torch.from_numpy(of).to(device)], read)
        whole = np.array([each.changed.variant == WHOLE for each in chunk])
        base = np.flatnonzero(whole)[np.cumsum(whole) - 1]
        lost = np.where(whole, np.nan, cos[base] - cos)
        scores: dict[str, Any] = {
            "cos": nullable(cos),
            "cos_lost": nullable(lost),
            "mse_nrm": nullable(mse_nrm(cos)),
            "fve_lost": nullable(2 * lost / self.variance),
        }
        if self.patcher is not None:
            kl = self._kl(unique, of, stored, read, np.flatnonzero(np.isfinite(cos)))
            added = np.where(whole, np.nan, kl - kl[base])
            scores |= {"kl": nullable(kl), "kl_added": nullable(added)}
        return {
            **row_columns(store, reader, rows),
            "sample": [each.text - self.texts.up_to_row(each.place) for each in chunk],
            "variant": [each.changed.variant for each in chunk],
            "unit": [None if each.changed.unit < 0 else each.changed.unit for each in chunk],
            "units": [each.units for each in chunk],
            "clause": [None if each.changed.unit < 0 else each.changed.clause for each in chunk],
            "rule": [each.changed.rule for each in chunk],
            "partner": [each.partner for each in chunk],
            "text": [each.changed.text for each in chunk],
            **scores,
        }

    def _kl(
        self, rows: np.ndarray, of: np.ndarray, stored: torch.Tensor, read: torch.Tensor, sound: np.ndarray
    ) -> np.ndarray:
        """float64 [n]: KL with each vector in its row's place, at the row's norm; NaN but for the texts `sound`."""
        out = np.full(len(of), np.nan)
        if not len(sound):
            return out
        assert self.patcher is not None
        kept, row = np.unique(of[sound], return_inverse=True)
        norms = torch.from_numpy(self.reader.norm_at(rows[kept])).to(read.device)[:, None]
        at = torch.from_numpy(row).to(read.device)
        vectors = unit(read[torch.from_numpy(sound).to(read.device)]) * norms[at]
        lane = Lane(RECONSTRUCTION, row, vectors, np.arange(len(row)))
        tried = try_lanes(self.patcher, Places.of(self.store, rows[kept]), [lane], 0)
        tried.check(stored[torch.from_numpy(kept).to(read.device)], self.patcher.lm.name, self.store)
        out[sound] = tried.measured[0].kl[:, 0]
        return out

    def _check(self, place: int) -> None:
        """The patcher against transformers on the sequence of the next row."""
        assert self.patcher is not None
        rows = self.texts.selected[place:]
        sequence, position = (self.store.column(name)[rows] for name in ("sequence", "position"))
        mine, norms = sequence == sequence[0], self.reader.norm_at(rows)
        mine &= np.isfinite(norms) & (norms > 0)
        longest = min(int(position.max()) + 1, self.patcher.lm.max_length)
        self.patcher.check(self.store.sequence(int(sequence[0])).tokens, position[mine], norms[mine], longest)
