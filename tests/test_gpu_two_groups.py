"""Four GPUs as two workers of two GPUs each. In a file of its own: a process belongs to one group at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_model, write_prompts

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.store import CaptureStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs"),
]
LAYER = 2


def test_two_workers_of_two_gpus_each(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    prompts = write_prompts(tmp_path / "p.jsonl", 48)
    given: dict[str, Any] = {"model": str(base), "prompts": (prompts,), "layer": (LAYER,), "codec": "bf16"}
    given |= {"max_new_tokens": 24, "batch_size": 8, "dtype": "float32"}
    for name, more in (("one", {}), ("four", {"gpus": "all", "tensor_parallel": 2})):
        summary = run_capture(CaptureOptions(**given, **more, out=str(tmp_path / f"{name}.zarr")))
    assert summary.workers == torch.cuda.device_count() // 2
    one, four = (CaptureStore.open(str(tmp_path / f"{name}.zarr")) for name in ("one", "four"))
    for column in ("token_id", "position"):
        a, b = (
            store.column(column)[np.lexsort((store.column("position"), store.column("sequence")))]
            for store in (one, four)
        )
        assert np.array_equal(a, b)
