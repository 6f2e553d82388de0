"""Top-k, top-p and min-p in whole runs: what is drawn, what is written down of it, what a resumed run must share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import call, capture, check_refused, explain, roundtrip
from transformers import AutoModelForCausalLM, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nla_engine.store import CaptureStore

CUT = {"top_k": 40, "top_p": 0.8, "min_p": 0.2}
SAMPLED = {"temperature": 1.7, "seed": 5, "max_new_tokens": 12}


@torch.inference_mode()
def test_every_token_of_a_capture_is_one_that_transformers_keeps(root: Path, tmp_path: Path) -> None:
    for name, cut in (("cut", CUT), ("free", {})):
        ran = call(*capture(root, tmp_path / f"{name}.zarr", **SAMPLED, **cut))
        assert ran.code == 0, ran.err
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    warpers = [TopKLogitsWarper(40), TopPLogitsWarper(0.8), MinPLogitsWarper(0.2)]
    outside = dict.fromkeys(("cut", "free"), 0)
    for name in outside:
        for sequence in CaptureStore.open(tmp_path / f"{name}.zarr").iter_sequences():
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))
            scores = model(ids[None]).logits[0, sequence.prompt_size - 1 : -1] / 1.7
            for warper in warpers:
                scores = warper(None, scores)
            outside[name] += int((scores.gather(1, ids[sequence.prompt_size :, None]) == -torch.inf).sum())
    assert outside["cut"] == 0 < outside["free"]


def test_the_most_likely_token_alone_is_greedy(root: Path, tmp_path: Path) -> None:
    made = {}
    for name, how in (
        ("greedy", {}),
        ("k", {"top_k": 1}),
        ("p", {"top_p": 1e-9}),
        ("min", {"min_p": 1.0}),
    ):
        sampled = {"temperature": 1.3} if how else {}
        assert call(*capture(root, tmp_path / f"{name}.zarr", **sampled, **how)).code == 0
        made[name] = [
            s.tokens.tolist() for s in CaptureStore.open(tmp_path / f"{name}.zarr").iter_sequences()
        ]
    assert made["k"] == made["p"] == made["min"] == made["greedy"]


def test_a_store_says_how_it_was_sampled_and_is_resumed_no_other_way(root: Path, tmp_path: Path) -> None:
    cut, free = tmp_path / "cut.zarr", tmp_path / "free.zarr"
    assert call(*capture(root, cut, **SAMPLED, **CUT)).code == 0
    assert call(*capture(root, free, **SAMPLED)).code == 0
    page = " ".join(call("info", cut).out.split())
    words = "softmax at the temperature, top-k 40, then top-p 0.8, then min-p 0.2, no penalty"
    assert f"sampling {words}" in page and "top_p 0.8" in page and "top_k 40" in page and "min_p 0.2" in page
    assert CaptureStore.open(cut).provenance["sampling"] == words
    told = CaptureStore.open(free).provenance
    assert told["sampling"] == "softmax at the temperature, no truncation, no penalty"
    assert "top_p" not in " ".join(call("info", free).out.split())
    assert "top_p" not in CaptureStore.open(free).options, "older stores lack it, and can be resumed"
    assert call(*capture(root, cut, resume=True, **SAMPLED, **CUT)).code == 0
    for store, changes, words in (
        (cut, {**CUT, "top_p": 0.9}, "cannot be resumed with other options: top_p was 0.8, is now 0.9"),
        (cut, {"top_k": 40, "min_p": 0.2}, "top_p was 0.8, is now absent"),
        (free, {"top_k": 3}, "top_k was absent, is now 3"),
    ):
        check_refused(call(*capture(root, store, resume=True, **SAMPLED, **changes)), words)


@pytest.mark.parametrize("command", [explain, roundtrip])
def test_a_table_is_resumed_no_other_way(command, root: Path, tmp_path: Path) -> None:
    sampled, out = {"temperature": 1.7, "limit": 3}, tmp_path / "x.parquet"
    assert call(*command(root, out, **sampled, **CUT)).code == 0
    assert call(*command(root, out, resume=True, **sampled, **CUT)).code == 0
    for changes, words in (
        ({**CUT, "min_p": 0.1}, "min_p was 0.2, is now 0.1"),
        ({"top_k": 40, "top_p": 0.8}, "min_p was 0.2, is now not given"),
    ):
        check_refused(call(*command(root, out, resume=True, **sampled, **changes)), words)
    call(*command(root, tmp_path / "free.parquet", **sampled))
    texts = [pq.read_table(path)["explanation"].to_pylist() for path in (out, tmp_path / "free.parquet")]
    assert texts[0] != texts[1]


#: Options and what the one line says.
FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "greedy": (
        {"top_p": 0.9},
        "--top-p: decoding is greedy without a --temperature: give one, or leave it out",
    ),
    "greedy by name": (
        {"temperature": 0, "top_k": 20, "min_p": 0.1},
        "--top-k and --min-p: decoding is greedy without a --temperature: give one, or leave them out",
    ),
    "p of nothing": ({"temperature": 1, "top_p": 0}, "--top-p is 0.0: it must be above 0 and at most 1"),
    "p above 1": ({"temperature": 1, "top_p": 1.01}, "--top-p is 1.01: it must be above 0 and at most 1"),
    "p no number": ({"temperature": 1, "top_p": "nan"}, "--top-p is nan: it must be above 0 and at most 1"),
    "k of nothing": ({"temperature": 1, "top_k": 0}, "--top-k is 0: it must be 1 or more"),
    "k no integer": ({"temperature": 1, "top_k": 2.5}, "Invalid value for '--top-k'"),
    "min-p above 1": ({"temperature": 1, "min_p": 1.5}, "--min-p is 1.5: it must be 0 to 1"),
    "min-p no number": ({"temperature": 1, "min_p": "nan"}, "--min-p is nan: it must be 0 to 1"),
}


@pytest.mark.parametrize("command", [capture, explain, roundtrip])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(command, fault: str, root: Path, tmp_path: Path) -> None:
    changes, words = FAULTS[fault]
    check_refused(call(*command(root, tmp_path / "x.parquet", **changes)), words)
    assert not list(tmp_path.iterdir())
