"""explain: any vectors into words, and back. Nothing is written; `run_roundtrip` is for many rows of a store."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_engine.cli.output import say
from nla_engine.cli.progress import progress_bar
from nla_engine.config import ExplainOptions, RoundtripOptions, ScoreOptions, WritingOptions
from nla_engine.errors import RequestError
from nla_engine.interactive.capture import GIVEN
from nla_engine.interactive.explanations import Explanations
from nla_engine.interactive.given import options_from
from nla_engine.interactive.vectors import ArrayRows, Scores, as_vectors
from nla_engine.interactive.words import in_python, python_words
from nla_engine.progress import Progress
from nla_engine.provenance import describe_run
from nla_engine.roundtrip.draws import of_rows
from nla_engine.roundtrip.pair import Pair, load_pair
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.score import DirectionVariance
from nla_engine.roundtrip.summary import EXPLAINING, LOADING, SCORING
from nla_engine.roundtrip.texts import NONFINITE, ZERO, Written
from nla_engine.roundtrip.variance import layer_variance
from nla_engine.roundtrip.verbalize import Explanation, Verbalizer
from nla_engine.store import LayerReader

Name = str | os.PathLike[str]
#: Options of stage 2 that name a store's rows or a table: there is neither here.
_ELSEWHERE = (
    "store",
    "out",
    "layer",
    "site",
    "where",
    "limit",
    "follow",
    "resume",
    "overwrite",
    "dry_run",
    "gpus",
    "workers",
    "texts",
    "av",
    "ar",
)
#: What stands in their place. Neither is opened.
_NOTHING: dict[str, Any] = {"store": "vectors", "out": Path("vectors.parquet")}
_TEXTS_AT_ONCE = 512


@python_words()
def explain(
    vectors: Any,
    av: Name | Verbalizer,
    ar: Name | Reconstructor | None = None,
    *,
    variance: Any = None,
    quiet: bool = False,
    **options: Any,
) -> Explanations:
    """Explain vectors with an AV, and with an AR read the texts back and score them.

    vectors: floating-point [d] or [n, d] of numpy or torch, of any origin: rows of a layer, a difference of means
    av, ar: directories, Hub ids, or loaded models (`load_av`, `load_ar`), which several calls can share
    variance: Var for fve, or what to measure it on: a store's layer, or vectors [n, d]; None: there is no fve
    quiet: neither messages nor progress on stderr
    options: others of `roundtrip` (without an AR, of `explain`) by name: samples=4, temperature=0.7, device="cuda"
    Raises the errors of `nla_engine.errors`, with the messages of the command, which name arguments here.
    """
    array = as_vectors(vectors)
    given = {**options, "av": _name(av)}
    kind: type[WritingOptions] = ExplainOptions
    if ar is not None:
        kind, given["ar"] = RoundtripOptions, _name(ar)
        if isinstance(variance, Real):
            given["variance"] = float(variance)
    asked = _options(kind, given, "explain", av, ar)
    announce: Callable[[str], None] = _silent if quiet else _say
    with nullcontext(Progress()) if quiet else progress_bar("explanations") as progress:
        progress.phase(LOADING)
        pair = load_pair(asked, announce, _loaded(av, Verbalizer), _loaded(ar, Reconstructor))
        layer = _check_pair(asked, pair, array.shape[1])
        with closing(pair):
            progress.phase(EXPLAINING, "explanations")
            said = _written(asked, pair, array, progress)
            progress.phase(SCORING, "texts")
            read = None if ar is None else _read(pair, said, array.shape[1], progress)
    var, var_rows = _variance(None if read is None else variance, asked.seed, pair.device)
    number = np.repeat(np.arange(len(array)), asked.samples)
    return Explanations(
        vectors=array,
        vector=number,
        sample=np.array([each.id % asked.samples for each in said]),
        texts=[each.text for each in said],
        statuses=[each.status for each in said],
        n_tokens=np.array([each.n_tokens for each in said]),
        reconstructions=read,
        scores=None
        if read is None
        else Scores.of(array[number], number, np.zeros_like(number), read, asked.seed),
        variance=var,
        variance_rows=var_rows,
        layer=layer,
        about=_about(asked, pair),
    )


@python_words()
def load_av(name: Name, **options: Any) -> Verbalizer:
    """Load an AV once, for several calls of `explain`. options: those of `explain` that say how, as device="cuda"."""
    asked = _options(ExplainOptions, {**options, "av": os.fspath(name)}, "load_av")
    return load_pair(asked, _say).av


@python_words()
def load_ar(name: Name, **options: Any) -> Reconstructor:
    """Load an AR once. options: those of `score` that say how."""
    asked = _options(ScoreOptions, {**options, "ar": os.fspath(name), "texts": Path("vectors")}, "load_ar")
    return load_pair(asked, _say).ar


def _options(kind: Any, given: dict[str, Any], what: str, *models: Any) -> Any:
    """The options of a call. Where they are left open, they are those that loaded models have."""
    for model in models:
        if isinstance(model, Verbalizer | Reconstructor):
            given = {
                "device": model.lm.device,
                "kernels": model.kernels.name,
                "precision": model.kernels.precision,
                **given,
            }
    if isinstance(scale := given.get("injection_scale"), Real) and not isinstance(scale, bool):
        given = {**given, "injection_scale": str(scale)}
    known = [each.name for each in fields(kind) if each.name not in _ELSEWHERE]
    for name in given:
        if name in _ELSEWHERE and name not in ("av", "ar", "texts"):
            raise RequestError(f"{name} is no option of {what}, which reads no store and writes no table")
    return options_from(kind, _NOTHING | given, what=what, known=known)


def _name(model: Any) -> str:
    return model.lm.name if isinstance(model, Verbalizer | Reconstructor) else os.fspath(model)


def _loaded(model: Any, kind: type) -> Any:
    """The model, if it is loaded. RequestError if it is loaded and not of this kind."""
    if isinstance(model, Verbalizer | Reconstructor) and not isinstance(model, kind):
        raise RequestError(
            f"{model.lm.name} is a {type(model).__name__}, not a {kind.__name__}: av and ar are swapped"
        )
    return model if isinstance(model, kind) else None


def _check_pair(asked: WritingOptions, pair: Pair, width: int) -> int | None:
    """The layer that the models were made for. RequestError if they fit neither the vectors nor each other."""
    models: list[tuple[str, Verbalizer | Reconstructor]] = [(f"--av {asked.av}", pair.av)]
    if isinstance(asked, RoundtripOptions):
        models.append((f"--ar {asked.ar}", pair.ar))
    for name, model in models:
        if model.sidecar.d_model != width:
            raise RequestError(
                f"{name} is made for vectors of width {model.sidecar.d_model}, these have width {width}"
            )
    if asked.max_new_tokens > (room := pair.av.room):
        raise RequestError(
            f"--max-new-tokens is {asked.max_new_tokens}: {asked.av} has room for {room}: lower it"
        )
    layer = pair.av.sidecar.layer
    if isinstance(asked, RoundtripOptions):
        if layer is not None and layer != pair.ar.layer:
            raise RequestError(
                f"--av {asked.av} reads layer {layer}, --ar {asked.ar} gives layer {pair.ar.layer}: they are no pair"
            )
        layer = pair.ar.layer
    return layer


def _written(
    asked: WritingOptions, pair: Pair, array: np.ndarray, progress: Callable[[int, int], None]
) -> list[Explanation]:
    """The texts of every vector, in order."""
    pair.verbalize_next()
    said: list[Explanation] = []
    texts = Written(asked, pair.av, pair.device, lambda rows: of_rows(rows, np.zeros_like(rows)))
    with closing(texts.of_rows(ArrayRows(array), np.arange(len(array)), 0)) as written:
        for each in written:
            said += each
            progress(len(said), len(array) * asked.samples)
    return said


def _read(pair: Pair, said: list[Explanation], width: int, progress: Progress) -> np.ndarray:
    """The reconstructions of the texts, float32 [m, d], NaN for those without a text."""
    pair.reconstruct_next()
    sound = [place for place, each in enumerate(said) if each.status not in (ZERO, NONFINITE)]
    read = np.full((len(said), width), np.nan, np.float32)
    for start in range(0, len(sound), _TEXTS_AT_ONCE):
        part = sound[start : start + _TEXTS_AT_ONCE]
        read[part] = pair.ar.reconstruct([said[place].text for place in part]).cpu().numpy()
        progress(min(start + _TEXTS_AT_ONCE, len(sound)), len(sound))
    return read


def _variance(given: Any, seed: int, device: torch.device) -> tuple[float | None, int]:
    """Var as given, or measured; and on how many vectors, 0 if it was given."""
    if given is None or isinstance(given, Real):
        return None if given is None else float(given), 0
    if isinstance(given, LayerReader):
        measured = layer_variance(given, seed, device)
    else:
        measured = DirectionVariance()
        measured.add(torch.from_numpy(as_vectors(given)))
    return measured.value, measured.rows


def _about(asked: WritingOptions, pair: Pair) -> dict[str, Any]:
    """Models and options, by the names that the table of a round trip has."""
    return {**describe_run(), "run": asked.to_dict() | {"where": GIVEN, "limit": None}, **pair.describe()}


def _say(text: str) -> None:
    say(in_python(text))


def _silent(*_: Any) -> None:
    pass
