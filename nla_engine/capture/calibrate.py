"""What capture measures before it writes: the norm above which a row is a sink, and the codec's error on other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.capture.tap import RowRange, RowTap
from nla_engine.codec.rows import SINK_FACTOR, Codec, bf16_values, describe_errors, relative_errors
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import Prompt
from nla_engine.ops.backends import Kernels

#: Most prompts, and most tokens of each, on which the median norm and the codec's error are measured.
CALIBRATION = (64, 512)


@dataclass(frozen=True)
class LayerCalibration:
    """Of one layer. sink_norm: rows with a larger norm are sinks. error: the codec's, by `describe_errors`."""

    sink_norm: float
    error: dict[str, float | int]


@torch.inference_mode()
def calibrate(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    codec: Codec,
    kernels: Kernels = Kernels(),
) -> dict[int, LayerCalibration]:
    """Measure each layer on the first prompts. Deterministic: a resumed run need not repeat it."""
    count, size = CALIBRATION
    sample = [Request(i, tuple(p.token_ids[:size].tolist()), 0) for i, p in enumerate(prompts[:count])]
    longest = max(len(r.token_ids) for r in sample)
    rows: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    slots = min(len(sample), 8)
    tap = RowTap(
        layers,
        Codec.named("bf16", lm.d_model),
        RowRange.parse("all"),
        rows_per_slot=longest,
        sink_norm=dict.fromkeys(layers, float("inf")),
        device=lm.device,
        reference=kernels.reference,
    )
    with Runner(lm, slots=slots, length=longest, tap=tap, kernels=kernels) as runner:
        for completion in Generator(runner, max_new_tokens=0).run(sample):
            for layer, kept in completion.rows.items():
                rows[layer].append(bf16_values(kept.codes))
    out = {}
    for layer, parts in rows.items():
        x = np.concatenate(parts)
        norm = np.linalg.norm(x.astype(np.float64), axis=1)
        finite = np.isfinite(norm) & (norm > 0)
        if not finite.any():
            raise EngineError(
                f"layer {layer}: every row of the first {len(sample)} prompts is zero or not finite"
            )
        sink_norm = float(np.float32(SINK_FACTOR * np.median(norm[finite])))
        ordinary = finite & (norm <= sink_norm)
        out[layer] = LayerCalibration(sink_norm, describe_errors(relative_errors(codec, x[ordinary])))
    return out
