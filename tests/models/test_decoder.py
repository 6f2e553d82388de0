"""A model that is cut behind a block gives what that block gives in the whole model, whatever the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_families import small_model
from tiny import MOE, byte_tokenizer, language_model

from nla_engine.engine.runner import Runner
from nla_engine.errors import CheckpointError
from nla_engine.models.load import LanguageModel, load_model, wrap_model

IDS = list(range(3, 40))
#: Configurations, among them final norms by other names, norms that serve twice, and layers behind the last block.
FAMILIES: dict[str, dict[str, Any]] = {
    "NanoChatConfig": {},
    "GPTNeoXConfig": {"num_key_value_heads": None},
    "PhiConfig": {},
    "OPTConfig": {"word_embed_proj_dim": 32, "ffn_dim": 96, "num_key_value_heads": None},
    "PersimmonConfig": {"num_key_value_heads": None},
    "NemotronConfig": {},
    "CohereConfig": {},
    "GraniteConfig": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 8.0},
    "Gemma2Config": {"head_dim": 16, "sliding_window": 16},
    "Gemma3TextConfig": {"head_dim": 16, "sliding_window": 16},
    "Olmo2Config": {},
    "Phi3Config": {},
    "Starcoder2Config": {},
    "Qwen2Config": {},
    "Qwen2MoeConfig": {**MOE, "use_sliding_window": False},
    "Lfm2Config": {"layer_types": ["full_attention"] * 3},
}


def small(config: str) -> LanguageModel:
    """Three blocks, and no weight that happens to be one or zero."""
    more = {key: value for key, value in FAMILIES[config].items() if value is not None}
    lm = language_model(config, **{"num_key_value_heads": 4, **more, "num_hidden_layers": 3})
    generator = torch.Generator().manual_seed(1)
    for weight in lm.model.parameters():
        if weight.ndim == 1:
            weight.data += 0.5 * torch.randn(weight.shape, generator=generator)
    return lm


@torch.inference_mode()
def block_states(lm: LanguageModel, layer: int) -> torch.Tensor:
    """Output [T, d] of a block of the whole model, by transformers alone."""
    seen: list[Any] = []
    hook = lm.model.get_decoder().layers[layer].register_forward_hook(lambda *call: seen.append(call[2]))
    lm.model.set_attn_implementation("eager")
    lm.model(input_ids=torch.tensor([IDS]), use_cache=False)
    hook.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0]


def difference(lm: LanguageModel, expected: torch.Tensor) -> float:
    """Relative error of the states that the engine gives for IDS."""
    with Runner(lm, slots=2, length=60) as runner:
        got = runner.prefill([(0, 0, IDS)])
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("config", FAMILIES)
def test_reading_alone_gives_the_blocks_of_the_whole_model(config: str) -> None:
    lm = small(config)
    for layer in range(3):
        expected = block_states(lm, layer)
        assert difference(lm.truncated(layer), expected) < 1e-4, layer
        assert torch.equal(block_states(lm, layer), expected)  # and nothing is left behind


@pytest.mark.parametrize("config", FAMILIES)
def test_a_reconstructor_reads_its_last_block(config: str, tmp_path: Path) -> None:
    whole = small(config)
    whole.model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ar = load_model(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32, headless=True)
    assert ar.head is None
    assert difference(ar.truncated(2), block_states(whole, 2)) < 1e-4


def test_blocks_above_the_cut_are_not_run() -> None:
    lm = small("NanoChatConfig")
    ran: list[int] = []
    cut = lm.truncated(1)
    hooks = [
        block.register_forward_hook(lambda *_call, number=number: ran.append(number))
        for number, block in enumerate(lm.blocks)
    ]
    with Runner(cut, slots=1, length=60) as runner:
        ran.clear()
        runner.prefill([(0, 0, IDS)])
    assert ran == [0, 1] and len(cut.blocks) == 2 and len(lm.blocks) == 3
    for hook in hooks:
        hook.remove()


def test_a_cut_of_a_cut_is_that_of_the_whole() -> None:
    lm = small("PhiConfig")
    again = lm.truncated(1).truncated(1)
    assert difference(again, block_states(lm, 1)) < 1e-4
    assert difference(lm.truncated(1).truncated(0), block_states(lm, 0)) < 1e-4


def test_blocks_that_run_twice_are_refused() -> None:
    """Which of its outputs a block's is, nobody has said."""
    lm = small("Qwen2Config")
    lm.decoder.layers[2] = lm.decoder.layers[0]
    with pytest.raises(CheckpointError, match="output of block 1 is ambiguous: .* not supported"):
        lm.truncated(1)


@pytest.mark.parametrize(
    "config", ["GPT2Config", "BloomConfig", "BertConfig", "Llama4TextConfig", "OPTConfig"]
)
def test_blocks_are_found_by_their_number_whatever_they_are_called(config: str) -> None:
    """The decoder is the smallest module around them and the embedding; so its output is that of the whole model's."""
    lm = wrap_model(small_model(getattr(transformers, config)), byte_tokenizer(), name=config)
    assert len(lm.blocks) == 4 and lm.decoder is not lm.model
    with torch.inference_mode():
        given = torch.tensor([IDS])
        states = lm.decoder(input_ids=given, use_cache=False).last_hidden_state
        assert states.shape == (1, len(IDS), lm.d_model)
        torch.testing.assert_close(lm.logits(states[0]), lm.model(input_ids=given, use_cache=False).logits[0])
        cut = lm.truncated(1).decoder(input_ids=given, use_cache=False).last_hidden_state
        whole = lm.model(input_ids=given, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(cut, whole[2])


def test_the_text_model_of_a_wrapper_is_found() -> None:
    lm = wrap_model(small_model(transformers.Gemma3Config), byte_tokenizer(), name="gemma3")
    assert lm.decoder is lm.model.model.language_model
    assert lm.config is lm.model.config.text_config and len(lm.blocks) == lm.config.num_hidden_layers


def test_decoders_whose_blocks_are_in_several_lists_are_refused() -> None:
    xlm = small_model(transformers.XLMConfig)
    with pytest.raises(
        CheckpointError, match=r"^xlm: XLMWithLMHeadModel keeps its blocks in no list .* not supp"
    ):
        wrap_model(xlm, byte_tokenizer(), name="xlm")
