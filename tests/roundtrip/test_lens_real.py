"""The lens of a real pretrained model, SmolLM2-135M-Instruct, whose head is tied, beside transformers' own float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import call, flags
from tiny import write_records
from transformers import AutoModelForCausalLM

from nla_engine.store import CaptureStore

TEXTS = (
    "The capital of France is Paris, and the capital of Germany is Berlin. The capital of Italy is Rome.",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
)


@pytest.mark.real
def test_a_lens_on_text(smollm2: Path, tmp_path: Path) -> None:
    prompts = write_records(tmp_path, [{"text": text} for text in TEXTS])
    run, out = tmp_path / "run.zarr", tmp_path / "lens.parquet"
    how = {"prompts": prompts, "layer": "12,29", "out": run, "corpus": True, "codec": "bf16", "device": "cpu"}
    assert call("capture", smollm2, *flags({**how, "dtype": "float32"})).code == 0
    ran = call("lens", run, *flags({"model": smollm2, "out": out, "device": "cpu", "json": True}))
    assert ran.code == 0, ran.err
    store = CaptureStore.open(run)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    data = pq.read_table(out).to_pylist()
    rows = torch.from_numpy(store.layer(12)[:])
    with torch.inference_mode():
        middle = torch.log_softmax(model.lm_head(model.model.norm(rows)).double(), -1).numpy()
        whole = [
            torch.log_softmax(model(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits[0].double(), -1)
            for s in store.iter_sequences()
        ]
    for log, lines, close in ((middle, data[::2], 1e-3), (torch.cat(whole).numpy(), data[1::2], 0.15)):
        for own, line in zip(log, lines, strict=True):  # a stored row is rounded to bfloat16
            assert np.abs(own[line["top_id"]] - line["top_logprob"]).max() < close
            assert np.abs(np.sort(own)[::-1][:10] - line["top_logprob"]).max() < close
            assert line["entropy"] == pytest.approx(-(np.exp(own) * own).sum(), abs=close)
    last = {(line["sequence"], line["token"], line["next_token"]): line for line in data[1::2]}
    assert last[1, " eight", ","]["next_rank"] == 1 and last[0, " is", " Rome"]["next_logprob"] > -1
    assert ran.json["next_top1"]["29"] > ran.json["next_top1"]["12"]
