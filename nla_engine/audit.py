"""Does a store hold what it says? Re-reads a sample of its sequences with plain transformers and compares every row.

Independent of the engine: one sequence at a time, no slots, no kernels of this package. Knows nothing of checksums
(`nla_engine.store.verify`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nla_engine.errors import StoreError
from nla_engine.models import LanguageModel
from nla_engine.score import draw_rows
from nla_engine.store import CaptureStore
from nla_engine.store.format import IMPORTED
from nla_engine.store.verify import Check

#: Relative L2 error of a row that is allowed beside the codec's own: batching changes the order of sums.
ROUNDING = {"float32": 0.005, "bfloat16": 0.08}
#: Worst relative L2 error of a row that each codec is held to; measured ones lie well below.
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
    """Checks of weights and tokenizer; for each layer, of its rows against that block's output and its neighbours'.

    sample: sequences to read again, at most. Raises StoreError if the store was imported, or the model's width or depth
    cannot be its own.
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
    for done, number in enumerate(chosen, 1):
        _compare(store, lm, int(number), errors)
        progress(done, len(chosen))
    limit = CODEC_LIMIT[store.codec.name] + ROUNDING.get(str(store.provenance.get("dtype")), 0.08)
    for layer, by_offset in errors.items():
        own = np.concatenate(by_offset[0]) if by_offset[0] else np.zeros(0)
        detail = (
            f"{len(own):,} rows of {len(chosen)} sequences, relative error {_spread(own)}, limit {limit:.3g}"
        )
        checks.append(
            Check(f"layer {layer}: rows are the output of block {layer}", bool((own <= limit).all()), detail)
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


def _spread(errors: np.ndarray) -> str:
    if not len(errors):
        return "-"
    return f"median {np.median(errors):.2g}, worst {errors.max():.2g}"


@torch.inference_mode()
def _compare(
    store: CaptureStore, lm: LanguageModel, number: int, errors: dict[int, dict[int, list[np.ndarray]]]
) -> None:
    """Append the relative L2 errors of one sequence's finite rows, against block layer + offset for each offset."""
    sequence = store.sequence(number)
    if sequence.rows.stop == sequence.rows.start:
        return
    outputs: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, out, k=k: outputs.update({k: out[0] if isinstance(out, tuple) else out})
        )
        for k, block in enumerate(lm.blocks)
    ]
    try:
        lm.model.set_attn_implementation("eager")
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None].to(lm.device)
        lm.decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    position = torch.from_numpy(store.column("position")[sequence.rows].astype(np.int64))
    for layer, by_offset in errors.items():
        stored = store.layer(layer)[sequence.rows].astype(np.float64)
        finite = np.isfinite(stored).all(1)
        for offset, found in by_offset.items():
            if (output := outputs.get(layer + offset)) is not None:
                true = output[0][position.to(output.device)].double().cpu().numpy()
                scale = np.linalg.norm(true[finite], axis=1)
                found.append(
                    np.linalg.norm(stored[finite] - true[finite], axis=1) / np.where(scale > 0, scale, 1)
                )
