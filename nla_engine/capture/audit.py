"""Does a store hold what it says? Re-reads a sample of its sequences with plain transformers and compares every row.

Independent of the engine: one sequence at a time, no slots, no kernels of this package. Checksums are not checked here
but in `nla_engine.store.care.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from nla_engine.errors import StoreError
from nla_engine.models.alone import TIMES_NOISE, read_alone
from nla_engine.models.load import LanguageModel
from nla_engine.models.logits import logit_pieces
from nla_engine.models.places import Place, find_places
from nla_engine.ops.likelihood import likelihood
from nla_engine.sites import EMBEDDINGS, RESID_POST, Site
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import Check
from nla_engine.store.views.draw import draw_rows

#: Relative L2 error allowed per row, on top of the codec's own, by dtype: batching changes the order of sums.
ROUNDING = {"float32": 0.005, "bfloat16": 0.08}
#: Passes that measure a row's noise.
REDRAWN = 2
#: Most passes, where a row of a sequence is further off than that explains. A token that two experts suit almost alike
#: goes to one or the other as its router rounds, and two passes seldom show it. So a row is right too if it is as near
#: to what a further pass computes. That such a pass moves it as far is not enough: it may be wrong in another way.
MOST_REDRAWN = 24
#: Largest relative L2 error allowed per row, by codec; measured errors lie well below.
CODEC_LIMIT = {"int8": 0.03, "int4": 0.25, "bf16": 0.005}

#: Error allowed of a log-probability, on top of the same multiple of what rounding does to those of its row. Logits of
#: bfloat16 from 32 on are multiples of 0.25.
LOGPROB_ROUNDING = {"float32": 0.01, "bfloat16": 0.5}
#: Most bytes of logits, as float32, that lie in memory at once.
_LOGIT_BYTES = 64 << 20

#: progress(sequences done, sequences in all)
Progress = Callable[[int, int], None]


def audit(
    store: CaptureStore,
    lm: LanguageModel,
    *,
    sample: int = 32,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Check]:
    """Check weights and tokenizer, and each site's rows against what transformers computes there and in the blocks
    beside it.

    sample: most sequences to read again. Raises StoreError if the store was imported or has another width than the
    model, RequestError if the model lacks one of its layers.
    """
    store.check_tokens("no model can read them again")
    if lm.d_model != store.d_model:
        raise StoreError(
            f"{lm.name} has width {lm.d_model}, {store.path} holds rows of width {store.d_model}: give the model that "
            "was captured"
        )
    for site in store.sites:
        lm.check_layer(site.layer)
    described = lm.describe()
    checks = [
        Check(
            f"{key} {of} of the capture",
            described[key] == store.provenance.get(key),
            str(described[key]),
        )
        for key, of in (("weights", "are those"), ("tokenizer", "is that"))
    ]
    chosen = draw_rows(store.numbers, sample, seed)
    found = {site: _Found("relative error") for site in store.sites}
    beside: dict[Site, dict[int, list[np.ndarray]]] = {site: {-1: [], 1: []} for site in store.sites}
    told = _Found("error")
    places = _places(store, lm)
    limit = CODEC_LIMIT[store.codec.name] + ROUNDING.get(str(store.provenance.get("dtype")), 0.08)
    for done, number in enumerate(chosen, 1):
        _compare(store, lm, places, int(number), limit, found, beside, told)
        progress(done, len(chosen))
    if store.next_token is not None:
        fits, detail = told.check(len(chosen), _logprob_limit(store))
        checks.append(Check("next tokens have the model's log-probabilities", fits, detail))
    for site, of_site in found.items():
        fits, detail = of_site.check(len(chosen), limit)
        checks.append(Check(f"{site.label}: rows are {_named(site, site.layer)}", fits, detail))
        for offset, apart in beside[site].items():
            if apart:
                own, other = np.concatenate(of_site.errors), np.concatenate(apart)
                fits = bool(np.median(own) < np.median(other)) if len(own) else True
                name = f"{site.label}: rows fit block {site.layer} better than block {site.layer + offset}"
                checks.append(
                    Check(
                        name, fits, f"median error {np.median(other):.3g} there" if len(other) else "no rows"
                    )
                )
    return checks


@dataclass
class _Found:
    """Of all sequences: errors of rows, and how far rounding moves them, float64 [n] each. redrawn: how many rows are
    right only as a further pass computes them."""

    what: str
    errors: list[np.ndarray] = field(default_factory=list)
    noise: list[np.ndarray] = field(default_factory=list)
    redrawn: int = 0

    def add(self, rows: _Compared) -> None:
        self.errors.append(rows.error)
        self.noise.append(rows.noise)
        self.redrawn += rows.redrawn

    def check(self, sequences: int, limit: float) -> tuple[bool, str]:
        """Whether all rows are right, and the detail of that."""
        error, noise = (np.concatenate([np.zeros(0), *parts]) for parts in (self.errors, self.noise))
        allowed = limit + TIMES_NOISE * noise
        detail = (
            f"{len(error):,} rows of {sequences} sequences, {self.what} {_spread(error)}, limit {limit:.3g} and "
            f"{TIMES_NOISE:g} times what rounding does to a row ({_spread(noise)})"
        )
        if self.redrawn:
            detail += f"; right only if embeddings are changed by a rounding error: {self.redrawn:,} rows"
        if not (fits := bool((error <= allowed).all())):
            worst = int((error / allowed).argmax())
            detail += f"; one row errs by {error[worst]:.2g}, where {allowed[worst]:.2g} is allowed"
        return fits, detail


class _Compared:
    """What is stored of a sequence's rows, and what transformers computes, [n, k] each, in float64.

    apart: how far such rows lie apart, [n]; limit: of that, beside TIMES_NOISE times the noise
    """

    def __init__(
        self,
        stored: np.ndarray,
        true: np.ndarray,
        limit: float,
        apart: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        self.stored, self.true, self.limit, self.apart = stored, true, limit, apart
        self.error = apart(stored, true)
        self.noise = np.zeros(len(stored))
        self.redrawn = 0

    def wrong(self) -> np.ndarray:
        """bool [n]."""
        return ~(self.error <= self.limit + TIMES_NOISE * self.noise)

    def redraw(self, true: np.ndarray, further: bool) -> None:
        """true: what transformers computes with other roundings; further: after the first REDRAWN passes"""
        if not further:
            self.noise = np.maximum(self.noise, self.apart(true, self.true))
            return
        wrong = self.wrong()
        self.error[wrong] = np.minimum(self.error[wrong], self.apart(self.stored[wrong], true[wrong]))
        self.redrawn += int(wrong.sum() - self.wrong().sum())


def _logprob_limit(store: CaptureStore) -> float:
    return LOGPROB_ROUNDING.get(str(store.provenance.get("dtype")), max(LOGPROB_ROUNDING.values()))


def _named(site: Site, layer: int) -> str:
    if site.part == EMBEDDINGS:
        return "the input of block 0"
    return f"the {'output' if site.part == RESID_POST else site.part} of block {layer}"


def _beside(site: Site, offset: int) -> Site:
    """The same part of another block."""
    return Site(site.layer + offset, site.part)


def _places(store: CaptureStore, lm: LanguageModel) -> dict[Site, Place]:
    """Of each site, and of the same part of the blocks beside it. Embeddings have none beside them."""
    blocks = range(len(lm.blocks))
    inside = [site for site in store.sites if site.part != EMBEDDINGS]
    near = {_beside(site, offset) for site in inside for offset in (-1, 1)}
    return find_places(lm, {*store.sites, *(site for site in near if site.layer in blocks)})


def _spread(errors: np.ndarray) -> str:
    return f"median {np.median(errors):.2g}, worst {errors.max():.2g}" if len(errors) else "-"


@torch.inference_mode()
def _compare(
    store: CaptureStore,
    lm: LanguageModel,
    places: Mapping[Site, Place],
    number: int,
    limit: float,
    found: dict[Site, _Found],
    beside: dict[Site, dict[int, list[np.ndarray]]],
    told: _Found,
) -> None:
    """For one sequence, add its finite rows to what was found of each site, with errors relative to their norm, and the
    same errors against the blocks beside it. limit: of the former. told: of log-probabilities, if they are stored."""
    sequence = store.sequence(number)
    if sequence.rows.stop == sequence.rows.start:
        return
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None].to(lm.device)
    position = torch.from_numpy(store.column("position")[sequence.rows].astype(np.int64)).to(lm.device)
    outputs, final = read_alone(lm, places, ids)
    finite, rows = {}, {}
    for site in found:
        stored = store.layer(site)[sequence.rows].astype(np.float64)
        kept = finite[site] = np.isfinite(stored).all(1)
        rows[site] = _Compared(stored[kept], _rows(outputs[site], position)[kept], limit, _apart)
        for offset, errors in beside[site].items():
            if (other := _beside(site, offset)) in outputs:
                errors.append(_apart(stored[kept], _rows(outputs[other], position)[kept]))
    logprobs = None
    if store.next_token is not None:
        stored = _stored_logprobs(store, sequence.rows)
        known = np.isfinite(stored)
        some = known.any(1)
        true = np.where(known, _logprobs(store, lm, final, position, sequence.rows), 0)
        stored = np.where(known, stored, 0)
        logprobs = _Compared(stored[some], true[some], _logprob_limit(store), _most)
    every = [*rows.values(), *([logprobs] if logprobs else [])]
    for seed in range(1, MOST_REDRAWN + 1):
        further = seed > REDRAWN
        if further and not any(each.wrong().any() for each in every):
            break
        states, final = read_alone(lm, places, ids, seed)
        for site, kept in finite.items():
            rows[site].redraw(_rows(states[site], position)[kept], further)
        if logprobs:
            true = _logprobs(store, lm, final, position, sequence.rows)
            logprobs.redraw(np.where(known, true, 0)[some], further)
    for site, each in rows.items():
        found[site].add(each)
    if logprobs:
        told.add(logprobs)


def _stored_logprobs(store: CaptureStore, rows: slice) -> np.ndarray:
    """float64 [n, 1 + 2 K]: of the token that follows, NaN for none, and twice of the likeliest."""
    chosen = store.column("next_logprob")[rows, None]
    top = store.column("top_logprob")[rows] if store.next_token else chosen[:, :0]
    return np.concatenate([chosen, top, top], 1).astype(np.float64)


@torch.inference_mode()
def _logprobs(
    store: CaptureStore, lm: LanguageModel, states: torch.Tensor, position: torch.Tensor, rows: slice
) -> np.ndarray:
    """The same by the model, for its final states [1, T, d]: of the stored ids, then of its own likeliest.

    A likeliest token that the store lacks shows by the second alone.
    """
    top = store.next_token or 0
    ids = [store.column("next_token_id")[rows, None], *([store.column("top_id")[rows]] if top else [])]
    wanted = torch.from_numpy(np.concatenate(ids, 1).astype(np.int64)).to(states.device)
    found = []
    for part in logit_pieces(len(position), lm.vocab_size, _LOGIT_BYTES):
        logits, its = lm.logits(states[0][position[part]]), wanted[part]
        own = torch.stack([likelihood(logits, column, 0).chosen for column in its.T], 1)
        found.append(torch.cat([own, likelihood(logits, its[:, 0], top).top], 1))
    return torch.cat(found).double().cpu().numpy()


def _rows(output: torch.Tensor, position: torch.Tensor) -> np.ndarray:
    """The rows of states [1, T, d] at these positions [n], float64 [n, d]."""
    return output.reshape(-1, output.shape[-1])[position].double().cpu().numpy()


def _apart(rows: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Relative L2 differences, float64 [n]."""
    size = np.linalg.norm(true, axis=1)
    return np.linalg.norm(rows - true, axis=1) / np.where(size > 0, size, 1)


def _most(rows: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The largest difference in each row, float64 [n]."""
    return np.abs(rows - true).max(1, initial=0)
