"""Does a store hold what it says? Re-reads a sample of its sequences with plain transformers and compares every row.

Independent of the engine: one sequence at a time, no slots, no kernels of this package. Checksums are not checked here
but in `nla_engine.store.care.verify`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nla_engine.errors import StoreError
from nla_engine.models.decoder import block_output
from nla_engine.models.load import LanguageModel
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
#: Largest relative L2 error allowed per row, by codec; measured errors lie well below.
CODEC_LIMIT = {"int8": 0.03, "int4": 0.25, "bf16": 0.005}

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
    """Check weights and tokenizer, and each layer's rows against the outputs of its block and of the blocks beside it.

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
    for layer in store.layers:
        lm.check_layer(layer)
    described = lm.describe()
    checks = [
        Check(
            f"{key} are those of the capture",
            described[key] == store.provenance.get(key),
            str(described[key]),
        )
        for key in ("weights", "tokenizer")
    ]
    chosen = draw_rows(np.arange(store.sequences), sample, seed)
    errors: dict[int, dict[int, list[np.ndarray]]] = {layer: {-1: [], 0: [], 1: []} for layer in store.layers}
    noise: dict[int, list[np.ndarray]] = {layer: [] for layer in store.layers}
    for done, number in enumerate(chosen, 1):
        _compare(store, lm, int(number), errors, noise)
        progress(done, len(chosen))
    limit = CODEC_LIMIT[store.codec.name] + ROUNDING.get(str(store.provenance.get("dtype")), 0.08)
    for layer, by_offset in errors.items():
        own = np.concatenate(by_offset[0]) if by_offset[0] else np.zeros(0)
        allowed = limit + TIMES_NOISE * (np.concatenate(noise[layer]) if noise[layer] else own)
        detail = (
            f"{len(own):,} rows of {len(chosen)} sequences, relative error {_spread(own)}, limit {limit:.3g} and "
            f"{TIMES_NOISE:g} times what rounding does to a row ({_spread(allowed - limit, TIMES_NOISE)})"
        )
        if len(own) and not (own <= allowed).all():
            worst = int((own / allowed).argmax())
            detail += f"; one row errs by {own[worst]:.2g}, where {allowed[worst]:.2g} is allowed"
        checks.append(
            Check(
                f"layer {layer}: rows are the output of block {layer}", bool((own <= allowed).all()), detail
            )
        )
        for offset in (-1, 1):
            if by_offset[offset]:
                other = np.concatenate(by_offset[offset])
                fits = bool(np.median(own) < np.median(other)) if len(own) else True
                name = f"layer {layer}: rows fit block {layer} better than block {layer + offset}"
                checks.append(
                    Check(
                        name, fits, f"median error {np.median(other):.3g} there" if len(other) else "no rows"
                    )
                )
    return checks


def _spread(errors: np.ndarray, unit: float = 1.0) -> str:
    if not len(errors):
        return "-"
    return f"median {np.median(errors) / unit:.2g}, worst {errors.max() / unit:.2g}"


@torch.inference_mode()
def _compare(
    store: CaptureStore,
    lm: LanguageModel,
    number: int,
    errors: dict[int, dict[int, list[np.ndarray]]],
    noise: dict[int, list[np.ndarray]],
) -> None:
    """For one sequence, append the relative L2 errors of its finite rows against block layer + offset, for each offset,
    and how far rounding alone moves transformers' own rows."""
    sequence = store.sequence(number)
    if sequence.rows.stop == sequence.rows.start:
        return
    lm.model.set_attn_implementation("eager")
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None].to(lm.device)
    position = torch.from_numpy(store.column("position")[sequence.rows].astype(np.int64)).to(lm.device)
    outputs = _read(lm, ids)
    redrawn = [_read(lm, ids, seed) for seed in range(1, REDRAWN + 1)]
    for layer, by_offset in errors.items():
        stored = store.layer(layer)[sequence.rows].astype(np.float64)
        finite = np.isfinite(stored).all(1)
        for offset, found in by_offset.items():
            if layer + offset in outputs:
                found.append(_apart(stored[finite], _rows(outputs[layer + offset], position)[finite]))
        true = _rows(outputs[layer], position)[finite]
        moved = [_rows(other[layer], position)[finite] for other in redrawn]
        noise[layer].append(np.max([_apart(rows, true) for rows in moved], 0))


def _rows(output: torch.Tensor, position: torch.Tensor) -> np.ndarray:
    """The rows of a block's output [1, T, d] at these positions [n], float64 [n, d]."""
    return output[0][position].double().cpu().numpy()


def _apart(rows: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Relative L2 differences, float64 [n]."""
    size = np.linalg.norm(true, axis=1)
    return np.linalg.norm(rows - true, axis=1) / np.where(size > 0, size, 1)


def _read(lm: LanguageModel, ids: torch.Tensor, seed: int = 0) -> dict[int, torch.Tensor]:
    """The output [1, T, d] of every block. seed: if not 0, embeddings change by about half a unit in the last place."""
    outputs: dict[int, torch.Tensor] = {}

    def moved(_module: object, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        random = torch.Generator(embedded.device).manual_seed(seed)
        drawn = torch.randn(embedded.shape, generator=random, device=embedded.device)
        return (embedded.float() * (1 + torch.finfo(embedded.dtype).eps / 2 * drawn)).to(embedded.dtype)

    hooks = [
        block.register_forward_hook(lambda _m, _i, out, k=k: outputs.update({k: block_output(out)}))
        for k, block in enumerate(lm.blocks)
    ]
    if seed:
        hooks.append(lm.embedding.register_forward_hook(moved))
    try:
        lm.decoder(input_ids=ids, **lm.uncached)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
