"""What is sampled is the model's own distribution, whatever an architecture does behind its head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import MLA, MOE, byte_tokenizer, language_model, tiny_model

from nla_engine.engine.generator import Generator
from nla_engine.engine.logits import check_logits
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.logits import logit_pieces
from nla_engine.ops.sampling import Sampling

PROMPT = (70, 71, 72, 33, 90)
DRAWS = 4000
EXPERTS = {**MOE, "num_local_experts": 4}
HEADS_ALONE = {"num_key_value_heads": 4}
HEADS = {
    "no scale": ("LlamaConfig", {}),
    "divided": ("GraniteConfig", {"logits_scaling": 8.0}),
    "divided by less than one": ("GraniteConfig", {"logits_scaling": 0.25}),
    "divided, experts": ("GraniteMoeConfig", {"logits_scaling": 8.0, **EXPERTS}),
    "divided, shared experts": ("GraniteMoeSharedConfig", {"logits_scaling": 8.0, **EXPERTS}),
    "multiplied": ("CohereConfig", {"logit_scale": 0.0625}),
    "multiplied by less than zero": ("CohereConfig", {"logit_scale": -0.25}),
    "multiplied, windows": ("Cohere2Config", {"logit_scale": 0.0625}),
    "multiplied, HyperCLOVA": ("HyperCLOVAXConfig", {"logits_scaling": 0.25}),
    "capped, Gemma 2": ("Gemma2Config", {"final_logit_softcapping": 1.5, "head_dim": 16}),
    "capped, Gemma 3": ("Gemma3TextConfig", {"final_logit_softcapping": 1.5, "head_dim": 16}),
    "capped, NanoChat": ("NanoChatConfig", {"final_logit_softcapping": 1.5}),
    "called around the decoder's owner": (
        "OPTConfig",
        {"ffn_dim": 96, "word_embed_proj_dim": 64, **HEADS_ALONE},
    ),
    "decoder called by position": ("GPTNeoXConfig", HEADS_ALONE),
}


def made(head: str) -> LanguageModel:
    """A model whose logits lie some way apart."""
    config, more = HEADS[head]
    lm = language_model(config, **more)
    assert lm.head is not None
    torch.nn.init.normal_(lm.head.weight, std=0.5)
    return lm


def own_logits(lm: LanguageModel) -> torch.Tensor:
    """Of the token behind PROMPT, by transformers alone."""
    lm.model.set_attn_implementation("eager")
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1].double()


def drawn(lm: LanguageModel, sampling: Sampling, count: int) -> np.ndarray:
    """The token behind PROMPT, int64 [count], as the engine chooses it."""
    stop = StopAutomaton([b"x"] * lm.vocab_size, [])
    with Runner(lm, slots=500, length=len(PROMPT) + 1) as runner:
        generator = Generator(runner, max_new_tokens=1, stop=stop, sampling=sampling)
        requests = (Request(i, PROMPT, 1, again=i % 500 > 0) for i in range(count))
        return np.array([ended.generated[0] for ended in generator.run(requests)])


@pytest.mark.parametrize("head", HEADS)
def test_tokens_are_drawn_as_often_as_the_model_says(head: str) -> None:
    lm = made(head)
    logits = own_logits(lm)
    if head != "no scale":
        assert logits.std() > 0.1, "a flat distribution would hide a scale"
    for temperature in (1.0, 0.5):
        expected = torch.softmax(logits / temperature, -1).numpy() * DRAWS
        seen = np.bincount(drawn(lm, Sampling(temperature), DRAWS), minlength=len(expected))
        often = expected >= 5
        observed, wanted = (np.append(counts[often], counts[~often].sum()) for counts in (seen, expected))
        chi_squared = ((observed - wanted) ** 2 / wanted.clip(5)).sum()  # the rare ones are one bin
        freedom = len(wanted) - 1
        assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5 + 10, temperature


@pytest.mark.parametrize("head", HEADS)
def test_the_greedy_choice_is_the_model_s(head: str) -> None:
    lm = made(head)
    assert drawn(lm, Sampling(), 1).tolist() == [int(own_logits(lm).argmax())]


def minicpm() -> LanguageModel:
    """Which scales hidden states in front of its head. The engine cannot drive its attention."""
    return language_model(
        "MiniCPM3Config", **{**MLA, "v_head_dim": 16}, qk_head_dim=16, head_dim=8, dim_model_base=8
    )


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gemma3_text", "minicpm"])
def test_logits_are_transformers_own_bit_for_bit(architecture: str) -> None:
    lm = (
        minicpm()
        if architecture == "minicpm"
        else wrap_model(tiny_model(architecture), byte_tokenizer(), name=architecture)
    )
    seen: list[torch.Tensor] = []
    hook = lm.decoder.register_forward_hook(lambda _m, _i, output: seen.append(output.last_hidden_state[0]))
    with torch.inference_mode():
        expected = lm.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
        assert torch.equal(lm.logits(seen[0]), expected)
    hook.remove()
    check_logits(lm)


def changed(change: Any, architecture: str = "qwen2") -> LanguageModel:
    """A model whose own forward does more than its parts say."""
    model = tiny_model(architecture)
    kind = type(model)

    class Changed(kind):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return change(self, super().forward(*args, **kwargs), kwargs)

    model.__class__ = Changed
    return wrap_model(model, byte_tokenizer(), name="changed")


def by_ids(_model: Any, output: Any, given: dict[str, Any]) -> Any:
    """Logits that depend on more than the last hidden states."""
    if given.get("input_ids") is not None:
        output.logits = output.logits * 1.5
    return output


def by_states(_model: Any, output: Any, _given: dict[str, Any]) -> Any:
    output.logits = output.logits + output.hidden_states[-1].mean()
    return output


def longer(_model: Any, output: Any, _given: dict[str, Any]) -> Any:
    output.logits = torch.nn.functional.pad(output.logits, (0, 1))
    return output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (by_ids, r"changed: Changed cannot generate here: its logits differ from transformers' own by 0.33"),
        (
            by_states,
            r"changed: Changed cannot generate here: its logits depend on more than its decoder's last hidden",
        ),
        (
            longer,
            r"changed: Changed cannot generate here: it gives 260 logits per state .* has 259 embeddings",
        ),
    ],
)
def test_a_model_whose_logits_cannot_be_had_does_not_generate(change: Any, reason: str) -> None:
    lm = changed(change)
    stop = StopAutomaton([b"x"] * lm.vocab_size, [])
    with Runner(lm, slots=2, length=10) as runner:
        with pytest.raises(EngineError, match=reason):
            Generator(runner, max_new_tokens=1, stop=stop)
        Generator(runner, max_new_tokens=0)  # nothing is chosen: the corpus can be captured
    assert "forward" not in vars(lm.decoder)


@pytest.mark.parametrize(
    ("states", "room"), [(0, 100), (7, 1), (7, 4 * 5 * 3 + 1), (6, 4 * 5 * 3), (6, 1 << 30)]
)
def test_pieces_fit_and_leave_none_out(states: int, room: int) -> None:
    sizes = []
    done = 0
    for piece in logit_pieces(states, 5, room):
        assert piece.start == done < piece.stop
        sizes.append(piece.stop - piece.start)
        done = piece.stop
    most = max(room // (4 * 5), 1)
    assert done == states and all(size == most for size in sizes[:-1]) and all(size <= most for size in sizes)
