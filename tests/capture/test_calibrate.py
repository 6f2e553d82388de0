"""What is measured before a run: on which tokens, and against plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import language_model

from nla_engine.capture.calibrate import LEAST, PART, calibrate
from nla_engine.codec.rows import SINK_FACTOR, Codec, bf16_bits, bf16_values, relative_errors
from nla_engine.errors import EngineError
from nla_engine.models.prompt_set import PromptSet


def drawn(rng, sizes: list[int]) -> PromptSet:
    prompts = PromptSet()
    for size in sizes:
        prompts.add(rng.integers(0, 250, size).astype(np.int32), b"{}")
    return prompts


def test_equals_plain_transformers(rng) -> None:
    lm, prompts = language_model("Qwen2Config"), drawn(rng, [5, 40, 17])
    found = calibrate(lm, prompts, (0, 1), codec := Codec.named("int8", lm.d_model))
    for layer, entry in found.items():
        states = []
        hook = lm.blocks[layer.layer].register_forward_hook(
            lambda _m, _i, out, states=states: states.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for prompt in prompts:
            lm.decoder(input_ids=_ids(prompt.token_ids), use_cache=False)
        hook.remove()
        rows = np.concatenate([bf16_values(bf16_bits(each.detach().numpy())) for each in states])
        norm = np.linalg.norm(rows.astype(np.float64), axis=1)
        assert entry.sink_norm == pytest.approx(SINK_FACTOR * np.median(norm), rel=1e-5)
        errors = relative_errors(codec, rows[norm <= entry.sink_norm])
        assert entry.error["mean"] == pytest.approx(errors.mean(), rel=1e-3)


@pytest.mark.parametrize(("sizes", "new"), [([60] * 200, 0), ([700, 3, 9], 32), ([11] * 30, 500)])
def test_reads_a_small_part_of_the_job(rng, sizes: list[int], new: int) -> None:
    lm, seen = language_model("Qwen2Config"), []
    calibrate(lm, drawn(rng, sizes), (0,), Codec.named("int8", lm.d_model), new, lambda *at: seen.append(at))
    read, told = seen[-1]
    assert read == told <= max(PART * (sum(sizes) + len(sizes) * min(new, 64)), LEAST)
    assert read > 0 and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_rows_without_a_norm_are_refused(rng) -> None:
    lm = language_model("Qwen2Config")
    lm.embedding.weight.data.fill_(float("nan"))
    with pytest.raises(EngineError, match="every row of the first 2 prompts is zero or not finite"):
        calibrate(lm, drawn(rng, [4, 4]), (0,), Codec.named("int8", lm.d_model))


def _ids(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64))[None]
