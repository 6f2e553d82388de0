"""The engine's check of itself: right models pass in every dtype, each planted fault is refused and named."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import ARCHITECTURES, byte_tokenizer, tiny_model

from nla_engine.engine import attention, fused, selfcheck
from nla_engine.engine.attention import Pass
from nla_engine.engine.expected import SCALES, Sample, take_sample
from nla_engine.engine.fused import FusedBlock
from nla_engine.engine.runner import Runner
from nla_engine.engine.selfcheck import Seen, SelfCheck, judge
from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, load_model, wrap_model
from nla_engine.ops.attention import Shape
from nla_engine.ops.backends import Kernels

TRIO = Path(__file__).parents[2] / "nla_engine" / "demo" / "trio"
DTYPES = (torch.float32, torch.bfloat16)


def gemma2(dtype: torch.dtype) -> LanguageModel:
    """Has soft caps that its scores reach, and windows in every other block."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=8,
        attn_logit_softcapping=1.0, query_pre_attn_scalar=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(4)
    return wrap_model(model.to(dtype).eval(), byte_tokenizer(), name="gemma2")


def language_model(name: str, dtype: torch.dtype) -> LanguageModel:
    if name == "gemma2":
        return gemma2(dtype)
    if name in ARCHITECTURES:
        return wrap_model(tiny_model(name).to(dtype), byte_tokenizer(), name=name)
    return load_model(str(TRIO / name), device=torch.device("cpu"), dtype=dtype)


# ---- faults ----


def on_blocks(change: Callable[[FusedBlock], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Plant something in every fused block when it is made."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        make = FusedBlock.__init__

        def changed(self: FusedBlock, block: Any, *more: Any) -> None:
            make(self, block, *more)
            change(self)

        patch.setattr(FusedBlock, "__init__", changed)

    return plant


def on_attention(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """change(attend, query, shape, key heads) in place of attend(query, shape)."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = Pass._attend

        def changed(self: Pass, query: torch.Tensor, tiles: Any, layer: int, shape: Shape) -> torch.Tensor:
            heads = self.cache.layer(layer).keys.shape[2]
            return change(lambda q, s: right(self, q, tiles, layer, s), query, shape, heads)

        patch.setattr(Pass, "_attend", changed)

    return plant


def on_rotation(change: Callable[[Any], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change the model's rotation once transformers has been asked."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        note = SelfCheck.note_shapes

        def changed(self: SelfCheck) -> None:
            note(self)
            change(getattr(self.lm.decoder, "whole", self.lm.decoder).rotary_emb)

        patch.setattr(SelfCheck, "note_shapes", changed)

    return plant


def frequencies(factor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def change(rotary: Any) -> None:
        for name, values in dict(rotary.named_buffers()).items():
            if name.endswith("inv_freq"):
                setattr(rotary, name, factor(values))

    return change


def decode_positions(rotary: Any) -> None:
    """Passes over few tokens are decode steps: their positions are one too far."""
    forward = rotary.forward

    def changed(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        late = position_ids.shape[1] <= 6
        return forward(x, position_ids + late, *args, **kwargs)

    rotary.forward = changed


def swap_gate_and_up(block: FusedBlock) -> None:
    gate, up = block.both.chunk(2)
    block.both = torch.cat([up, gate])


def other_epsilon(block: FusedBlock) -> None:
    block.eps = 1e-5 if block.eps < 5e-6 else 1e-6


def other_head_epsilon(block: FusedBlock) -> None:
    assert block.head_norm is not None
    block.head_norm = replace(block.head_norm, eps=block.head_norm.eps * 10)


def interleaved_heads(attend: Any, query: torch.Tensor, shape: Shape, heads: int) -> torch.Tensor:
    """Query head h reads key head h % KV instead of h // G."""
    order = torch.arange(query.shape[1]).reshape(-1, heads).T.flatten()
    return attend(query[:, order], shape)[:, order.argsort()]


def other_window(attend: Any, query: torch.Tensor, shape: Shape, _: int) -> torch.Tensor:
    return attend(query, replace(shape, window=shape.window + 1 if shape.window else 12))


#: What goes wrong, and a model of random weights that can show it.
FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "rope base": ("llama", on_rotation(frequencies(lambda f: f ** (math.log(5e5) / math.log(1e4))))),
    "rope scaling": ("qwen2", on_rotation(frequencies(lambda f: f / 2))),
    "position in decode steps": ("llama", on_rotation(decode_positions)),
    "soft cap": ("gemma2", on_attention(lambda attend, q, shape, _: attend(q, replace(shape, softcap=0.0)))),
    "window": ("gemma3_text", on_attention(other_window)),
    "scale": (
        "qwen3",
        on_attention(lambda attend, q, shape, _: attend(q, replace(shape, scale=shape.scale * 1.2))),
    ),
    "grouping": ("qwen2", on_attention(interleaved_heads)),
    "epsilon": ("llama", on_blocks(other_epsilon)),
    "epsilon of the heads' norm": ("qwen3", on_blocks(other_head_epsilon)),
    "gate and up": ("gemma3_text", on_blocks(swap_gate_and_up)),
    "norm of the heads": ("gemma3_text", on_blocks(lambda block: setattr(block, "head_norm", None))),
    "window of a block": (
        "llama",
        on_blocks(lambda block: setattr(block, "shape", replace(block.shape, window=7))),
    ),
}
#: Those that SmolLM2, a Llama, can show.
OF_LLAMA = [name for name in FAULTS if not name.startswith(("soft", "norm", "epsilon of"))]


@pytest.fixture(scope="module")
def pretrained(smollm2: Path) -> LanguageModel:
    return load_model(str(smollm2), device=torch.device("cpu"), dtype=torch.bfloat16)


def check(lm: LanguageModel, kernels: str = "auto", **options: Any) -> None:
    with Runner(lm, slots=2, length=60, kernels=Kernels(kernels), **options):
        pass


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "gemma2", "base"])
def test_a_right_engine_passes(name: str, dtype: torch.dtype, kernels: str) -> None:
    check(language_model(name, dtype), kernels=kernels)


@pytest.mark.real
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_a_pretrained_model_whose_states_hang_on_rounding_passes(
    pretrained: LanguageModel, kernels: str
) -> None:
    check(pretrained, kernels=kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = FAULTS[fault]
    lm = language_model(name, dtype)
    plant(monkeypatch)
    with pytest.raises(
        EngineError, match=rf"{name}: block \d of the engine .* transformers' own .*--kernels reference"
    ):
        check(lm, kernels="fused")
    assert not any("forward" in vars(block) for block in lm.blocks)  # and the model is restored


@pytest.mark.real
@pytest.mark.parametrize("fault", OF_LLAMA)
def test_a_planted_fault_is_refused_on_real_weights(
    fault: str, pretrained: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = copy.copy(pretrained.decoder)
    decoder._modules = {**decoder._modules, "rotary_emb": copy.deepcopy(decoder.rotary_emb)}  # some change it
    lm = replace(pretrained, decoder=decoder).truncated(5)
    FAULTS[fault][1](monkeypatch)
    with pytest.raises(EngineError, match=r"block \d of the engine .* transformers' own"):
        check(lm, kernels="fused")


def test_a_state_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.add_linear_

    def spoiled(*args: torch.Tensor) -> torch.Tensor:
        out = right(*args)
        out[-1, 3] = math.nan
        return out

    monkeypatch.setattr(fused, "add_linear_", spoiled)
    with pytest.raises(EngineError, match="block 0 of the engine differs"):
        check(language_model("qwen2", torch.float32), kernels="fused")


def test_what_the_embedding_hands_over_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that scales its embeddings outside the module that the engine calls."""
    lm = language_model("llama", torch.float32)
    take = selfcheck.take_sample

    def changed(*given: Any) -> Any:
        sample = take(*given)
        return replace(sample, embedded=sample.embedded * 1.01)

    monkeypatch.setattr(selfcheck, "take_sample", changed)
    with pytest.raises(EngineError, match="block 0 reads what differs"):
        check(lm)


def test_windows_longer_than_the_sample_are_those_of_the_librarys_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = language_model("gemma3_text", torch.float32)
    lm.model.set_attn_implementation(attention.NAME)
    for length in (7, 40):
        masks = selfcheck.masks_of_the_library(lm, length)
        assert [int(mask.sum()) for mask in masks if mask is not None] == [min(8, length), length] * 2
    assert lm.config._attn_implementation == attention.NAME
    assert not any("forward" in vars(block) for block in lm.blocks)
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=100,
    )  # fmt: skip
    lm = wrap_model(
        transformers.AutoModelForCausalLM.from_config(config).float(), byte_tokenizer(), name="mistral"
    )
    check(lm)
    attended = SelfCheck._attended

    def forgotten(self: SelfCheck) -> list[Shape]:
        return [replace(shape, window=0) for shape in attended(self)]

    monkeypatch.setattr(SelfCheck, "_attended", forgotten)
    check(lm)  # sequences of 60 tokens never fill the window
    with (
        pytest.raises(EngineError, match="block 0 attends to 100 of 103 tokens, and asks the engine for 103"),
        Runner(lm, slots=2, length=200),
    ):
        pass


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_models_of_few_positions_are_checked_as_far_as_they_go(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model("llama", torch.float32)
    lm.config.max_position_embeddings = length
    with Runner(lm, slots=1, length=length):
        pass
    FAULTS["epsilon"][1](monkeypatch)
    with (
        pytest.raises(EngineError, match="differs"),
        Runner(lm, slots=1, length=length, kernels=Kernels("fused")),
    ):
        pass


def test_the_sample_is_of_the_models_own_blocks() -> None:
    """Its first two lanes are read unchanged; the noise is that of bfloat16 alone."""
    lm = language_model("qwen2", torch.bfloat16)
    sample = take_sample(lm, {})
    wide = language_model("qwen2", torch.bfloat16)
    wide.model.float().set_attn_implementation("eager")
    for number in range(len(lm.blocks)):
        read = sample.inputs[number].float()
        length = read.shape[1]
        rotation = tuple(
            x.float() for x in lm.decoder.rotary_emb(sample.inputs[number], torch.arange(length)[None])
        )
        mask = torch.full((length, length), -math.inf).triu(1)[None, None]
        with torch.inference_mode():
            own = wide.blocks[number](read, attention_mask=mask, position_embeddings=rotation)
        own = own[0] if isinstance(own, tuple) else own
        torch.testing.assert_close(sample.wide[number], own, atol=1e-5, rtol=1e-5)
        assert 2e-4 < float(sample.noise[number].max()) < 0.1
    rms = torch.stack([each.float().square().mean(-1).sqrt() for each in sample.inputs])
    for lane, scale in enumerate(SCALES):
        if scale is not None:
            torch.testing.assert_close(rms[:, lane], torch.full_like(rms[:, lane], scale), atol=0, rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_experts_are_judged_though_rounding_may_choose_others(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, moe_intermediate_size=32, num_experts=16,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    lm = wrap_model(model, byte_tokenizer(), name="moe")
    for scale in (1, 4):
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.mul_(scale)
        check(lm)
    FAULTS["grouping"][1](monkeypatch)
    with pytest.raises(EngineError, match="this architecture is not supported"):
        check(lm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "gemma2"])
def test_on_a_gpu_a_right_engine_passes_and_one_that_errs_in_graphs_alone_does_not(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model(name, dtype)
    lm.move(torch.device("cuda", torch.cuda.current_device()))
    for kernels in ("reference", "auto"):
        check(lm, kernels=kernels)
    right = Pass._attend

    def changed(self: Pass, query: torch.Tensor, tiles: Any, layer: int, shape: Shape) -> torch.Tensor:
        bad = layer == 2 and torch.cuda.is_current_stream_capturing()
        return right(self, query, tiles, layer, replace(shape, scale=shape.scale * (1 + bad)))

    monkeypatch.setattr(Pass, "_attend", changed)
    with pytest.raises(
        EngineError, match=r"block 2 of the engine differs from transformers' own by .* in a graph"
    ):
        check(lm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_on_a_gpu(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, plant = FAULTS[fault]
    lm = language_model(name, dtype)
    lm.move(torch.device("cuda", torch.cuda.current_device()))
    plant(monkeypatch)
    with pytest.raises(EngineError, match=r"block \d of the engine .* transformers' own"):
        check(lm)


@pytest.mark.parametrize(("tokens", "share"), [(1, 3.0 / 4), (2, 3.0 / 3), (16, 3.0 / 2.125)])
def test_one_token_may_be_noisier_than_many(tokens: int, share: float) -> None:
    """Every token of the engine is three times as far off as transformers' own."""
    size = torch.full((1, 16), 2.0)
    nothing = torch.zeros(1, 16, 1)
    sample = Sample(nothing[..., 0].long(), nothing, [nothing], [nothing], [size], [size * 0.05])
    at = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
    states = torch.full((tokens, 1), 3 * 0.1 * 2.0)
    finding = judge(sample, [Seen(0, states, states, *at)], 0.0, set())
    assert finding.error / finding.limit == pytest.approx(share)
