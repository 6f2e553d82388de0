"""The lens of the last block is the model's own distribution; that of others is its norm and head, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, byte_tokenizer, language_model, tiny_model

from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.readout import Readout
from nla_engine.ops.likelihood import entropy, likelihood, rank

FAMILIES = {
    "tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "divided, Granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "multiplied, Cohere": ("CohereConfig", {"logit_scale": 0.0625}),
    "capped, Gemma 2": ("Gemma2Config", {"final_logit_softcapping": 1.5, "head_dim": 16}),
    "capped, Gemma 3": ("Gemma3TextConfig", {"final_logit_softcapping": 1.5, "head_dim": 16}),
    "tables for each block, Gemma 4": (
        "Gemma4TextConfig",
        {"final_logit_softcapping": 1.5, "head_dim": 16, "hidden_size_per_layer_input": 16}
        | {"vocab_size_per_layer_input": 259, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "around the decoder's owner": (
        "OPTConfig",
        {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4},
    ),
}


def states(lm: LanguageModel, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The output [T, d] of every block, and the logits [T, V], by plain transformers."""
    seen: list[Any] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in lm.blocks]
    with torch.inference_mode():
        logits = lm.model(input_ids=ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return [(out[0] if isinstance(out, tuple) else out)[0] for out in seen], logits


def made(family: str) -> LanguageModel:
    if family in ARCHITECTURES:
        return wrap_model(tiny_model(family), byte_tokenizer(), name=family)
    config, more = FAMILIES[family]
    return language_model(config, **more)


@pytest.mark.parametrize("family", [*FAMILIES, *ARCHITECTURES])
def test_of_the_last_block_it_is_the_models_own(family: str, seed: int) -> None:
    lm = made(family)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    readout = Readout(lm)
    torch.manual_seed(seed)
    ids = torch.randint(3, 250, (23,))
    outputs, logits = states(lm, ids)
    torch.testing.assert_close(readout(outputs[-1]), logits, atol=2e-5, rtol=2e-5)
    assert readout.columns == logits.shape[1]
    assert (readout(outputs[0]) - logits).abs().max() > 0.05, "the vectors change nothing"
    order = torch.randperm(23)  # each vector is read alone
    torch.testing.assert_close(readout(outputs[-1][order]), logits[order], atol=2e-5, rtol=2e-5)
    after = lm.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(states(lm, ids)[1], logits), "the model itself is as it was"


@pytest.mark.parametrize(
    ("family", "behind"),
    [
        ("tied", lambda logits, _: logits),
        ("divided, Granite", lambda logits, _: logits / 8),
        ("multiplied, Cohere", lambda logits, _: logits * 0.0625),
        ("capped, Gemma 2", lambda logits, _: 1.5 * torch.tanh(logits / 1.5)),
    ],
)
def test_of_other_blocks_it_is_the_norm_and_head_by_hand(family: str, behind: Any, seed: int) -> None:
    lm = made(family)
    torch.manual_seed(seed)
    outputs, _ = states(lm, torch.randint(3, 250, (11,)))
    with torch.inference_mode():
        by_hand = behind(lm.head(lm.decoder.norm(outputs[0])), lm)
    torch.testing.assert_close(Readout(lm)(outputs[0]), by_hand, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_bfloat16_model_is_read_in_float32(architecture: str, seed: int) -> None:
    model = tiny_model(architecture).bfloat16()
    lm = wrap_model(model, byte_tokenizer(), name=architecture)
    readout = Readout(lm)
    vectors = torch.randn(9, lm.d_model, generator=torch.Generator().manual_seed(seed))
    assert lm.dtype == torch.bfloat16
    own = readout(vectors)
    assert own.dtype == torch.float32
    wide = wrap_model(tiny_model(architecture).bfloat16().float(), byte_tokenizer(), name="wide")
    with torch.inference_mode():
        expected = wide.logits(wide.decoder.norm(vectors))
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_models_without_a_lens_are_refused() -> None:
    lm = made("qwen2")
    with pytest.raises(EngineError, match="qwen2: Qwen2ForCausalLM has no head"):
        Readout(lm.truncated(1))
    kind = type(lm.model)

    class Changed(kind):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **given: Any) -> Any:
            output = super().forward(*args, **given)
            scale = 1.0 if given.get("input_ids") is None else 1.5  # of more than the last states
            return SimpleNamespace(logits=output.logits * scale)

    lm.model.__class__ = Changed
    with pytest.raises(EngineError, match=r"Changed has no lens here: .* own by 0.33 \(limit 0.001\)"):
        Readout(lm)


@pytest.mark.parametrize("k", [0, 1, 7])
def test_numbers_of_a_distribution(k: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(13, 40, generator=random)
    logits[2, 5:] = -torch.inf  # a head may exclude tokens
    token = torch.randint(0, 40, (13,), generator=random)
    token[2], token[4] = 3, -1
    log = torch.log_softmax(logits.double(), -1)
    found = likelihood(logits, token, k)
    expected = log.gather(1, token.clamp(min=0)[:, None])[:, 0]
    known = token >= 0
    torch.testing.assert_close(found.chosen[known].double(), expected[known], atol=1e-5, rtol=1e-5)
    assert found.chosen[~known].isnan().all()
    best = log.sort(-1, descending=True)
    assert found.top_token.shape == (13, k) and found.top.dtype == torch.float32
    assert torch.equal(found.top_token, best.indices[:, :k]) or k > 5
    torch.testing.assert_close(found.top.double(), best.values[:, :k], atol=1e-5, rtol=1e-5)
    place = [int((log[i] > log[i, t]).sum()) + 1 if t >= 0 else 0 for i, t in enumerate(token.tolist())]
    assert rank(logits, token).tolist() == place
    p = log.exp()
    torch.testing.assert_close(
        entropy(logits).double(), -(p * log.clamp(min=-1e9)).sum(-1), atol=1e-5, rtol=1e-5
    )
