"""A run in plain words: its figures with their controls, its warnings, and where it comes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_engine.report.data import RELEASED, Explained, positions_known
from nla_engine.report.models import further_layers, injection_of, made_of, named, otherwise, short_name
from nla_engine.sites import PARTS, RESID_POST, Site
from nla_engine.store import CaptureStore, RowFlag
from nla_engine.store.format import flagged

#: The mean FVE should be at least this much above that of the shuffled control.
CLEAR_OF_CONTROL = 0.2
#: What cuts the softmax before a token is sampled, in this order. Older tables lack them.
_CUTS = ("top_k", "top_p", "min_p")
#: A mean over fewer explanations is said to be one over few; `charts.js` draws nothing of so few.
FEWEST = 10


@dataclass(frozen=True)
class Figure:
    """One number of the run, as text. label: its name; says: what it means; control: the same by chance."""

    label: str
    value: str
    says: str
    control: str = ""


def figures(explained: Explained) -> list[Figure]:
    """The figures at the top: FVE, cos and retrieval if there are scores, and what is known of the texts themselves."""
    return (_score_figures(explained) if explained.scored else []) + _text_figures(explained)


def _text_figures(explained: Explained) -> list[Figure]:
    if explained.written_by is None:
        return []
    columns, total = explained.columns, _count(explained.explanations, explained.noun)
    out = [
        Figure(
            "finished",
            _percent(_how_many(columns["status"] == "ok"), explained.explanations),
            f"of {total} were written to their end",
        )
    ]
    if not explained.scored:
        out.append(Figure("length", f"{_mean(columns['n_tokens']):,.0f}", f"tokens, the mean of {total}"))
    return out


def _score_figures(explained: Explained) -> list[Figure]:
    columns = explained.columns
    rank = columns["retrieval_rank"][np.isfinite(columns["retrieval_rank"])]
    among = explained.ranked_among
    return [
        Figure(
            "FVE",
            _score(explained.fve, 2),
            _says(_mean(explained.fve)),
            f"{_score(explained.fve_shuffled, 2)} when compared with another row\u2019s vector",
        ),
        Figure(
            "cos",
            _score(columns["cos"]),
            "between a vector and its reconstruction",
            f"{_score(columns['cos_shuffled'])} when compared with another row\u2019s vector",
        ),
        Figure(
            "retrieval",
            _percent(_how_many(rank == 1), len(rank)),
            "of reconstructions are nearest to their own vector",
            f"{_percent(1, among)} by chance, among {among:,} vectors",
        ),
    ]


def _says(fve: float) -> str:
    """What a mean FVE means. A share of the variance is told only where there is one."""
    if math.isnan(fve):
        return "no vector has a direction, so nothing could be scored"
    if fve >= 0:
        return "of 1: the part of the vectors\u2019 variance that came back through the words"
    return "below 0: the vectors rebuilt from the words are further off than their mean would be"


def lead(store: CaptureStore, explained: Explained) -> str:
    """Two or three sentences: what was explained, and by which AV and AR."""
    metadata, samples = explained.metadata, int(np.diff(explained.start).max())
    sequences = len(np.unique(store.column("sequence")[explained.rows]))
    times = "" if samples == 1 else f", {samples} times each"
    if explained.asked:
        return _asked_lead(store, explained)
    if explained.written_by is None:
        words = f"Their texts come from {short_name(metadata['run']['texts'])}"
    else:
        words = f"The AV {short_name(metadata['av'])} put each into words{times}"
    if explained.scored:
        words += f"; the AR {short_name(metadata['ar'])} read the words alone and rebuilt the activation."
    else:
        words += ". Nothing was scored: no AR has read the words."
    return (
        f"{_count(len(explained.rows), 'activation')} of {explained.site.label} of "
        f"{short_name(store.provenance.get('model', 'an unnamed model'))}, from {_count(sequences, 'sequence')}. "
        + words
    )


def _asked_lead(store: CaptureStore, explained: Explained) -> str:
    columns, metadata = explained.columns, explained.metadata
    rows = np.unique(np.concatenate(columns["rows"]))
    sequences = len(np.unique(store.column("sequence")[rows]))
    questions = len(set(columns["question"].tolist()))
    return (
        f"{_count(len(rows), 'activation')} of {explained.site.label} of "
        f"{short_name(store.provenance.get('model', 'an unnamed model'))}, from {_count(sequences, 'sequence')}. "
        f"The oracle {short_name(metadata['oracle'])} read them and answered {_count(questions, 'question')}. "
        "Nothing was scored: no answer was checked."
    )


def warnings(store: CaptureStore, explained: Explained) -> list[str]:
    """What to keep in mind while reading, as `name, how many: what it means`; the most serious first."""
    out = []
    if not store.complete:
        out.append(
            "Unfinished capture: it was still running when this page was made, and the store may hold only a part."
        )
    if not explained.scored:
        unread = "no answer was checked" if explained.asked else "no AR has read these texts"
        out.append(f"Nothing was scored: {unread}. A fluent text can be wrong; nothing here says which is.")
    if explained.explanations < FEWEST:
        out.append(
            f"Few cases, only {_count(explained.explanations, explained.noun)}: a mean over so few says little of "
            "others."
        )
    fve, control = _mean(explained.fve), _mean(explained.fve_shuffled)
    if math.isfinite(fve) and math.isfinite(control) and fve < control + CLEAR_OF_CONTROL:
        out.append(
            f"Close to the control: mean FVE is {fve:.2f}, and {control:.2f} against the vector of another row. These "
            "explanations say little about the row that they were written for."
        )
    total = explained.explanations
    if count := _how_many(explained.fve < 0):
        out.append(
            f"FVE below 0, {_part(count, total, 'explanation')}: worse than always answering with the mean vector. "
            "Such a text can read as fluently as any other. Its token is underlined with dashes."
        )
    out += _row_warnings(store, explained)
    out += _status_warnings(explained, total)
    if explained.metadata["run"].get("variance") is not None:
        out.append(
            f"Var was given: FVE is scaled by {explained.variance:.4g}, which was not measured on these activations."
        )
    return out


def _row_warnings(store: CaptureStore, explained: Explained) -> list[str]:
    out = []
    flags = store.column("flags")[explained.rows]
    rows, site = len(explained.rows), explained.site
    position = store.column("position")[explained.rows]
    known = explained.trained_from
    below = explained.early_before
    pairs = not explained.asked  # what follows is known of released pairs, not of oracles
    if pairs and positions_known(store) and (count := _how_many(position < below)):
        kind = "scores" if explained.scored else "texts"
        out.append(
            f"Early positions, {_part(count, rows, 'row')}: "
            + (
                f"these lie before position {below}. Whether this pair was trained on such rows is not known; the "
                f"released pairs ({RELEASED}...) were not, and their {kind} say less there."
                if known is None
                else f"this pair was not trained on positions before {below}, and its {kind} say less there."
            )
        )
    if pairs and (count := _how_many(flagged(flags, RowFlag.SINK))):
        limit = store.sink_norm[site]
        out.append(
            f"Attention sinks, {_part(count, rows, 'row')}: a norm far above the ordinary (above {limit:.4g} in "
            f"{site.label}, or that of another layer). They can outweigh all others in a mean: take means without "
            "them, too."
        )
    if count := _how_many(flagged(flags, RowFlag.NONFINITE)):
        out.append(
            f"NaN or Inf, {_part(count, rows, 'row')}: in some layer the model itself went wrong there."
        )
    return out


def _status_warnings(explained: Explained, total: int) -> list[str]:
    status = Counter(explained.columns["status"].tolist())
    out = []
    if count := status["unclosed"]:
        limit = (explained.written_by or {})["max_new_tokens"]
        out.append(
            f"Cut off, {_part(count, total, explained.noun)}: not finished within the limit of {limit:,} tokens."
        )
    if count := status["untagged"]:
        out.append(
            f"No opening tag, {_part(count, total, 'explanation')}: the AV did not keep to its format; all of its text "
            "is shown."
        )
    if count := status["zero_vector"] + status["nonfinite_vector"]:
        do = "ask" if explained.asked else "explain"
        out.append(
            f"Nothing to {do}, {_part(count, total, explained.noun)}: a vector that is zero or not finite has no "
            "direction, so there is no text and no score."
        )
    return out


def _where(site: Site) -> str:
    if site.part == RESID_POST:
        return f"{site}: the output of that block, counted from 0"
    return f"{site}: {PARTS[site.part]}"


def facts(store: CaptureStore, explained: Explained) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (name, value) pairs: where the activations, the words and the scores come from."""
    captured = store.provenance
    asked: Mapping[str, Any] = captured.get("options", {})
    error = store.codec_error.get(explained.site)
    codec = store.codec.name
    if error:
        codec += f"; mean relative error {error['mean']:.2g}, worst {error['worst']:.2g}, on {error['rows']:,} rows"
    groups = {
        "Activations": [
            ("model", named(captured.get("model"), captured.get("revision"))),
            ("architecture", captured.get("architecture")),
            ("weights, tokenizer", f"{captured.get('weights', '-')}, {captured.get('tokenizer', '-')}"),
            ("layer", _where(explained.site)),
            ("width", f"{store.d_model:,}"),
            ("prompts", ", ".join(map(short_name, str(asked.get("prompts")).split(", ")))),
            ("positions", asked.get("positions")),
            ("sampling", captured.get("sampling")),
            ("store", f"{store.rows:,} rows, {store.sequences:,} sequences"),
            ("kept as", codec),
            ("computed in", f"{captured.get('dtype', '-')} on {captured.get('device', '-')}"),
            ("captured", captured.get("started")),
        ],
        "Words": _words(store, explained),
        "Scores": _scores(explained),
        "Software": [(name, str(number)) for name, number in explained.metadata["versions"].items()]
        + [("python", explained.metadata["python"])],
    }
    return {
        heading: [(name, str(value)) for name, value in pairs if value is not None]
        for heading, pairs in groups.items()
    }


def _words(store: CaptureStore, explained: Explained) -> list[tuple[str, Any]]:
    metadata, run, known = explained.metadata, explained.written_by, explained.trained_from
    if explained.asked:
        return _asked_words(store, explained)
    rows = f"{len(explained.rows):,} of {store.rows:,}"
    reader = metadata.get("ar")
    ar = ("AR (words to vector)", reader and short_name(reader))
    texts = metadata["run"].get("texts")
    source = ("texts from", texts and short_name(texts))
    if run is None:
        count = ("texts", f"{explained.explanations:,}")
        return [source, ar, *made_of(metadata, metadata["run"], "ar"), count, ("rows with a text", rows)]
    return [
        ("AV (vector to words)", short_name(metadata["av"])),
        *made_of(metadata, run, "av"),
        ar,
        *made_of(metadata, metadata["run"], "ar"),
        source,
        ("trained on", "not stated" if known is None else f"positions from {known} on"),
        ("injection", injection_of(metadata)),
        ("rows explained", rows),
        (
            "selected by",
            otherwise(run["where"], "all rows") + (f", at most {run['limit']:,}" if run["limit"] else ""),
        ),
        ("explanations per row", str(run["samples"])),
        ("sampling", _sampling(run)),
        ("longest explanation", f"{run['max_new_tokens']:,} tokens"),
        ("explained", run.get("started", metadata["started"])),
    ]


def _asked_words(store: CaptureStore, explained: Explained) -> list[tuple[str, Any]]:
    metadata, run = explained.metadata, explained.metadata["run"]
    rows = len(np.unique(np.concatenate(explained.columns["rows"])))
    file = run["questions"]
    if file is None:
        chosen = otherwise(run["where"], "all rows") + (
            f", at most {run['limit']:,} prompts" if run["limit"] else ""
        )
    else:
        chosen = short_name(file)
    return [
        ("oracle", named(metadata["oracle"], metadata["oracle_revision"])),
        *made_of(metadata, run, "oracle"),
        ("message", metadata["message"]),
        ("placeholder", repr(metadata["placeholder"])),
        ("injection", injection_of(metadata)),
        ("rows asked about", f"{rows:,} of {store.rows:,}"),
        ("selected by", chosen),
        ("rows per prompt", None if file else f"{run['rows_per_prompt']:,}, at most"),
        ("answers per prompt", str(run["samples"])),
        ("sampling", _sampling(run)),
        ("longest answer", f"{run['max_new_tokens']:,} tokens"),
        ("asked", metadata["started"]),
    ]


def _sampling(run: Mapping[str, Any]) -> str:
    if not run["temperature"]:
        return "greedy"
    cuts = "".join(f"{name.replace('_', '-')} {run[name]}, " for name in _CUTS if run.get(name) is not None)
    return f"temperature {run['temperature']:g}, {cuts}seed {run['seed']}"


def _scores(explained: Explained) -> list[tuple[str, Any]]:
    if not explained.scored:
        return [
            ("scores", f"none: {'no answer was checked' if explained.asked else 'no AR has read the words'}")
        ]
    return [
        ("FVE", "1 - 2 (1 - cos) / Var"),
        ("Var", _variance(explained)),
        (
            "shuffled control",
            "the same reconstruction against the vector of another row, if possible of another sequence",
        ),
        (
            "retrieval rank",
            f"rank of the row's own vector by cos, among {explained.ranked_among:,} distinct vectors",
        ),
        ("further layers", further_layers(explained.metadata)),
    ]


def _variance(explained: Explained) -> str:
    if explained.metadata["run"]["variance"] is not None:
        return f"{explained.variance:.4f}, given"
    rows, of = explained.metadata["variance_rows"], explained.metadata.get("variance_of", "rows of the store")
    return f"{explained.variance:.4f}, measured on {rows:,} {of}"


def _how_many(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _score(values: np.ndarray, digits: int = 3) -> str:
    mean = _mean(values)
    return f"{mean:.{digits}f}".replace("-", "\u2212") if math.isfinite(mean) else "-"


def _percent(part: int, whole: int) -> str:
    if not whole:
        return "-"
    share = 100 * part / whole
    if part in (0, whole):
        return f"{share:.0f}%"
    return "under 0.1%" if share < 0.1 else "over 99.9%" if share > 99.9 else f"{share:.1f}%"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _part(count: int, total: int, noun: str) -> str:
    """`12 of 340 rows (3.5%)`, or `All 340 rows`."""
    if count == total:
        return f"all {_count(total, noun)}" if total > 1 else f"the only {noun}"
    return f"{count:,} of {_count(total, noun)} ({_percent(count, total)})"
