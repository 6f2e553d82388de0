"""Documents that are cut or split into windows, against the truncation of the tokenizers library itself."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import byte_tokenizer, write_records
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nla_engine.demo.run import TRIO
from nla_engine.errors import PromptError
from nla_engine.models.documents import WINDOW, Longest, tokens_around
from nla_engine.models.load import load_tokenizer
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.prompts import Limits, read_prompts


def tokenizer_with(single: str) -> PreTrainedTokenizerFast:
    """A byte tokenizer that puts special tokens around a text."""
    tokenizer = byte_tokenizer()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


TOKENIZERS = {
    "nothing around": byte_tokenizer,
    "a start": lambda: tokenizer_with("<|im_start|> $A"),
    "a start and an end": lambda: tokenizer_with("<|im_start|> $A <|im_end|>"),
    "the bundled one": lambda: load_tokenizer(TRIO / "base"),
}


def documents(count: int = 12) -> list[str]:
    rng = np.random.default_rng()
    words = ["What is", " 37", " times 46?", "\n", " ", "é", "日本", "\t", "a" * 9]
    return ["x" + "".join(rng.choice(words, rng.integers(0, 12))) for _ in range(count)]


def read(
    directory: Path, tokenizer: Any, records: list[Any], most: int | None, long: str, **how: Any
) -> PromptSet:
    path = write_records(directory, records)
    return read_prompts(
        path, tokenizer, chat=False, replies=False, longest=Longest(most, long), limits=Limits(512), **how
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("most", [3, 8, 21])
def test_pieces_are_those_of_the_tokenizers_library(name: str, most: int, tmp_path: Path) -> None:
    tokenizer, texts = TOKENIZERS[name](), documents()
    records = [{"text": text, "id": i} for i, text in enumerate(texts)]
    cut = read(tmp_path, tokenizer, records, most, "cut")
    windows = read(tmp_path, tokenizer, records, most, "windows")
    expected = [
        tokenizer(text, truncation=True, max_length=most, return_overflowing_tokens=True)["input_ids"]
        for text in texts
    ]
    assert [prompt.token_ids.tolist() for prompt in cut] == [pieces[0] for pieces in expected]
    assert [prompt.token_ids.tolist() for prompt in windows] == list(chain.from_iterable(expected))
    assert [json.loads(prompt.source) for prompt in cut] == records
    assert windows.documents == cut.documents == len(texts)
    longer = sum(len(pieces) > 1 for pieces in expected)
    assert cut.notes == [f"{longer} of 12 prompts have more than {most} tokens: they are cut"]
    assert windows.notes == [
        f"{longer} of 12 prompts have more than {most} tokens: they are split into windows"
    ]


def test_a_window_says_where_it_is_from(tmp_path: Path) -> None:
    tokenizer, texts = TOKENIZERS["a start"](), documents()
    texts[3] = "long " * 30
    records = [{"text": text, "id": f"d{i}", "deep": {"x": [1, None]}} for i, text in enumerate(texts)]
    found = read(tmp_path, tokenizer, records, 9, "windows")
    for number, record in enumerate(records):
        prompts = found.of_document(number)
        assert [found.document(index) for index in prompts] == [number] * len(prompts)
        text, start = tokenizer.encode(record["text"])[1:], 0
        for window, prompt in enumerate(found[prompts.start : prompts.stop]):
            source = json.loads(prompt.source)
            origin = {"document": number, "window": window, "windows": len(prompts), "start": start}
            assert source.pop(WINDOW) == origin
            assert source == (record if window == 0 else {k: v for k, v in record.items() if k != "text"})
            inside = prompt.token_ids[1:].tolist()
            assert inside == text[start : start + 8]
            start += len(inside)
        assert start == len(text)
    part = found.part(range(found.of_document(3).start + 1, len(found)))
    assert part.document(0) == 0 and part.documents == len(records) - 3
    assert part[0].token_ids.tolist() == found[found.of_document(3).start + 1].token_ids.tolist()


def test_a_text_with_its_own_start_is_cut_as_one_without(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["a start"]()
    found = read(tmp_path, tokenizer, [{"text": "abcdef"}, {"text": "<|im_start|>abcdef"}], 4, "windows")
    ids = [prompt.token_ids.tolist() for prompt in found]
    assert ids[:2] == ids[2:] and [len(each) for each in ids] == [4, 4, 4, 4]


def test_without_a_number_the_model_sets_the_limit(tmp_path: Path) -> None:
    found = read(tmp_path, byte_tokenizer(), [{"text": "a" * 1100}], None, "windows")
    assert found.sizes.tolist() == [512, 512, 76]


def test_longer_documents_are_refused_unless_asked_otherwise(tmp_path: Path) -> None:
    records = [{"text": "abc"}, {"text": "abcdefgh"}]
    with pytest.raises(PromptError, match=r"line 2: the prompt has 8 tokens, the limit is 4: .* --long cut"):
        read(tmp_path, byte_tokenizer(), records, 4, "refuse")
    found = read(tmp_path, byte_tokenizer(), records, 4, "refuse", skip_bad=True)
    assert (len(found), len(found.skipped)) == (1, 1)


@pytest.mark.parametrize("whole", [[1], None])
def test_a_tokenizer_whose_special_tokens_cannot_be_told_divides_nothing(
    whole: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window would begin without them, or in the middle of them."""

    def odd(text: str, add_special_tokens: bool) -> dict[str, list[int] | None]:
        if whole is None:
            raise ValueError(text)
        return {"input_ids": whole if add_special_tokens else [2]}

    assert tokens_around(odd) is None
    monkeypatch.setattr("nla_engine.models.prompts.tokens_around", lambda _: tokens_around(odd))
    for long in ("cut", "windows"):
        with pytest.raises(PromptError, match=f"--long {long}: which special tokens .* cannot be told"):
            read(tmp_path, byte_tokenizer(), [{"text": "abc"}], 4, long)
    assert len(read(tmp_path, byte_tokenizer(), [{"text": "abc"}], 4, "refuse")) == 1


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PromptError, match="--max-tokens 2 leaves no room for text beside the 2 special tokens"
    ):
        read(tmp_path, TOKENIZERS["a start and an end"](), [{"text": "a"}], 2, "cut")
    with pytest.raises(PromptError, match="--max-tokens is 600, and the model reads at most 512"):
        read(tmp_path, byte_tokenizer(), [{"text": "a"}], 600, "cut")
    with pytest.raises(PromptError, match=f'line 1: has a field "{WINDOW}"'):
        read(tmp_path, byte_tokenizer(), [{"text": "a", WINDOW: 1}], 4, "windows")
    assert len(read(tmp_path, byte_tokenizer(), [{"text": "a", WINDOW: 1}], 4, "cut")) == 1
    with pytest.raises(PromptError, match="line 1: the prompt is empty"):
        read(tmp_path, byte_tokenizer(), [{"text": ""}], 4, "windows")
