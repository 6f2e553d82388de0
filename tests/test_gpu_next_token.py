"""Log-probabilities beside rows on a GPU, inside captured graphs, against transformers on the same device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model, write_prompts

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine import generator
from nla_engine.models.load import wrap_model
from nla_engine.models.readout import Readout
from nla_engine.store import CaptureStore

pytestmark = pytest.mark.gpu
K = 4


@pytest.mark.parametrize(
    "how", [{}, {"positions": "all"}, {"temperature": 1.4, "top_k": 3}, {"corpus": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_captured_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], dtype: torch.dtype
) -> None:
    """More prompts than slots, so slots are refilled."""
    graphs: list[int] = []
    made = generator.DecodeGraph

    def noted(step: Any, size: int, *more: Any) -> Any:
        graphs.append(size)
        return made(step, size, *more)

    monkeypatch.setattr(generator, "DecodeGraph", noted)
    lm = wrap_model(tiny_model("qwen2").to("cuda", dtype), byte_tokenizer(chat=False), name="tiny")
    out = tmp_path / "s.zarr"
    given = {"layer": "1", "batch_size": 4, "next_token": K, "device": "cuda", **how}
    if "corpus" not in how:
        given |= {"max_new_tokens": 20, "chat": False}
    options = CaptureOptions(
        model="tiny", prompts=write_prompts(tmp_path / "p.jsonl", 13), out=str(out), **given
    )
    run_capture(options, lm=lm)
    assert bool(graphs) != ("corpus" in how)
    store = CaptureStore.open(out)
    wide = wrap_model(tiny_model("qwen2").to("cuda", dtype).float(), byte_tokenizer(chat=False), name="wide")
    logprob, ids, top = (store.column(name) for name in ("next_logprob", "top_id", "top_logprob"))
    following, position = store.column("next_token_id"), store.column("position")
    assert np.array_equal(np.isnan(logprob), following < 0)
    errors: list[np.ndarray] = []
    for sequence in store.iter_sequences():
        rows = sequence.rows
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64))[None].cuda()
        with torch.inference_mode():
            log = torch.log_softmax(wide.model(tokens).logits[0].double(), -1).cpu().numpy()[position[rows]]
        known = following[rows] >= 0
        errors.append(np.abs(logprob[rows][known] - log[known, following[rows][known]]))
        errors.append(np.abs(np.take_along_axis(log, ids[rows].astype(np.int64), 1) - top[rows]).ravel())
        errors.append(np.abs(-np.sort(-log)[:, :K] - top[rows]).ravel())
    joined = np.concatenate(errors)
    assert np.median(joined) < (1e-4 if dtype == torch.float32 else 0.3)
    assert dtype != torch.float32 or joined.max() < 5e-3


def test_a_lens_on_a_gpu() -> None:
    model = tiny_model("gemma3_text").cuda()
    lm = wrap_model(model, byte_tokenizer(), name="tiny")
    vectors = torch.randn(300, lm.d_model, device="cuda")
    with torch.inference_mode():
        expected = lm.head(lm.decoder.norm(vectors))
    torch.testing.assert_close(Readout(lm)(vectors), expected, atol=2e-3, rtol=2e-3)
