"""The table of patch: what its columns are called, and its summary in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nla_engine.referee.control_texts import CONTROL, of_controls
from nla_engine.referee.intervals import UNKNOWN, Bootstrap, Estimate, in_words
from nla_engine.referee.measures import Measured
from nla_engine.referee.quantities import EXPLAINED, MEAN_VECTOR, losses_over, overall
from nla_engine.referee.variants import MEAN, RECONSTRUCTION, SHUFFLED, VARIANTS
from nla_engine.roundtrip.results import SCHEMA, batches, nullable, read_metadata

KL, TOP1, CHANGE, RECOVERED = "kl", "top1_same", "logprob_change", "loss_recovered"
#: Before the names of columns that are means over the later positions.
LATER = "later_"


def named(measure: str, variant: str, prefix: str = "") -> str:
    """The column of a measure: `kl` of the reconstruction, `kl_mean` of a control, `later_kl` behind the patch."""
    return prefix + measure + (f"_{variant}" if variant else "")


def schema_of(horizon: int) -> pa.Schema:
    """What the table holds besides the further fields of the texts."""
    own = [SCHEMA.field(name) for name in SCHEMA.names[: SCHEMA.names.index("best")]]
    own += [SCHEMA.field(name) for name in ("explanation", "status", "n_tokens", "cos")]
    for prefix in ("", LATER) if horizon else ("",):
        kinds = {KL: pa.float32(), TOP1: pa.float32() if prefix else pa.bool_(), CHANGE: pa.float32()}
        if prefix:
            own.append(pa.field("later_positions", pa.int32()))
        own += [pa.field(named(KL, variant, prefix), pa.float32()) for variant in VARIANTS]
        own.append(pa.field(prefix + RECOVERED, pa.float32()))
        for measure in (TOP1, CHANGE):
            own += [pa.field(named(measure, variant, prefix), kinds[measure]) for variant in VARIANTS]
    return pa.schema(own)


def columns_of(found: Mapping[str, Measured], positions: np.ndarray) -> dict[str, list[Any]]:
    """The columns of the measures. found: by variant, of n texts; rows of NaN for texts that were not patched.

    positions: int64 [n], how many later positions there are
    """
    out: dict[str, list[Any]] = {}
    horizon = found[RECONSTRUCTION].kl.shape[1] - 1
    for prefix in ("", LATER) if horizon else ("",):
        means: dict[str, np.ndarray] = {}
        for variant, measured in found.items():
            for measure in (KL, TOP1, CHANGE):
                values = getattr(measured, measure)
                means[named(measure, variant)] = _later(values, positions) if prefix else values[:, 0]
        kl, kl_mean = means[named(KL, RECONSTRUCTION)], means[named(KL, MEAN)]
        means[RECOVERED] = 1 - kl / np.where(kl_mean > 0, kl_mean, np.nan)
        for name, values in means.items():
            whole = name.startswith(TOP1) and not prefix
            out[prefix + name] = nullable(values, bool if whole else float)
    if horizon:
        out["later_positions"] = positions.tolist()
    return out


def _later(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 [n]: means over the first `positions` later ones of [n, 1 + h]; NaN values are left out."""
    values = values[:, 1:]
    held = (np.arange(values.shape[1]) < positions[:, None]) & ~np.isnan(values)
    count = held.sum(1)
    return np.where(count > 0, np.where(held, values, 0.0).sum(1) / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class PatchSummary:
    """The result in numbers; the keys are those of `--json`. Means over every patched text, each with its controls.

    loss_recovered: 1 - mean kl / mean kl_mean; loss_recovered_shuffled: the same of another row's reconstruction.
    loss_recovered_interval: [low, high]; loss_recovered_margin: [value, low, high] of the one minus the other.
    measures: by column; with a horizon those of the later positions too. rows_per_second: texts, AR included.
    controls: of a table of controls, whose other means are those of the explanations alone: by name; over_text:
    what is recovered over the best of them, [value, low, high], and its name. None of other tables.
    """

    out: str
    layer: int
    rows: int
    explanations: int
    patched: int
    norm: str
    horizon: int
    cos: float | None
    loss_recovered: float | None
    loss_recovered_interval: list[float | None]
    loss_recovered_shuffled: float | None
    loss_recovered_margin: list[float | None]
    over_text: tuple[list[float | None], str | None] | None
    measures: dict[str, float | None]
    status: dict[str, int]
    seconds: float
    seconds_by_phase: dict[str, float]
    rows_per_second: float
    controls: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        measures, over = facts.pop("measures"), facts.pop("over_text")
        if over is None:
            del facts["controls"]
        else:
            measures = {"loss_over_text": over[0], "best_control": over[1]} | measures
        after = list(facts).index("status")
        items = list(facts.items())
        return dict(items[:after]) | measures | dict(items[after:])

    def told(self) -> dict[str, Any]:
        """For people: a line for each control."""
        facts = self.to_dict()
        for name, found in facts.pop("controls", {}).items():
            over = found.pop("over")
            facts[name] = found | {"explanations over it": in_words(*over)}
        for name in ("loss_recovered_margin", "loss_over_text"):
            if name in facts:
                facts[name] = in_words(*facts[name])
        low, high = facts.pop("loss_recovered_interval")
        facts["loss_recovered"] = in_words(facts["loss_recovered"], low, high)
        return facts


def summarise(out: Path, seconds: Mapping[str, float], new_texts: int, working: float) -> PatchSummary:
    """The summary of a finished table, from its file. working: seconds in which the new texts were patched."""
    run = read_metadata(out)
    horizon = int(run["run"]["horizon"])
    prefixes = ("", LATER) if horizon else ("",)
    names = [
        named(m, variant, prefix) for prefix in prefixes for m in (KL, TOP1, CHANGE) for variant in VARIANTS
    ]
    more = [CONTROL] if of_controls(run) else []
    parts = list(batches(out, ["row", "sequence", "status", "cos", *names, *more]))
    data = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    controls: dict[str, dict[str, Any]] = {}
    draw, over_text = Bootstrap(int(run["run"]["seed"])), None
    if more:
        kinds = data[CONTROL].astype(str)
        over, over_text = _over(data, kinds, draw)
        for kind in dict.fromkeys(kinds.tolist()):
            if kind != EXPLAINED:
                of = {name: values[kinds == kind] for name, values in data.items()}
                controls[kind] = _of_kind(of) | {"over": over.get(kind, UNKNOWN).numbers()}
        data = {name: values[kinds == EXPLAINED] for name, values in data.items()}
    kl, mean, other = (data[named(KL, variant)].astype(np.float64) for variant in ("", MEAN, SHUFFLED))
    own, shuffled = (mean - kl, mean + 0 * kl), (mean - other, mean + 0 * kl)
    recovered = draw.ratio(*own, data["sequence"])
    margin = draw.ratio(*own, data["sequence"], minus=shuffled)
    means = {name: _mean(data[name]) for name in names}
    measures: dict[str, float | None] = {}
    for name in names:
        measures[name] = means[name]
        if name == named(KL, VARIANTS[-1], LATER):
            measures[LATER + RECOVERED] = _recovered(means, LATER, RECONSTRUCTION)
    return PatchSummary(
        out=str(out),
        layer=int(run["layer"]),
        rows=len(np.unique(data["row"])),
        explanations=len(data["row"]),
        patched=int(np.isfinite(data[KL].astype(np.float64)).sum()),
        norm=str(run["run"]["norm"]),
        horizon=horizon,
        cos=_mean(data["cos"]),
        loss_recovered=_recovered(means, "", RECONSTRUCTION),
        loss_recovered_interval=recovered.numbers()[1:],
        loss_recovered_shuffled=_recovered(means, "", SHUFFLED),
        loss_recovered_margin=margin.numbers(),
        over_text=over_text,
        measures=measures,
        status=dict(Counter(map(str, data["status"]))),
        seconds=round(sum(seconds.values()), 3),
        seconds_by_phase=dict(seconds),
        rows_per_second=round(new_texts / working, 2) if working else 0.0,
        controls=controls,
    )


def _over(
    data: Mapping[str, np.ndarray], control: np.ndarray, draw: Bootstrap
) -> tuple[dict[str, Estimate], tuple[list[float | None], str | None]]:
    """What the explanations recover over each control, by name; the same over the best of them, with its name."""
    rows, first, row = np.unique(data["row"], return_index=True, return_inverse=True)
    sequence = data["sequence"][first]
    kl, mean = (data[named(KL, variant)].astype(np.float64) for variant in ("", MEAN))
    found = losses_over(control, kl, mean, row.reshape(-1), len(rows), least=0.0)
    over = {name: draw.ratio(*pair, sequence) for name, pair in found.items()}
    fit = losses_over(control, kl, mean, row.reshape(-1), len(rows))
    if set(fit) <= {MEAN_VECTOR}:
        return over, (UNKNOWN.numbers(), None)
    top, bottom = (np.stack([pair[part] for pair in fit.values()]) for part in (0, 1))
    best = min(fit, key=lambda name: overall(*fit[name]))
    return over, (draw.least(top, sequence, bottom).numbers(), best)


def _of_kind(data: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """The means of the texts of one control."""
    names = [named(KL, RECONSTRUCTION), named(KL, MEAN), TOP1, CHANGE]
    means = {name: _mean(data[name]) for name in names}
    return {RECOVERED: _recovered(means, "", RECONSTRUCTION), **means}


def _recovered(means: Mapping[str, float | None], prefix: str, variant: str) -> float | None:
    kl, kl_mean = means[named(KL, variant, prefix)], means[named(KL, MEAN, prefix)]
    return round(1 - kl / kl_mean, 6) if kl is not None and kl_mean else None


def _mean(values: np.ndarray) -> float | None:
    values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    return float(f"{values.mean():.6g}") + 0.0 if len(values) else None  # no -0
