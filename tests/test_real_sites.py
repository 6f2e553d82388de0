"""Sites of a real pretrained model, SmolLM2-135M-Instruct, against hooks on transformers' own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import nla_engine
from nla_engine.sites import ATTN_OUT, EMBEDDINGS, MLP_OUT, PARTS, RESID_MID, RESID_POST

pytestmark = pytest.mark.real

LAYER = 20


@torch.inference_mode()
def hooked(smollm2: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """By part, what hooks on block LAYER see in float32: [T, d_model]."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    seen: dict[str, np.ndarray] = {}

    def given(part: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[part] = (
                (output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1).numpy().copy()
            )

        return hook

    block = model.model.layers[LAYER]
    block.register_forward_hook(given(RESID_POST))
    block.self_attn.register_forward_hook(given(ATTN_OUT))
    block.mlp.register_forward_hook(given(MLP_OUT))
    block.post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: given(RESID_MID)(module, (), args[0])
    )
    model.model.embed_tokens.register_forward_hook(given(EMBEDDINGS))
    model(torch.from_numpy(ids.astype(np.int64))[None])
    return seen


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_sites_equal_hooks(smollm2: Path, tmp_path: Path, kernels: str) -> None:
    run = nla_engine.capture_activations(
        smollm2, ["What is the capital of France?"], LAYER, tmp_path / "run.zarr", sites=list(PARTS),
        positions="all", codec="bf16", max_new_tokens=4, device="cpu", dtype="float32", kernels=kernels, quiet=True,
    )  # fmt: skip
    want = hooked(smollm2, run.sequence(0).tokens)
    for part in PARTS:
        own = run.layer(LAYER, site=part)[:]
        error = np.linalg.norm(own - want[part], axis=1) / np.linalg.norm(want[part], axis=1)
        assert error.max() < 2**-8, part  # bfloat16 rounds by 2^-9 at most
    added = run.layer(LAYER, RESID_MID)[:] + run.layer(LAYER, MLP_OUT)[:]
    assert np.abs(added - run.layer(LAYER)[:]).max() < 2**-6 * np.abs(added).max()
