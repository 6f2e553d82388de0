"""Captures, verbalizers and reconstructors of families with attention of their own, against plain transformers as it
loads them by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from commands import LAYER, call, capture, roundtrip
from plain_pair import plain_state, plain_text
from safetensors.torch import load_file
from tiny import D, save_ar, save_av, save_model, write_prompts

from nla_engine.store import CaptureStore

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Falcon": (
        "FalconConfig",
        {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "Falcon-RW": (
        "FalconConfig",
        {"num_attention_heads": 4, "new_decoder_architecture": False, "multi_query": False, "alibi": True},
    ),
    "BLOOM": ("BloomConfig", {"n_head": 4}),
    "MPT": ("MptConfig", {"n_heads": 4, "max_seq_len": 512}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {"num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 9},
    ),
    "StableLM": (
        "StableLmConfig",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    ),
}
#: Of AVs that write about different vectors.
SEEDS = {"Falcon": 4}


def save(directory: Path, name: str, blocks: int, seed: int) -> None:
    """A model of the family, in place of the one that is there."""
    config, more = FAMILIES[name]
    if "attention_types" in more:
        more = more | {
            "attention_types": [[["global", "local"][: min(blocks, 2)], 1], [["global"], blocks - 2]]
        }
    sizes = {
        "hidden_size": D,
        "num_hidden_layers": blocks,
        "vocab_size": 259,
        "pad_token_id": 0,
        "eos_token_id": 257,
        "bos_token_id": 257,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**sizes | more)
    ).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in key and "wte" not in key:
                weight.mul_(8)
    model.save_pretrained(directory)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair(name: str, tmp_path: Path) -> None:
    root = tmp_path
    save_model(root / "base")
    save_av(root / "av", LAYER)
    save_ar(root / "ar", LAYER)
    for part, blocks, seed in (("base", 4, 0), ("av", 4, SEEDS.get(name, 7)), ("ar", LAYER + 1, 2)):
        save(root / part, name, blocks, seed)
    write_prompts(root / "prompts.jsonl", 4)
    done = call(*capture(root, root / "run.zarr", codec="bf16"))
    assert done.code == 0 and "library" not in done.err, done.err
    assert call("verify", root / "run.zarr", "--model", root / "base").code == 0
    store = CaptureStore.open(root / "run.zarr")
    vectors = store.layer(LAYER)[:]
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    sequence = store.sequence(1)
    with torch.no_grad():
        own = model(torch.from_numpy(sequence.tokens.astype(np.int64))[None], output_hidden_states=True)
    rows = own.hidden_states[LAYER + 1][0, store.column("position")[sequence.rows]].numpy()
    apart = np.linalg.norm(vectors[sequence.rows] - rows, axis=1) / np.linalg.norm(rows, axis=1)
    assert apart.max() < 8e-3

    out = root / "x.parquet"
    done = call(*roundtrip(root, out, limit=8))
    assert done.code == 0 and "library" not in done.err, done.err
    head = load_file(root / "ar" / "value_head.safetensors")["weight"].double().numpy()
    texts = set()
    for row in pq.read_table(out).to_pylist():
        v = vectors[row["row"]]
        assert row["explanation"] == plain_text(root / "av", v, new_tokens=8)
        state = plain_state(root / "ar", f"Summary of <text>{row['explanation']}</text> <summary>", LAYER)
        again = head @ state.astype(np.float64)
        assert abs(row["cos"] - again @ v / np.linalg.norm(again) / np.linalg.norm(v)) < 1e-5
        texts.add(row["explanation"])
    assert len(texts) > 1, "the vectors change nothing, so the test shows nothing"
