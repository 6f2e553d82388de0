"""A card: one pair summed up from its tables, as JSON and Markdown, fit to stand beside a released checkpoint.

What was not measured is null, and "not measured" in the Markdown. A measure without its control is not printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.config import CardOptions
from nla_engine.errors import RequestError
from nla_engine.provenance import describe_run
from nla_engine.referee.evidence import Evidence
from nla_engine.referee.intervals import Bootstrap, Estimate
from nla_engine.referee.quantities import KIND_WORDS, MEASURES, controlled
from nla_engine.referee.reading import NOT_MEASURED, findings
from nla_engine.report.models import short_name
from nla_engine.store.directory import check_parents
from nla_engine.store.lease import Lease
from nla_engine.store.shards import write_file_atomically

FORMAT = 1
#: Measures of a card, in this order.
KEYS = (
    "fve",
    "cos",
    "fve_over_text",
    "loss_recovered",
    "loss_over_text",
    "top1_same",
    "retrieval_top1",
    "claims_true",
    *(f"claims_true_{kind}" for kind in KIND_WORDS),
    "facts_named",
    "samples_agree",
    "judged_true",
    "closed",
)
_SPEED = "vectors_per_second"


def run_card(options: CardOptions) -> dict[str, Any]:
    """Write the card and its Markdown; the card. Raises RequestError, WriteError."""
    out, words = options.out, options.out.with_suffix(".md")
    for path in (out, words):
        if path.is_dir() or (path.exists() and not options.overwrite):
            mend = "is a directory" if path.is_dir() else "exists: pass --overwrite to replace it"
            raise RequestError(f"{path}: {mend}")
    check_parents(out)
    paths = [Path(path) for given in options.tables for path in given.split(",")]
    card = make_card(Evidence.read(paths, paths[0].stem), options.seed)
    with Lease.beside(out):
        write_file_atomically(out, (json.dumps(card, indent=1, allow_nan=False) + "\n").encode())
        write_file_atomically(words, markdown(card).encode())
    return card


def make_card(pair: Evidence, seed: int = 0) -> dict[str, Any]:
    """The card of what is known of a pair, ready for JSON."""
    made = pair.given.get("scores") or pair.given.get("controls") or pair.metadata
    identity, run = made.get("options", {}), made.get("run", {})
    written = made.get("explained") or run
    sequence, draw = pair.rows["sequence"], Bootstrap(seed)
    known = {measure.key: quantity for measure, quantity in controlled(pair.quantities)}
    measures: dict[str, Any] = {}
    for key in KEYS:
        if (quantity := known.get(key)) is None:
            if key != "samples_agree" and not key.startswith("claims_true_"):  # not every run can have these
                measures[key] = None
            continue
        if MEASURES[key].share:
            own = draw.mean(quantity.values, sequence, binary=True)
        else:
            own = draw.ratio(quantity.top, quantity.bottom, sequence)
        entry: dict[str, Any] = {**_numbers(own), "rows": own.rows}
        if MEASURES[key].control and quantity.control is not None:
            control = _numbers(draw.ratio(*quantity.control, sequence))
            name = f"{MEASURES[key].control}: {quantity.of}" if quantity.of else MEASURES[key].control
            entry["control"] = {"is": name, **control}
        measures[key] = entry
    measures[_SPEED] = _speed(pair.given.get("scores") or {})
    reading = findings(pair.quantities, sequence, seed)
    return {
        "format": FORMAT,
        **{key: value for key, value in describe_run().items() if key != "command"},
        "pair": {
            role: None
            if made.get(role) is None
            else {
                "name": short_name(made[role]),
                "revision": made.get(f"{role}_revision"),
                "fingerprint": identity.get(role),
            }
            for role in ("av", "ar")
        },
        "captured_model": {
            "name": (pair.patch or {}).get("model") and short_name((pair.patch or {})["model"]),
            "weights": identity.get("base"),
        },
        "layer": pair.site.key,
        "computed": {name: run.get(name) for name in ("dtype", "precision")},
        "sampling": {
            name: written.get(name) for name in ("temperature", "samples", "seed", "max_new_tokens")
        },
        "rows": {
            "store_id": pair.store,
            "rows": pair.size,
            "sequences": len(np.unique(sequence)),
            "texts": sum(map(len, pair.texts)),
            "where": written.get("where"),
            "limit": written.get("limit"),
        },
        "variance": made.get("variance"),
        "measures": measures,
        "reading": [{"question": f.question, "verdict": f.verdict, "says": f.says} for f in reading],
        "tables": {
            name: {"made": table.get("started"), "versions": table.get("versions")}
            for name, table in pair.given.items()
        },
    }


def told(card: dict[str, Any]) -> dict[str, str]:
    """The card for a terminal: a measure and its control."""
    rows = card["rows"]
    return {
        "rows": f"{rows['rows']:,} of {rows['sequences']:,} sequences",
        **{_label(key): _shown(entry) for key, entry in card["measures"].items()},
        **{finding["question"]: finding["says"] for finding in card["reading"]},
    }


def markdown(card: dict[str, Any]) -> str:
    """The card as Markdown: what was measured, what it shows, on which rows, with which versions."""
    rows, pair = card["rows"], card["pair"]
    lines = ["# Card of a pair", ""]
    for role, says in (("av", "AV (vector to words)"), ("ar", "AR (words to vector)")):
        lines.append(f"- {says}: {_model(pair[role])}")
    captured = card["captured_model"]
    lines.append(
        f"- captured model: {_text(captured['name'])}, weights {_text(captured['weights'])}, layer {card['layer']}"
    )
    lines += [
        f"- rows: {rows['rows']:,} of {rows['sequences']:,} sequences, {rows['texts']:,} texts, store "
        f"{rows['store_id']}, selected by {_text(rows['where'], 'all rows')}",
        f"- computed in {_text(card['computed']['dtype'], 'the dtype of the device')}, precision "
        f"{_text(card['computed']['precision'], 'full')}",
        "",
        "| measure | value | control | rows |",
        "|---|---:|---|---:|",
    ]
    for key, entry in card["measures"].items():
        control = (entry or {}).get("control")
        beside = "" if control is None else f"{_value(control)} ({control['is']})"
        if key == _SPEED and entry:
            beside = f"{entry['of']} on {_text(entry['device'])}"
        count = f"{entry['rows']:,}" if entry and "rows" in entry else ""
        lines.append(f"| {_label(key)} | {_value(entry)} | {beside} | {count} |")
    lines += ["", "In brackets: 95% intervals by a bootstrap over sequences.", "", "## Reading", ""]
    lines += [f"- **{finding['question']}** {finding['says']}" for finding in card["reading"]]
    versions = ", ".join(f"{name} {number}" for name, number in card["versions"].items())
    lines += ["", f"Made {card['started']} with {versions}.", ""]
    return "\n".join(lines)


def _speed(made: dict[str, Any]) -> dict[str, Any] | None:
    """Vectors per second of a round trip, or of one half of it, and on what."""
    speed, models = made.get("speed") or {}, made.get("options", {})
    if not speed.get("rows_per_second"):
        return None
    halves = {"av": "AV", "ar": "AR"}
    ran = " and ".join(name for role, name in halves.items() if models.get(role)) or "AR"
    return {"value": speed["rows_per_second"], "device": speed["device"], "of": ran}


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    value, low, high = estimate.numbers()
    return {"value": value, "low": low, "high": high}


def _label(key: str) -> str:
    return "vectors a second" if key == _SPEED else MEASURES[key].label


def _shown(entry: dict[str, Any] | None) -> str:
    if entry is not None and "device" in entry:
        return f"{_value(entry)}   {entry['of']} on {entry['device']}"
    if entry is None or "control" not in entry:
        return _value(entry)
    return f"{_value(entry)}   control: {_value(entry['control'])} ({entry['control']['is']})"


def _value(entry: dict[str, Any] | None) -> str:
    """`0.919 [0.900, 0.937]`, or "not measured"."""
    if entry is None or entry["value"] is None:
        return NOT_MEASURED
    value = f"{entry['value']:.3f}"
    if entry.get("low") is not None:
        value += f" [{entry['low']:.3f}, {entry['high']:.3f}]"
    return value.replace("-", "\u2212")


def _model(model: dict[str, Any] | None) -> str:
    if model is None:
        return "not stated"
    revision = f" at {_text(model['revision'])}" if model["revision"] else ""
    return f"{_text(model['name'])}{revision}, fingerprint {_text(model['fingerprint'])}"


def _text(value: Any, otherwise: str = "not stated") -> str:
    """Text for one line of Markdown: no markup of the value's own."""
    if value is None:
        return otherwise
    plain = " ".join(str(value).split())
    return "".join("\\" + c if c in "\\`*_[]<>|#&" else c for c in plain)
