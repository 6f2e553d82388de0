"""Models over two GPUs (their sums inside CUDA graphs) against the same on one, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_ar, save_av, save_model, write_prompts

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine.leader import Leader, open_ranks
from nla_engine.engine.peers import SWITCH
from nla_engine.engine.split_load import load_split
from nla_engine.models.load import LanguageModel, load_model
from nla_engine.models.source import find_source
from nla_engine.ops.backends import Kernels
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LAYER = 2
DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Leader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        with open_ranks(DEVICES) as opened:
            assert isinstance(opened, Leader)
            yield opened


def models(ranks: Leader, directory: Path, dtype: torch.dtype) -> tuple[LanguageModel, LanguageModel]:
    source = find_source(str(directory))
    return load_model(str(directory), device=DEVICES[0], dtype=dtype), load_split(ranks, source, dtype=dtype)


def capture(lm: LanguageModel, base: Path, directory: Path, **more: Any) -> CaptureStore:
    size = 1 if lm.ranks is None else lm.ranks.size
    options = CaptureOptions(
        model=str(base),
        prompts=(write_prompts(directory / "p.jsonl", 24),),
        layer=(LAYER,),
        out=str(directory / f"{size}.zarr"),
        max_new_tokens=24,
        codec="bf16",
        batch_size=8,
        device="cuda:0",
        tensor_parallel=size,
        overwrite=True,
        **more,
    )
    run_capture(options, lm=lm)
    return CaptureStore.open(options.out)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma3_text", "gemma3"])
def test_a_float32_capture_has_the_same_tokens(ranks: Leader, tmp_path: Path, architecture: str) -> None:
    """Greedy, where rounding decides nothing, with refill and graphs."""
    base = save_model(tmp_path / "base", architecture)
    one, two = (capture(lm, base, tmp_path) for lm in models(ranks, base, torch.float32))
    assert np.array_equal(one.column("token_id"), two.column("token_id"))
    assert one.provenance["weights"] == two.provenance["weights"]
    norms = one.layer(LAYER).norm(), two.layer(LAYER).norm()
    assert np.abs(norms[0] - norms[1]).max() < 1e-4 * norms[0].max()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_bfloat16_rows_of_prompts_are_as_near_as_rounding(
    ranks: Leader, tmp_path: Path, architecture: str
) -> None:
    """Rows of the same text: both are about as far from float32."""
    base = save_model(tmp_path / "base", architecture)
    more = {"positions": "prompt"}
    exact = load_model(str(base), device=DEVICES[0], dtype=torch.float32)
    truth = capture(exact, base, tmp_path, **more).layer(LAYER)[:]
    errors = []
    for lm in models(ranks, base, torch.bfloat16):
        rows = capture(lm, base, tmp_path, **more).layer(LAYER)[:]
        errors.append(np.linalg.norm(rows - truth) / np.linalg.norm(truth))
    assert errors[1] < 2 * errors[0] + 1e-3, errors


def test_av_and_ar_over_two_gpus(ranks: Leader, tmp_path: Path, rng: np.random.Generator) -> None:
    av, ar = save_av(tmp_path / "av", LAYER), save_ar(tmp_path / "ar", LAYER)
    vectors = [(number, rng.standard_normal(64).astype(np.float32)) for number in range(9)]
    said, read = [], []
    for group in (None, ranks):
        how: dict[str, Any] = {
            "device": DEVICES[0],
            "dtype": torch.float32,
            "kernels": Kernels(),
            "ranks": group,
        }
        writes, reads = Verbalizer.load(str(av), **how), Reconstructor.load(str(ar), **how)
        said.append(list(writes.explain(vectors, max_new_tokens=24, batch_size=4)))
        read.append(reads.reconstruct([text.text for text in said[0]]).cpu())
        reads.close()
    assert said[0] == said[1]
    assert (read[0] - read[1]).norm() < 1e-4 * read[0].norm()
