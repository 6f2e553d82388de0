"""Prompts as token ids: the same as one by one, limits, BOS, buffers that leave memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import byte_tokenizer, write_records
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nla_engine.demo.run import TRIO
from nla_engine.errors import PromptError, WriteError
from nla_engine.models import prompt_set
from nla_engine.models import prompts as stage
from nla_engine.models.load import load_tokenizer, tokenizer_fingerprint
from nla_engine.models.prompts import Limits, read_prompts

TOKENIZER = byte_tokenizer()


def texts(path: Path, **kwargs: object) -> list[str]:
    found = read_prompts(path, TOKENIZER, **kwargs)  # type: ignore[arg-type]
    return [TOKENIZER.decode(prompt.token_ids) for prompt in found]


def starting_tokenizer() -> PreTrainedTokenizerFast:
    """Puts <|im_start|> before every text that is encoded with special tokens."""
    tokenizer = byte_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    return tokenizer


def test_records_are_kept_and_rendered(tmp_path: Path) -> None:
    records = [
        {"prompt": "37 × 46 = ?", "a": 37, "nested": {"x": [1, None, "ü"]}},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "id": "k"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n\n", encoding="utf-8"
    )
    found = read_prompts(path, TOKENIZER)
    assert [json.loads(prompt.source) for prompt in found] == records
    assert texts(path) == [
        "<|im_start|>user\n37 × 46 = ?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert found.notes == []


def test_raw_takes_the_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\n\n  two \n㈎\n", encoding="utf-8")
    assert texts(path, chat=False) == ["one", "  two ", "㈎"]
    assert read_prompts(path, byte_tokenizer(chat=False))[0].token_ids.tolist() == TOKENIZER.encode("one")


@pytest.mark.parametrize("chat", [True, False])
def test_ids_are_those_of_one_text_at_a_time(tmp_path: Path, monkeypatch, chat: bool) -> None:
    """The bundled tokenizer, batches that end in the middle of the file, and a text longer than a batch."""
    monkeypatch.setattr(stage, "BATCH", (7, 300))
    tokenizer = load_tokenizer(TRIO / "base")
    rng = np.random.default_rng(0)
    words = ["What is", " 37", " times 46?", "\n", " ", "é", "㈎", "<|im_end|>", "日本", "\t", "a" * 40]
    written = ["x" + "".join(rng.choice(words, rng.integers(1, 20))) for _ in range(50)] + ["y" * 2000]
    path = write_records(tmp_path, [{"prompt": text} for text in written])
    found = read_prompts(path, tokenizer, chat=chat)
    for text, prompt in zip(written, found, strict=True):
        if chat:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.token_ids.tolist() == tokenizer.encode(text, add_special_tokens=not chat)
    assert found.sizes.tolist() == [len(prompt.token_ids) for prompt in found]


def test_truncation_and_padding_of_the_tokenizer_are_not_applied(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    plain = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer_fingerprint(tokenizer)
    path = tmp_path / "p.txt"
    path.write_text("abcdefghijkl\nab\n")
    assert read_prompts(path, tokenizer, chat=False).sizes.tolist() == [12, 2]
    assert tokenizer_fingerprint(tokenizer) == before == plain
    tokenizer.add_tokens(["<extra>"])
    assert tokenizer_fingerprint(tokenizer) != plain


def test_the_fingerprint_leaves_the_tokenizer_as_it_is() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer_fingerprint(tokenizer)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3


def test_bos_is_given_once_in_both_ways(tmp_path: Path) -> None:
    tokenizer = starting_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    path = tmp_path / "p.txt"
    path.write_text("a")
    for chat in (True, False):
        ids = read_prompts(path, tokenizer, chat=chat)[0].token_ids
        assert ids[0] == start and ids[1] != start


def test_a_raw_prompt_that_brings_its_bos_gets_no_second(tmp_path: Path) -> None:
    tokenizer = starting_tokenizer()
    start, a = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.encode("a")[-1]
    path = tmp_path / "p.txt"
    path.write_text("a\n<|im_start|>a\n<|im_start|><|im_start|>a\n<|im_start|>\n")
    found = read_prompts(path, tokenizer, chat=False)
    ids = [prompt.token_ids.tolist() for prompt in found]
    assert ids == [[start, a], [start, a], [start, start, a], [start]]
    assert found.notes == [
        "3 of 4 prompts begin with '<|im_start|>' themselves: it is not put before them again"
    ]
    path.write_text("<|im_start|><|im_start|>a\n")
    assert read_prompts(path, byte_tokenizer(), chat=False)[0].token_ids.tolist() == [start, start, a]


def test_a_token_beyond_the_embedding_is_found_before_anything_runs(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    path = write_records(tmp_path, [{"prompt": "a"}, {"prompt": "b <extra>"}, {"prompt": "c"}])
    assert len(read_prompts(path, tokenizer, limits=Limits(vocabulary=rows + 1))) == 3
    with pytest.raises(PromptError, match=rf"line 2: token {rows} \('<extra>'\) has no row .* has {rows}:"):
        read_prompts(path, tokenizer, limits=Limits(vocabulary=rows))
    found = read_prompts(path, tokenizer, limits=Limits(vocabulary=rows), skip_bad=True)
    assert len(found) == 2 and len(found.skipped) == 1 and "line 2" in found.skipped[0]


def test_a_vocabulary_with_a_hole_is_judged_by_the_id_itself(tmp_path: Path) -> None:
    """The highest id is above the number of tokens: what counts is the row of the embedding."""
    core = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert len(tokenizer) == 2
    path = write_records(tmp_path, [{"prompt": "a b"}])
    assert read_prompts(path, tokenizer, limits=Limits(vocabulary=10))[0].token_ids.tolist() == [0, 9]
    with pytest.raises(PromptError, match="token 9"):
        read_prompts(path, tokenizer, limits=Limits(vocabulary=9))


def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path: Path) -> None:
    core = Tokenizer(
        models.WordLevel({"yes": 0}, unk_token="<unk>")
    )  # the unknown token is not in the vocabulary
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    path = write_records(tmp_path, [{"prompt": "yes"}, {"prompt": "no"}, {"prompt": "yes yes"}])
    with pytest.raises(PromptError, match="line 2: the tokenizer refuses it"):
        read_prompts(path, tokenizer)
    assert read_prompts(path, tokenizer, skip_bad=True).sizes.tolist() == [1, 2]


def test_the_first_fault_of_the_file_is_told(tmp_path: Path) -> None:
    """A text that is too long waits to be encoded while a record behind it cannot even be read."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "' + "a" * 99 + '"}\nnonsense\n')
    with pytest.raises(PromptError, match=r"line 1: the prompt has \d+ tokens, the limit is 60"):
        read_prompts(path, TOKENIZER, limits=Limits(60))


def test_missing_file_and_missing_template(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl", TOKENIZER)
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(PromptError, match="no chat template"):
        read_prompts(tmp_path / "p.txt", byte_tokenizer(chat=False), chat=True)
    with pytest.raises(PromptError, match="lower --max-new-tokens"):
        read_prompts(tmp_path / "p.txt", TOKENIZER, limits=Limits(0))


def test_bad_records_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nnonsense\n{"x": 1}\n{"prompt": "b"}\n')
    found = read_prompts(path, TOKENIZER, skip_bad=True)
    assert len(found) == 2
    assert [message.split(": ")[0][-6:] for message in found.skipped] == ["line 2", "line 3"]
    path.write_text("nonsense\n")
    with pytest.raises(PromptError, match=r"no usable prompt in it \(1 skipped\)"):
        read_prompts(path, TOKENIZER, skip_bad=True)


def test_common_prefix(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    for text, size in (
        ("abcX\nabc\nabcde", 2),
        ("abc", 0),
        ("abc\nabc", 2),
        ("xbc\nabc", 0),
        ("ab\nabcd\nabX", 1),
    ):
        path.write_text(text)
        assert read_prompts(path, TOKENIZER, chat=False).common_prefix() == size, text


def test_prompts_leave_memory_and_come_back(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(300)))
    whole = read_prompts(path, TOKENIZER, chat=False)
    monkeypatch.setattr(prompt_set, "SPOOL_BYTES", 100)
    spooled = read_prompts(path, TOKENIZER, chat=False)
    assert spooled._ids._file._rolled and not whole._ids._file._rolled
    assert spooled.fingerprint() == whole.fingerprint()
    for number in (299, 0, 150, -1):
        assert spooled[number].source == whole[number].source
        assert TOKENIZER.decode(spooled.token_ids(number)) == f"prompt {number % 300}"
    assert [TOKENIZER.decode(p.token_ids) for p in spooled[297:]] == [
        "prompt 297",
        "prompt 298",
        "prompt 299",
    ]
    with pytest.raises(IndexError):
        spooled[300]


def test_a_large_file_is_held_in_little_memory(tmp_path: Path, monkeypatch) -> None:
    """800,000 tokens: a tuple of Python integers each would take 29 MB, and the texts another MB."""
    monkeypatch.setattr(prompt_set, "SPOOL_BYTES", 1 << 16)
    monkeypatch.setattr(stage, "BATCH", (100, 1 << 16))
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"{i:04d}" + "ab" * 198 for i in range(2000)))
    read_prompts(path, TOKENIZER, chat=False)  # what is made once stays out of the measurement
    tracemalloc.start()
    found = read_prompts(path, TOKENIZER, chat=False)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.sizes.sum() == 800_000
    assert held < 1 << 19 and peak < 8 << 20


def test_a_full_disk_is_failed_work(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\n")

    class Full:
        def __init__(self, **_: object) -> None:
            self.close = self.seek = lambda *_: None

        def write(self, piece: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_set.tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(WriteError, match="No space left on device.*TMPDIR"):
        read_prompts(path, TOKENIZER)


def test_the_fingerprint_tells_ids_and_records_apart(tmp_path: Path) -> None:
    prints = set()
    for records in (
        [{"prompt": "ab"}],
        [{"prompt": "ab", "n": 1}],
        [{"prompt": "a"}, {"prompt": "b"}],
        [{"prompt": "b"}, {"prompt": "a"}],
    ):
        prints.add(read_prompts(write_records(tmp_path, records), TOKENIZER).fingerprint())
    assert len(prints) == 4
