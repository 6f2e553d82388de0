"""Stage 2: store -> AV -> text -> AR -> round-trip error -> Parquet. Streams; commits in chunks; resumable."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nla_engine import score
from nla_engine.config import RoundtripOptions
from nla_engine.engine.sampling import Sampling
from nla_engine.errors import RequestError, StoreError
from nla_engine.models import pick_device, pick_dtype
from nla_engine.provenance import describe_run
from nla_engine.reconstruct import Reconstructor
from nla_engine.results import ResultTable, batches, read_metadata
from nla_engine.score import Controls, DirectionVariance
from nla_engine.store import CaptureStore, RowFlag
from nla_engine.verbalize import Explanation, Verbalizer

#: Rows of the store that Var is measured on, and rows in the sample of the controls, at most.
VARIANCE_ROWS = 100_000
CONTROL_ROWS = 1024
#: Explanations scored and committed together.
CHUNK = 512
READ_AHEAD = 1024

#: progress(explanations done, explanations in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RoundtripSummary:
    """What came out; its keys are those of `--json`. Scores are means over every scored explanation.

    With several samples a row, the `_best` keys take the best of each row by cos.
    """

    out: str
    layer: int
    rows: int
    explanations: int
    cos: float | None
    cos_std: float | None
    mse_nrm: float | None
    fve_nrm: float | None
    fve_meannorm: float | None
    cos_best: float | None
    fve_nrm_best: float | None
    variance: float
    variance_rows: int
    cos_shuffled: float | None
    retrieval_top1: float | None
    retrieval_median: float | None
    retrieval_sample: int
    status: dict[str, int]
    status_ok: float
    n_tokens: float
    early_rows: int
    seconds: float
    rows_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_roundtrip(
    options: RoundtripOptions,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, total: None,
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
) -> RoundtripSummary:
    """Run stage 2. `verbalizer`, `reconstructor`: if they are loaded. Raises the errors of `nla_engine.errors`.

    rows: int64 [n] ascending row numbers, instead of what `where` and `limit` select.
    """
    store = CaptureStore.open(options.store)
    rows = select_rows(store, options) if rows is None else rows
    device = pick_device(options.device)
    load = {
        "device": device,
        "dtype": pick_dtype(options.dtype, device),
        "remote_code": options.trust_remote_code,
    }
    verbalizer = verbalizer or Verbalizer.load(options.av, **load)  # type: ignore[arg-type]
    reconstructor = reconstructor or Reconstructor.load(options.ar, kernels=options.kernels, **load)  # type: ignore[arg-type]
    layer = choose_layer(store, options, verbalizer, reconstructor)
    run = _Run(options, store, layer, rows, verbalizer, reconstructor)
    same = {
        key: options.to_dict()[key]
        for key in ("where", "limit", "samples", "temperature", "seed", "max_new_tokens")
    }
    same |= {
        "layer": layer,
        "rows": len(rows),
        "variance": options.variance,
        "base": store.provenance.get("weights"),
    }
    same |= {
        "store": store.attributes["store_id"],
        "selection": hashlib.sha256(rows.tobytes()).hexdigest()[:16],
    }
    same |= {"av": verbalizer.fingerprint(), "ar": reconstructor.fingerprint()}
    metadata = {
        **describe_run(),
        "run": options.to_dict(),
        "av": verbalizer.lm.name,
        "ar": reconstructor.lm.name,
        "injection_scale": verbalizer.sidecar.injection_scale,
        "layer": layer,
        "variance": run.variance,
        "variance_rows": run.variance_rows,
        "control_rows": len(run.controls.rows),
    }
    table = ResultTable.open(
        options.out, options=same, metadata=metadata, resume=options.resume, overwrite=options.overwrite
    )
    total = len(rows) * options.samples
    there = f" ({table.done:,} already there)" if table.done else ""
    announce(
        f"{len(rows):,} rows of layer {layer}, {options.samples} explanations each{there}; Var {run.variance:.4f}"
    )
    started, before = time.perf_counter(), table.done
    if not table.finished:
        with closing(reconstructor):
            for columns in run.scored(table.done):
                table.append(columns)
                progress(table.done, total)
        table.finish()
    seconds = time.perf_counter() - started
    return summarise(options, seconds, (table.done - before) / options.samples)


def select_rows(store: CaptureStore, options: RoundtripOptions) -> np.ndarray:
    """int64 [n]: the row numbers that `where` and `limit` leave, ascending. StoreError if there are none."""
    rows = np.arange(store.rows) if options.where is None else store.where(options.where)
    if not len(rows):
        what = (
            "holds no rows: nothing to explain"
            if options.where is None
            else f"has no row for --where {options.where!r}: widen it (docs/where.md says what there is)"
        )
        raise StoreError(f"{options.store}: {what}")
    if options.limit is not None and options.limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, options.limit).round().astype(np.int64)]
    return rows


def choose_layer(store: CaptureStore, options: RoundtripOptions, av: Verbalizer, ar: Reconstructor) -> int:
    """The layer to read, checked against the widths and layers of store, AV and AR."""
    for name, sidecar in (("--av " + options.av, av.sidecar), ("--ar " + options.ar, ar.sidecar)):
        if sidecar.d_model != store.d_model:
            raise RequestError(
                f"{name} is made for vectors of width {sidecar.d_model}, {options.store} holds {store.d_model}: "
                "give the AV and AR of the captured model"
            )
    trained = av.sidecar.layer
    if trained is not None and trained != ar.layer:
        raise RequestError(
            f"--av {options.av} reads layer {trained}, --ar {options.ar} gives layer {ar.layer}: they are no pair"
        )
    layer = options.layer if options.layer is not None else ar.layer
    if layer != ar.layer:
        raise RequestError(
            f"--layer {layer}: this AV and AR were made for layer {ar.layer}; leave --layer out"
        )
    if layer not in store.layers:
        held = ", ".join(map(str, store.layers))
        raise RequestError(
            f"{options.store} holds layer {held}, the AV and AR were made for layer {layer}: capture that one"
        )
    return layer


class _Run:
    """Streams explanations and scores of the selected rows."""

    def __init__(
        self,
        options: RoundtripOptions,
        store: CaptureStore,
        layer: int,
        rows: np.ndarray,
        verbalizer: Verbalizer,
        reconstructor: Reconstructor,
    ) -> None:
        self.options, self.store, self.rows = options, store, rows
        self.verbalizer, self.reconstructor = verbalizer, reconstructor
        self.reader = store.layer(layer)
        self.sequence = store.column("sequence")
        norm = self.reader.norm(0, store.rows)[rows]
        self.sound = np.isfinite(norm) & (norm > 0)
        self.norm = norm
        self.variance, self.variance_rows = self._variance()
        sample = rows if len(rows) <= CONTROL_ROWS else self._sample(rows, CONTROL_ROWS)
        self.controls = Controls.of(sample, self.sequence[sample], self.reader[sample], options.seed)

    def _sample(self, rows: np.ndarray, count: int) -> np.ndarray:
        return np.sort(np.random.default_rng(self.options.seed).choice(rows, count, replace=False))

    def _variance(self) -> tuple[float, int]:
        if self.options.variance is not None:
            return self.options.variance, 0
        every = np.arange(self.store.rows)
        rows = every if len(every) <= VARIANCE_ROWS else self._sample(every, VARIANCE_ROWS)
        variance = DirectionVariance()
        for start in range(0, len(rows), 4096):
            variance.add(self.reader[rows[start : start + 4096]])
        return variance.value, variance.rows

    def scored(self, done: int) -> Iterator[dict[str, Any]]:
        """Columns of CHUNK explanations at a time, from the `done`-th on, in the order of rows and samples."""
        samples = self.options.samples
        chunk: list[tuple[int, Explanation]] = []
        size = max(CHUNK // samples, 1) * samples  # the samples of a row stay together
        for entry in self._explanations(done // samples):
            chunk.append(entry)
            if len(chunk) == size:
                yield self._score(chunk)
                chunk = []
        if chunk:
            yield self._score(chunk)

    def _explanations(self, first: int) -> Iterator[tuple[int, Explanation]]:
        """(place in rows, explanation) in order. Vectors without a direction get a status instead of a text."""
        samples = self.options.samples
        places = np.flatnonzero(self.sound[first:]) + first
        written = self.verbalizer.explain(
            self._vectors(places),
            max_new_tokens=self.options.max_new_tokens,
            sampling=Sampling(self.options.temperature, self.options.seed),
            batch_size=self.options.batch_size,
            kernels=self.options.kernels,
        )
        with closing(written):
            for place in range(first, len(self.rows)):
                for sample in range(samples):
                    if self.sound[place]:
                        yield place, next(written)
                    else:
                        status = "zero_vector" if self.norm[place] == 0 else "nonfinite_vector"
                        yield place, Explanation(place * samples + sample, "", status, 0)

    def _vectors(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(places), READ_AHEAD):
            part = places[start : start + READ_AHEAD]
            for place, vector in zip(part, self.reader[self.rows[part]], strict=True):
                for sample in range(self.options.samples):
                    yield int(place) * self.options.samples + sample, vector

    def _score(self, chunk: list[tuple[int, Explanation]]) -> dict[str, Any]:
        store, options = self.store, self.options
        places = np.array([place for place, _ in chunk])
        rows = self.rows[places]
        written = [explanation for _, explanation in chunk]
        sound = self.sound[places]
        r = np.full((len(chunk), store.d_model), np.nan, np.float32)
        r[sound] = self.reconstructor.reconstruct([e.text for e, s in zip(written, sound, strict=True) if s])
        cos = score.cosine(self.reader[rows], r)
        mse = score.mse_nrm(cos)
        rank = self.controls.rank(rows, cos, r)
        flags = store.column("flags")[rows]
        best = np.zeros((len(chunk) // options.samples, options.samples), bool)
        ordered = np.where(np.isfinite(cos), cos, -2.0).reshape(best.shape)
        best[np.arange(len(best)), ordered.argmax(1)] = True
        return {
            "row": rows,
            "sequence": self.sequence[rows],
            "position": store.column("position")[rows],
            "token": store.token_text(store.column("token_id")[rows]),
            "next_token": store.token_text(store.column("next_token_id")[rows]),
            "generated": (flags & RowFlag.GENERATED) != 0,
            "early": (flags & RowFlag.EARLY) != 0,
            "norm": self.norm[places],
            "sample": [e.id % options.samples for e in written],
            "best": best.reshape(-1),
            "explanation": [e.text for e in written],
            "status": [e.status for e in written],
            "n_tokens": [e.n_tokens for e in written],
            "cos": _nullable(cos),
            "mse_nrm": _nullable(mse),
            "fve_nrm": _nullable(score.fve_nrm(mse, self.variance)),
            "fve_meannorm": _nullable(score.fve_meannorm(mse, self.variance)),
            "cos_shuffled": _nullable(self.controls.shuffled(rows, self.sequence[rows], r)),
            "retrieval_rank": [None if np.isnan(value) else int(value) for value in rank],
        }


def _nullable(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def summarise(options: RoundtripOptions, seconds: float = 0.0, new_rows: float = 0.0) -> RoundtripSummary:
    """The summary of a finished result, from its file alone (and this run's time)."""
    metadata = read_metadata(options.out)
    names = ["cos", "cos_shuffled", "retrieval_rank", "status", "n_tokens", "best", "early"]
    parts = list(batches(options.out, names))
    data = {name: np.concatenate([part[name] for part in parts]) for name in names}
    cos, variance = data["cos"].astype(np.float64), float(metadata["variance"])
    best, status = data["best"].astype(bool), Counter(map(str, data["status"]))
    mse = score.mse_nrm(cos)

    def mean(values: np.ndarray) -> float | None:
        values = values.astype(np.float64)
        values = values[np.isfinite(values)]
        return round(float(values.mean()), 6) if len(values) else None

    rank = data["retrieval_rank"].astype(np.float64)
    scored = rank[np.isfinite(rank)]
    return RoundtripSummary(
        out=str(options.out),
        layer=int(metadata["layer"]),
        rows=int(best.sum()),
        explanations=len(cos),
        cos=mean(cos),
        cos_std=round(float(np.nanstd(cos)), 6) if np.isfinite(cos).any() else None,
        mse_nrm=mean(mse),
        fve_nrm=mean(score.fve_nrm(mse, variance)),
        fve_meannorm=mean(score.fve_meannorm(mse, variance)),
        cos_best=mean(cos[best]),
        fve_nrm_best=mean(score.fve_nrm(mse[best], variance)),
        variance=round(variance, 6),
        variance_rows=int(metadata["variance_rows"]),
        cos_shuffled=mean(data["cos_shuffled"]),
        retrieval_top1=mean(scored == 1),
        retrieval_median=float(np.median(scored)) if len(scored) else None,
        retrieval_sample=int(metadata["control_rows"]),
        status=dict(status),
        status_ok=round(status["ok"] / len(cos), 6),
        n_tokens=mean(data["n_tokens"]) or 0.0,
        early_rows=int(data["early"][best].sum()),
        seconds=round(seconds, 3),
        rows_per_second=round(new_rows / seconds, 2) if seconds else 0.0,
    )
