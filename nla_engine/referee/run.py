"""Patch from its options to its summary: reconstructions in the place of rows, and what the model makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nla_engine.config import PatchOptions
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel
from nla_engine.progress import Announce, Heard, Phases, Progress
from nla_engine.provenance import describe_run
from nla_engine.referee.control_texts import OF_CONTROLS, of_controls
from nla_engine.referee.load import (
    check_captured,
    check_revision,
    load_checked,
    read_by,
    reading_options,
    selected_texts,
)
from nla_engine.referee.measures import Measured
from nla_engine.referee.others import named_others
from nla_engine.referee.patcher import Patcher
from nla_engine.referee.table import PatchSummary, columns_of, schema_of, summarise
from nla_engine.referee.trial import Places, try_lanes
from nla_engine.referee.variants import VARIANTS, Variants
from nla_engine.roundtrip.pair import Pair, choose_layer
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import PATCH, ResultTable, check_table, nullable
from nla_engine.roundtrip.rows import row_columns
from nla_engine.roundtrip.score import cosine
from nla_engine.roundtrip.summary import FINISHING, LOADING, PREPARING
from nla_engine.roundtrip.text_checks import check_layer, check_lengths
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.roundtrip.texts import NONFINITE, ZERO
from nla_engine.roundtrip.variance import layer_variance
from nla_engine.roundtrip.verbalize import Explanation
from nla_engine.store import CaptureStore, LayerReader
from nla_engine.store.views.draw import draw_rows

#: Phase in which rows are patched.
PATCHING = "patching"
#: Texts patched and committed together, and tokens of the sequences that are read for them, padding included.
_TEXTS = {"cpu": 256, "cuda": 2048}
_TOKENS = {"cpu": 4096, "cuda": 32768}
#: Rows whose reconstructions stand for those of other rows, at most.
CONTROL_ROWS = 256


def run_patch(
    options: PatchOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
    others: Mapping[int, int] | None = None,
) -> PatchSummary:
    """Patch, and write the table. Raises the errors of `nla_engine.errors`.

    reconstructor: the AR, if it is loaded; rows: int64 [n], only these; others: for rows the row, one of them too,
    whose first text is their shuffled control; without one it is drawn
    """
    phases = Phases(progress)
    phases.phase(LOADING)
    store = CaptureStore.open(options.store)
    check_table(options.out, options.explained, resume=options.resume, overwrite=options.overwrite)
    check_captured(store)
    texts = selected_texts(options, store, rows)
    schema = schema_of(options.horizon)
    if clash := [name for name in texts.more.names if name in schema.names]:
        raise RequestError(
            f"{options.explained}: the result has a field {clash[0]} of its own: rename it in the file, or give the "
            "table that this one was made of"
        )
    if len(texts.selected) < 2:
        raise RequestError(
            f"{options.explained}: one row has no control, which is the reconstruction of another: select two or more"
        )
    reading = reading_options(options, texts)
    pair = read_by(options, reading, announce, reconstructor)
    check_revision(options, texts, pair.ar.lm.revision)
    site = choose_layer(store, reading, pair)
    check_layer(texts, site, reading.ar)
    check_lengths(texts, pair.ar)
    lm, weights = load_checked(options, store, pair.device, pair.ar.lm.dtype)
    phases.phase(PREPARING)
    layer = site.layer  # its output: `reading` names no other site
    with Patcher(lm, layer, pair.ar.kernels) as patcher, closing(pair):
        run = _Run(
            options,
            store,
            layer,
            texts,
            pair,
            lm,
            patcher,
            pa.schema([*schema, *texts.more]),
            weights,
            others,
        )
        table = ResultTable.open(
            options.out,
            options=run.identity(),
            resume=options.resume,
            overwrite=options.overwrite,
            schema=run.schema,
        )
        before = table.done
        with table:
            if not table.finished:
                run.fill(table, announce, phases)
    seconds = phases.seconds()
    working = sum(seconds.get(phase, 0.0) for phase in (PATCHING, FINISHING))
    return summarise(options.out, seconds, table.done - before, working)


@dataclass(frozen=True)
class _Run:
    """One run, ready to start. weights: fingerprint of the model, as captured; others: see `run_patch`."""

    options: PatchOptions
    store: CaptureStore
    layer: int
    texts: TextFile
    pair: Pair
    lm: LanguageModel
    patcher: Patcher
    schema: pa.Schema
    weights: str
    others: Mapping[int, int] | None

    def fill(self, table: ResultTable, announce: Announce, phases: Phases) -> None:
        """Patch what the table does not hold yet, and finish it."""
        texts, rows = self.texts, self.texts.selected
        total, first = texts.up_to_row(len(rows)), texts.rows_of(table.done)
        announce(
            f"{total:,} text{'' if total == 1 else 's'} of {len(rows):,} rows of layer {self.layer}, each patched into "
            f"{self.lm.name} with its controls" + (f" ({table.done:,} already there)" if first else "")
        )
        reader = self.store.layer(self.layer)
        self._check(reader, first)
        mean = layer_variance(reader, self.options.seed, self.pair.device)
        if not mean.rows:
            raise RequestError(f"{self.options.store}: layer {self.layer} has no row with a direction")
        variants = Variants(self.options.norm, mean.mean, self._sample(), self.options.seed)
        if len(variants.controls) < 2:
            raise RequestError(
                f"--ar {self.pair.ar.lm.name}: gives no two vectors with a direction, so there is no control"
            )
        phases.phase(PATCHING, texts.unit)
        for start, end in self._chunks(first):
            table.append(self._columns(reader, variants, start, end))
            phases(table.done, total)
        phases.phase(FINISHING)
        about = {"mean_rows": mean.rows, "control_rows": len(variants.controls)}
        table.finish(self._metadata() | about, store=self.store)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        given, rows = self.options.to_dict(), self.texts.selected
        return {name: given[name] for name in ("where", "limit", "norm", "horizon", "seed", "precision")} | {
            "layer": self.layer,
            "base": self.weights,
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "store": self.store.attributes["store_id"],
            "selection": hashlib.sha256(rows.tobytes()).hexdigest()[:16],
            "texts": self.texts.fingerprint(),
            "ar": self.pair.ar.fingerprint(),
            "drawn_by": "sequence and position",  # older versions: the place in the store
            **named_others(self.others),
        }

    def _sample(self) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """The sequences and positions of some rows, and the reconstructions of their first texts."""
        texts, store = self.texts, self.store
        places = draw_rows(np.arange(len(texts.selected)), CONTROL_ROWS, self.options.seed)
        rows = texts.selected[places]
        words = [texts.text(texts.up_to_row(int(place))) for place in places]
        return store.column("sequence")[rows], store.column("position")[rows], self.pair.ar.reconstruct(words)

    def _check(self, reader: LayerReader, first: int) -> None:
        """The patcher against transformers on the text of the next row, and its sequence's rows."""
        rows = self.texts.selected[first:]
        if not len(rows):
            return
        sequence, position = (self.store.column(name)[rows] for name in ("sequence", "position"))
        mine = sequence == sequence[0]
        norms = reader.norm_at(rows[mine])
        sound = np.isfinite(norms) & (norms > 0)
        longest = min(int(position.max()) + 1 + self.options.horizon, self.lm.max_length)
        ids = self.store.sequence(int(sequence[0])).tokens
        self.patcher.check(ids, position[mine][sound], norms[sound], longest)

    def _chunks(self, first: int) -> Iterator[tuple[int, int]]:
        """Places [start, end) of rows that are patched together, from row `first` on."""
        texts, rows, kind = self.texts, self.texts.selected, self.pair.device.type
        new = np.diff(self.store.column("sequence")[rows], prepend=-1) != 0
        size = self.store.column("position")[rows] + 1 + self.options.horizon
        start = first
        while start < len(rows):
            end, sequences, longest = start, 0, 0
            while end < len(rows):
                sequences += int(new[end] or end == start)
                longest = max(longest, int(size[end]))
                count = texts.up_to_row(end + 1) - texts.up_to_row(start)
                if end > start and (count > _TEXTS[kind] or sequences * longest > _TOKENS[kind]):
                    break
                end += 1
            yield start, end
            start = end

    def _columns(self, reader: LayerReader, variants: Variants, start: int, end: int) -> dict[str, Any]:
        """The columns of the texts of these rows, by place."""
        store, rows = self.store, self.texts.selected[start:end]
        by_row = list(self.texts.of_rows(reader, rows, start))
        written = [text for texts in by_row for text in texts]
        of = np.repeat(np.arange(len(rows)), [len(texts) for texts in by_row])
        stored = reader.torch(rows, self.pair.device)
        read = self._reconstructed(written, stored.shape[1])
        cos = cosine(stored[torch.from_numpy(of).to(stored.device)], read)
        sound = np.flatnonzero(np.isfinite(cos))
        found = {
            variant: Measured(*np.full((3, len(written), 1 + self.options.horizon), np.nan))
            for variant in VARIANTS
        }
        if len(sound):
            kept, texts = np.unique(of[sound], return_inverse=True)
            vectors = stored[torch.from_numpy(kept).to(stored.device)]
            own = read[torch.from_numpy(sound).to(stored.device)]
            sequences, positions = (store.column(name)[rows[kept]] for name in ("sequence", "position"))
            norms, named = reader.norm_at(rows[kept]), self._named(rows[of[sound]])
            lanes = variants.of(sequences, positions, norms, vectors, texts, own, named)
            tried = try_lanes(self.patcher, Places.of(store, rows[kept]), lanes, self.options.horizon)
            tried.check(vectors, self.lm.name, store)
            for lane, measured in zip(lanes, tried.measured, strict=True):
                for name, values in vars(measured).items():
                    getattr(found[lane.variant], name)[sound] = values[lane.of_text]
        return {
            **row_columns(store, reader, rows[of]),
            **self.texts.columns(written),
            "cos": nullable(cos),
            **columns_of(found, self._later(rows)[of]),
        }

    def _reconstructed(self, written: list[Explanation], width: int) -> torch.Tensor:
        """The AR's vector of each text, float32 [t, d]; NaN for the texts of rows without a direction."""
        out = torch.full((len(written), width), torch.nan, device=self.pair.device)
        sound = [each.status not in (ZERO, NONFINITE) for each in written]
        if any(sound):
            words = [each.text for each, is_sound in zip(written, sound, strict=True) if is_sound]
            out[torch.tensor(sound, device=out.device)] = self.pair.ar.reconstruct(words)
        return out

    def _named(self, rows: np.ndarray) -> torch.Tensor | None:
        """float32 [t, d]: the reconstruction of each row's named other one, NaN without; None if none are named."""
        if self.others is None:
            return None
        others = np.array([self.others.get(int(row), -1) for row in rows], np.int64)
        unique, of = np.unique(others, return_inverse=True)
        texts, place = self.texts, {int(row): at for at, row in enumerate(self.texts.selected)}
        out = torch.full((len(unique), self.store.d_model), torch.nan, device=self.pair.device)
        known = np.flatnonzero(unique >= 0)
        if len(known):
            words = [texts.text(texts.up_to_row(place[int(unique[at])])) for at in known]
            out[torch.from_numpy(known).to(out.device)] = self.pair.ar.reconstruct(words)
        return out[torch.from_numpy(of).to(out.device)]

    def _later(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: how many positions of the horizon there are behind each row."""
        sequences, number = np.unique(self.store.column("sequence")[rows], return_inverse=True)
        sizes = np.array([len(self.store.sequence(int(sequence)).tokens) for sequence in sequences])
        return np.minimum(sizes[number] - 1 - self.store.column("position")[rows], self.options.horizon)

    def _metadata(self) -> dict[str, Any]:
        return {
            **describe_run(),
            "made_by": PATCH,
            OF_CONTROLS: of_controls(self.texts.metadata or {}),
            "run": self.options.to_dict(),
            **self.texts.written_by(),
            **self.pair.describe(),
            "model": self.lm.name,
            "model_revision": self.lm.revision,
            **{f"model_{key}": value for key, value in self.lm.origin.items()},
            "weights": self.weights,
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "layer": self.layer,
        }
