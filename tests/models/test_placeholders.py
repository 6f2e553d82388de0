"""Where vectors enter a prompt with placeholders: the tokens by offsets, against a search for them by id."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import oracle_tokenizer
from tiny import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla_engine.errors import PromptError
from nla_engine.models.av_prompt import Wording, placeholder_prompt, renderer
from nla_engine.models.injection import Prompt
from nla_engine.roundtrip.writer import Limits

TOKENIZER = oracle_tokenizer()


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space as part of the token behind it, as SentencePiece does."""
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁", "\n", *letters, "▁?"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "?")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("vectors", [1, 2, 9])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, metaspace()], ids=["bytes", "metaspace"])
def test_the_run_of_activation_oracles(tokenizer: PreTrainedTokenizerFast, vectors: int) -> None:
    question = "Is ? it ? é ??"
    prompt = placeholder_prompt(f"Layer: 7\n<INJECT> \n{question}", " ?", vectors, tokenizer, str)
    text = "Layer: 7\n" + " ?" * vectors + " \n" + question
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt.token_ids == tuple(ids)
    mark = tokenizer(" ?", add_special_tokens=False)["input_ids"]
    assert len(mark) == 1
    assert prompt.places == tuple(i for i, id_ in enumerate(ids) if id_ == mark[0])[:vectors]


def test_the_run_of_latentqa_begins_with_another_token() -> None:
    prompt = placeholder_prompt("A:\n<INJECT><|im_end|>", "? ", 4, TOKENIZER, str)
    assert TOKENIZER.decode(prompt.token_ids) == "A:\n? ? ? ?<|im_end|>"
    assert prompt.places == (3, 4, 5, 6)
    assert prompt.token_ids[3] != prompt.token_ids[4] == prompt.token_ids[5] == prompt.token_ids[6]


def test_a_place_for_each_vector_and_the_chat_template() -> None:
    render = renderer(TOKENIZER, Wording(prefill="So:"))
    prompt = placeholder_prompt("a~<INJECT>, b <INJECT>", "~", 2, TOKENIZER, render)
    text = "<|im_start|>user\na~~, b ~<|im_end|>\n<|im_start|>assistant\nSo:"
    assert prompt.token_ids == tuple(TOKENIZER(text)["input_ids"])
    tilde = TOKENIZER("~")["input_ids"][0]
    assert prompt.places == tuple(i for i, id_ in enumerate(prompt.token_ids) if id_ == tilde)[1:]


@pytest.mark.parametrize(
    ("text", "placeholder", "vectors"),
    [
        ("<INJECT>", "é", 1),  # two tokens with one place in the text
        ("<INJECT>", "ab", 1),
        ("<INJECT>", " !", 2),  # a space and a mark
        ("a <INJECT>", "?", 1),  # the token reaches into the prompt
        ("<INJECT>", "??", 1),
    ],
)
def test_no_token_of_its_own(text: str, placeholder: str, vectors: int) -> None:
    with pytest.raises(PromptError, match="is not one token of its own where vector 1 enters"):
        placeholder_prompt(text, placeholder, vectors, TOKENIZER, str)


def test_places_that_do_not_fit_the_vectors() -> None:
    with pytest.raises(PromptError, match="holds 3 times <INJECT>, .* vectors: 2"):
        placeholder_prompt("<INJECT><INJECT><INJECT>", "~", 2, TOKENIZER, str)
    with pytest.raises(PromptError, match="the chat template changes the places"):
        placeholder_prompt("<INJECT>", "~", 2, TOKENIZER, lambda text: text * 2)
    with pytest.raises(PromptError, match="need a chat template"):
        renderer(byte_tokenizer(chat=False), Wording(system="s"))


def test_limits_of_prompts(rng: np.random.Generator) -> None:
    """Against a slow count, on random prompts that mostly begin alike."""
    for _ in range(50):
        prompts = []
        for _ in range(int(rng.integers(1, 6))):
            ids = tuple(rng.integers(0, 2, rng.integers(3, 9)).tolist())
            ids = (5, 5, *ids) if rng.random() < 0.8 else ids
            places = np.sort(rng.choice(len(ids), rng.integers(1, 3), replace=False))
            prompts.append(Prompt(ids, tuple(places.tolist())))
        limits = Limits.of(iter(prompts))
        size = 0
        while all(len(p.shared) > size and p.token_ids[size] == prompts[0].token_ids[size] for p in prompts):
            size += 1
        assert limits.shared == prompts[0].token_ids[:size]
        assert limits.longest == max(len(p.token_ids) for p in prompts)
        assert limits.vectors == max(len(p.places) for p in prompts)
