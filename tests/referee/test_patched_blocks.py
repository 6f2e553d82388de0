"""The fused blocks of a patched model: kernels against plain torch; what is replaced; a wrong one is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from tiny import byte_tokenizer, language_model, tiny_model

from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.ops import gate, lane_attention, norm, rotary
from nla_engine.ops.backends import Kernels
from nla_engine.referee.blocks import PatchedBlock
from nla_engine.referee.patcher import Patcher

FUSED, PLAIN = Kernels("fused"), Kernels("reference")


def model(name: str) -> LanguageModel:
    lm = wrap_model(tiny_model(name), byte_tokenizer(), name=name)
    lm.model.to(DEVICE)
    return lm


@runs_kernels
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_kernels_against_plain_torch(
    name: str, rng: np.random.Generator, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in (gate, lane_attention, norm, rotary):
        monkeypatch.setattr(op, "has_triton", lambda device: True)
    lm = model(name)
    given = [rng.integers(3, 250, size) for size in (4, 11)]
    sequence = np.sort(rng.integers(0, 2, 8))
    position = np.array([int(rng.integers(0, len(given[s]))) for s in sequence])
    vectors = torch.randn(8, lm.d_model, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * 4
    made = []
    for kernels in (FUSED, PLAIN):
        with Patcher(lm, 1, kernels) as patcher:
            made.append(patcher.run(patcher.read(given), sequence, position, vectors, 2))
    torch.testing.assert_close(*made, atol=1e-3, rtol=1e-3)


def test_what_is_replaced(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known blocks and norms while a patcher is open, with no weight changed; the model is given back after a fault."""

    def replaced(lm: LanguageModel) -> set[str]:
        return {type(part).__name__ for part in lm.model.modules() if "forward" in vars(part)}

    lm = model("gemma3_text")
    before = lm.fingerprint()
    with Patcher(lm, 1, FUSED) as patcher:
        assert replaced(lm) == {"Gemma3DecoderLayer", "Gemma3RMSNorm"}
        assert all(isinstance(block.forward, PatchedBlock) for block in lm.blocks)
        read = patcher.read([rng.integers(3, 250, 12)])
        patcher.run(read, np.zeros(1, np.int64), np.array([5]), torch.zeros(1, lm.d_model, device=DEVICE))
        assert all(isinstance(block.forward, PatchedBlock) for block in lm.blocks)
    assert not replaced(lm) and lm.fingerprint() == before
    with Patcher(lm, 1, PLAIN):
        assert not replaced(lm)
    other = language_model("Phi3Config")
    with Patcher(other, 1, FUSED):
        assert not replaced(other)

    def fails(self: object, *args: object) -> None:
        raise RuntimeError("no such shape")

    monkeypatch.setattr(PatchedBlock, "_attend", fails)
    with pytest.raises(RuntimeError, match="no such shape"), Patcher(lm, 1, FUSED) as patcher:
        patcher.read([rng.integers(3, 250, 12)])
    assert not replaced(lm)


def test_a_wrong_block_is_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, positions, norms = rng.integers(3, 250, 30), np.arange(30), np.full(30, 5.0, np.float32)
    lm = model("llama")
    right = PatchedBlock._attend

    def wrong(self: PatchedBlock, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attended, x = right(self, *args)
        return attended * 1.05, x

    monkeypatch.setattr(PatchedBlock, "_attend", wrong)
    with (
        Patcher(lm, 0, FUSED) as patcher,
        pytest.raises(EngineError, match="patched states differ from those of"),
    ):
        patcher.check(ids, positions, norms, 30)
    with Patcher(lm, 0, PLAIN) as patcher:
        patcher.check(ids, positions, norms, 30)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
