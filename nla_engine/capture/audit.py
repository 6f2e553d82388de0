"""Does a store hold what it says? Re-reads a sample of its sequences with plain transformers and compares every row.

Independent of the engine: one sequence at a time, no slots, no kernels of this package. Checksums are not checked here
but in `nla_engine.store.care.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from nla_engine.errors import StoreError
from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import Place, find_places
from nla_engine.ops.likelihood import likelihood
from nla_engine.sites import EMBEDDINGS, RESID_POST, Site
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import Check
from nla_engine.store.format import IMPORTED
from nla_engine.store.views.draw import draw_rows

#: Relative L2 error allowed per row, on top of the codec's own, by dtype: batching changes the order of sums.
ROUNDING = {"float32": 0.005, "bfloat16": 0.08}
#: Also allowed: this multiple of the row's own rounding noise. On some tokens a model is chaotic in any arithmetic.
TIMES_NOISE = 4.0
#: Passes that measure this noise: each perturbs the embeddings by a rounding error, which changes every later rounding.
REDRAWN = 2
#: Most passes, where a row of a sequence is further off than that explains. A token that two experts suit almost alike
#: goes to one or the other as its router rounds, and few passes may show it.
MOST_REDRAWN = 24
#: Largest relative L2 error allowed per row, by codec; measured errors lie well below.
CODEC_LIMIT = {"int8": 0.03, "int4": 0.25, "bf16": 0.005}

#: Error allowed of a log-probability, on top of the same multiple of what rounding does to those of its row. Logits of
#: bfloat16 from 32 on are multiples of 0.25.
LOGPROB_ROUNDING = {"float32": 0.01, "bfloat16": 0.5}
#: Most bytes of logits, as float32, that lie in memory at once.
_LOGIT_BYTES = 64 << 20
#: Key of what the decoder gives at last, beside the outputs of its blocks by number.
FINAL = -2

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
    if IMPORTED in store.options:
        raise StoreError(
            f"{store.path}: was imported: its tokens are not known, so no model can read them again"
        )
    if lm.d_model != store.d_model:
        raise StoreError(
            f"{lm.name} has width {lm.d_model}, {store.path} holds rows of width {store.d_model}"
        )
    for site in store.sites:
        lm.check_layer(site.layer)
    described = lm.describe()
    checks = [
        Check(
            f"{key} are those of the capture",
            described[key] == store.provenance.get(key),
            str(described[key]),
        )
        for key in ("weights", "tokenizer")
    ]
    chosen = draw_rows(store.numbers, sample, seed)
    errors: dict[Site, dict[int, list[np.ndarray]]] = {site: {-1: [], 0: [], 1: []} for site in store.sites}
    noise: dict[Site, list[np.ndarray]] = {site: [] for site in store.sites}
    told: dict[str, list[np.ndarray]] = {"error": [], "noise": []}
    places = _places(store, lm)
    limit = CODEC_LIMIT[store.codec.name] + ROUNDING.get(str(store.provenance.get("dtype")), 0.08)
    for done, number in enumerate(chosen, 1):
        _compare(store, lm, places, int(number), limit, errors, noise, told)
        progress(done, len(chosen))
    if store.next_token is not None:
        checks.append(_next_tokens_check(store, told, len(chosen)))
    for site, by_offset in errors.items():
        own = np.concatenate(by_offset[0]) if by_offset[0] else np.zeros(0)
        allowed = limit + TIMES_NOISE * (np.concatenate(noise[site]) if noise[site] else own)
        detail = (
            f"{len(own):,} rows of {len(chosen)} sequences, relative error {_spread(own)}, limit {limit:.3g} and "
            f"{TIMES_NOISE:g} times what rounding does to a row ({_spread(allowed - limit, TIMES_NOISE)})"
        )
        if len(own) and not (own <= allowed).all():
            worst = int((own / allowed).argmax())
            detail += f"; one row errs by {own[worst]:.2g}, where {allowed[worst]:.2g} is allowed"
        checks.append(
            Check(f"{site.label}: rows are {_named(site, site.layer)}", bool((own <= allowed).all()), detail)
        )
        for offset in (-1, 1):
            if by_offset[offset]:
                other = np.concatenate(by_offset[offset])
                fits = bool(np.median(own) < np.median(other)) if len(own) else True
                name = f"{site.label}: rows fit block {site.layer} better than block {site.layer + offset}"
                checks.append(
                    Check(
                        name, fits, f"median error {np.median(other):.3g} there" if len(other) else "no rows"
                    )
                )
    return checks


def _next_tokens_check(store: CaptureStore, told: dict[str, list[np.ndarray]], sequences: int) -> Check:
    """told: errors and noise of the log-probabilities of sequences, each float64 [n]."""
    error, noise = (np.concatenate([np.zeros(0), *told[name]]) for name in ("error", "noise"))
    limit = LOGPROB_ROUNDING.get(str(store.provenance.get("dtype")), max(LOGPROB_ROUNDING.values()))
    detail = (
        f"{len(error):,} of {sequences} sequences, error {_spread(error)}, limit {limit:.3g} and {TIMES_NOISE:g} times "
        "what rounding does"
    )
    fits = bool((error <= limit + TIMES_NOISE * noise).all())
    return Check("next tokens have the model's log-probabilities", fits, detail)


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


def _spread(errors: np.ndarray, unit: float = 1.0) -> str:
    if not len(errors):
        return "-"
    return f"median {np.median(errors) / unit:.2g}, worst {errors.max() / unit:.2g}"


@torch.inference_mode()
def _compare(
    store: CaptureStore,
    lm: LanguageModel,
    places: Mapping[Site, Place],
    number: int,
    limit: float,
    errors: dict[Site, dict[int, list[np.ndarray]]],
    noise: dict[Site, list[np.ndarray]],
    told: dict[str, list[np.ndarray]],
) -> None:
    """For one sequence, append the relative L2 errors of its finite rows against block layer + offset, for each offset,
    and how far rounding alone moves transformers' own rows. limit: what is allowed whatever that is. told: the same of
    log-probabilities, if they are stored."""
    sequence = store.sequence(number)
    if sequence.rows.stop == sequence.rows.start:
        return
    attend_by(lm.model, "eager")
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None].to(lm.device)
    position = torch.from_numpy(store.column("position")[sequence.rows].astype(np.int64)).to(lm.device)
    outputs, final = _read(lm, places, ids)
    # Of each site: which rows are finite, transformers' own rows, how far the stored ones are from them.
    kept, true, own = {}, {}, {}
    for site, by_offset in errors.items():
        stored = store.layer(site)[sequence.rows].astype(np.float64)
        finite = np.isfinite(stored).all(1)
        for offset, found in by_offset.items():
            if (other := _beside(site, offset)) in outputs:
                found.append(_apart(stored[finite], _rows(outputs[other], position)[finite]))
        kept[site], true[site], own[site] = finite, _rows(outputs[site], position)[finite], by_offset[0][-1]
    moved = {site: np.zeros(len(error)) for site, error in own.items()}
    finals = [final]
    for seed in range(1, MOST_REDRAWN + 1):
        if seed > REDRAWN and all((own[site] <= limit + TIMES_NOISE * moved[site]).all() for site in own):
            break
        states, final = _read(lm, places, ids, seed)
        for site, finite in kept.items():
            apart = _apart(_rows(states[site], position)[finite], true[site])
            moved[site] = np.maximum(moved[site], apart)
        finals.append(final)
    for site, most in moved.items():
        noise[site].append(most)
    if store.next_token is not None:
        stored = _stored_logprobs(store, sequence.rows)
        told_by = [_logprobs(store, lm, each, position, sequence.rows) for each in finals]
        known = np.isfinite(stored)
        told["error"].append(np.abs(told_by[0] - stored)[known])
        moved_by = np.max([np.where(known, np.abs(each - told_by[0]), 0) for each in told_by[1:]], 0)
        of_row = moved_by.max(1, keepdims=True)  # a single value may round to the same by chance
        told["noise"].append(np.broadcast_to(of_row, known.shape)[known])


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
    size = max(_LOGIT_BYTES // (4 * lm.vocab_size), 1)
    found = []
    for at, its in zip(position.split(size), wanted.split(size), strict=True):
        logits = lm.logits(states[0][at])
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


def _read(
    lm: LanguageModel, places: Mapping[Site, Place], ids: torch.Tensor, seed: int = 0
) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
    """The states [1, T, d] at every place, and the decoder's own.

    seed: if not 0, embeddings change by about half a unit in the last place
    """
    states: dict[Site, torch.Tensor] = {}

    def moved(_module: object, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        random = torch.Generator(embedded.device).manual_seed(seed)
        drawn = torch.randn(embedded.shape, generator=random, device=embedded.device)
        return (embedded.float() * (1 + torch.finfo(embedded.dtype).eps / 2 * drawn)).to(embedded.dtype)

    def keep(site: Site) -> Callable[[torch.Tensor], None]:
        return lambda hidden: states.update({site: hidden.clone()})  # some blocks change what they read

    hooks = [place.watch(keep(site)) for site, place in places.items()]
    if seed:
        hooks.append(lm.embedding.register_forward_hook(moved))
    try:
        final: torch.Tensor = lm.decoder(input_ids=ids, **lm.uncached).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return states, final
