"""Controls from their options to their summary: texts without the vector, read by the same AR on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nla_engine.config import ControlsOptions
from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models.captured import load_captured
from nla_engine.models.load import LanguageModel
from nla_engine.progress import Announce, Heard, Phases, Progress
from nla_engine.provenance import describe_run
from nla_engine.referee.added import CONTROLS, Added
from nla_engine.referee.control_texts import OF_CONTROLS, ControlTexts
from nla_engine.referee.intervals import in_words
from nla_engine.referee.load import AR_AS_GIVEN, check_revision, read_by, reading_options, selected_texts
from nla_engine.referee.reader import Reader
from nla_engine.roundtrip.chosen import CONTROL_ROWS, Chosen
from nla_engine.roundtrip.job import Run
from nla_engine.roundtrip.layers import controls_of
from nla_engine.roundtrip.pair import choose_layer
from nla_engine.roundtrip.results import check_table, read_metadata
from nla_engine.roundtrip.summary import LOADING, PREPARING
from nla_engine.roundtrip.text_checks import check_layer, check_lengths
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.store import CaptureStore
from nla_engine.store.views.draw import draw_rows

#: Columns of the table that are not those of a round trip.
FURTHER = (pa.field("control", pa.string()), pa.field("of_row", pa.int64()))


@dataclass(frozen=True)
class ControlsSummary:
    """The result in numbers; the keys are those of `--json`. Means, each with its controls (docs/controls.md)."""

    out: str
    layer: int | str
    variance: float
    reader: str | None
    added: Added
    seconds: float
    seconds_by_phase: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        added, explained = self.added, self.added.explained.to_dict()
        return {
            "out": self.out,
            "layer": self.layer,
            "fve_over_text": added.over_text.numbers(),
            "best_control": added.best,
            **explained,
            "sequences": added.over_text.clusters,
            "controls": {name: found.to_dict() for name, found in added.controls.items()},
            "says": added.says(),
            "variance": round(self.variance, 6),
            "reader_model": self.reader,
            "seconds": self.seconds,
            "seconds_by_phase": self.seconds_by_phase,
        }

    def told(self) -> dict[str, Any]:
        """For people: a line for each control, then what the numbers say."""
        facts = self.to_dict()
        value, low, high = facts["fve_over_text"]
        facts["fve_over_text"] = in_words(value, low, high) + (
            f", over {self.added.best}" if self.added.best else ""
        )
        for name, found in facts.pop("controls").items():
            measures = {key: found[key] for key in ("rows", "fve_nrm", "cos", "retrieval_top1")}
            facts[name] = measures | {"explanations over it": in_words(*found["over"])}
        says = facts.pop("says")
        return facts | {("says" if number == 0 else " " * number): text for number, text in enumerate(says)}


def run_controls(
    options: ControlsOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
) -> ControlsSummary:
    """Write the controls' texts, score all, and compare. Raises the errors of `nla_engine.errors`."""
    phases = Phases(progress)
    phases.phase(LOADING)
    store = CaptureStore.open(options.store)
    check_table(options.out, options.explained, resume=options.resume, overwrite=options.overwrite)
    store.check_tokens("there is no text to compare with")
    texts = selected_texts(options, store)
    if "control" in texts.more.names:
        raise RequestError(
            f"{texts.path}: has a field control, as the table of controls has: give the explanations"
        )
    reading = reading_options(options, texts)
    pair = read_by(options, reading, announce)
    check_revision(options, texts, pair.ar.lm.revision)
    site = choose_layer(store, reading, pair)
    check_layer(texts, site, reading.ar)
    check_lengths(texts, pair.ar)
    texts = _with_direction(texts, store.layer(site).norm_at(texts.selected), announce)
    every = ControlTexts(options, store, texts)
    words, written = every.lengths()
    lm = None
    if every.has_reader:
        lm = _load_reader(options, store, texts, pair.device, pair.ar.lm.dtype)
        most = max(len(ids) for ids in lm.tokenizer(written, add_special_tokens=False)["input_ids"])
        every.read_with(Reader(lm, pair.ar.kernels, words, max(most, 1) + 8))
        if len(every.examples[0]) < options.reader_examples:
            announce(
                f"{lm.name}: is shown {len(every.examples[0])} of {options.reader_examples} examples, for which there "
                "is room and enough sequences"
            )
    phases.phase(PREPARING)
    longest = max(*pair.ar.prompt_sizes(written), 0)
    pair.ar.prepare(longest)
    sample = draw_rows(texts.selected, CONTROL_ROWS, options.seed)
    chosen = Chosen(iter([texts.selected]), sample, texts.selected)
    controls = controls_of(store, site, sample, reading, pair, announce)
    run = _ControlsRun(reading, store, site, pair, chosen, every, controls, options, lm)
    seconds, _ = run.finish(announce, phases)
    return summarise_controls(options.out, seconds)


def summarise_controls(out: Path, seconds: dict[str, float]) -> ControlsSummary:
    """The summary of a finished table, from its file. seconds: of each phase of this run."""
    made = read_metadata(out)
    return ControlsSummary(
        out=str(out),
        layer=made["layer"],
        variance=float(made["variance"]),
        reader=made.get("reader"),
        added=Added.read(out),
        seconds=round(sum(seconds.values()), 3),
        seconds_by_phase=dict(seconds),
    )


@dataclass(frozen=True)
class _ControlsRun(Run):
    """asked: the options of the command; `options` are those with which `score` would read the texts."""

    asked: ControlsOptions
    reader: LanguageModel | None

    @property
    def every(self) -> ControlTexts:
        assert isinstance(self.texts, ControlTexts)
        return self.texts

    def schema(self) -> pa.Schema:
        return pa.schema([*super().schema(), *FURTHER])

    def identity(self) -> dict[str, Any]:
        given = self.asked.to_dict()
        names = ("last_k", "reader_context", "reader_examples") if self.reader else ("last_k",)
        return (
            super().identity()
            | {name: _plain(given[name]) for name in names}
            | {
                "texts": self.every.texts.fingerprint(),
                "reader": None if self.reader is None else self.reader.fingerprint(),
                "controls_of": CONTROLS,
            }
        )

    def _metadata(self) -> dict[str, Any]:
        as_read = self.options.to_dict()
        told = {name: as_read[name] for name in ("ar", *AR_AS_GIVEN)}
        reader = self.reader
        return {
            **describe_run(),
            "made_by": CONTROLS,
            OF_CONTROLS: True,
            "run": self.asked.to_dict() | told,
            **self.every.texts.written_by(),
            **self.pair.describe(),
            "reader": None if reader is None else reader.name,
            "reader_revision": None if reader is None else reader.revision,
            "reader_examples": len(self.every.examples[0]),
            "layer": self.layer.key,
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _with_direction(texts: TextFile, norms: np.ndarray, announce: Announce) -> TextFile:
    """The texts of rows that have a direction. RequestError if there are none."""
    sound = np.isfinite(norms) & (norms > 0)
    if not sound.any():
        raise RequestError(f"{texts.path}: none of its rows has a direction: there is nothing to compare")
    if not sound.all():
        announce(f"{int((~sound).sum()):,} rows without a direction are left out")
        texts = texts.only(texts.selected[sound])
    return texts


def _load_reader(
    options: ControlsOptions, store: CaptureStore, texts: TextFile, device: Any, dtype: Any
) -> LanguageModel:
    """The reader: the model that the options name, or else the AV's base, or the captured model."""
    name = options.reader or (texts.metadata or {}).get("av_base") or store.provenance.get("model")
    if name is None:
        raise RequestError(
            f"{store.path}: names no model that could read the text: give --reader, or --reader none"
        )
    try:
        return load_captured(
            str(name),
            store.provenance,
            device,
            base=options.reader_base,
            dtype=dtype,
            remote_code=options.trust_remote_code,
        )
    except CheckpointError as error:
        if options.reader is not None:
            raise
        raise CheckpointError(
            f"{error}: name the model that reads the text with --reader, or none"
        ) from error
