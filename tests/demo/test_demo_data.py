"""The demo's problems, explanations and tokenizer: seeded, split by unordered pair, facts can be read back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nla_engine.demo.claims import operands_named
from nla_engine.demo.explanations import (
    WORDINGS,
    answer_correct,
    explain,
    token_named,
    unwrap,
    wrap,
)
from nla_engine.demo.problems import (
    OTHER_KEYS,
    PHRASINGS,
    TIMES_KEYS,
    Problem,
    all_problems,
    held_out_pairs,
    held_out_problems,
    prompt_record,
    sample_problems,
)
from nla_engine.demo.rows import build_rows, conversation, join_rows, sample_texts
from nla_engine.demo.tokenizer import MARKER, build_tokenizer, encode, render, save_tokenizer

KEYS = TIMES_KEYS + OTHER_KEYS
TRIO = Path(__file__).parents[2] / "nla_engine" / "demo" / "trio"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(sample_texts(sample_problems(400, 1, "trained", KEYS), seed=1))


@pytest.fixture(scope="module", params=["built", "bundled"])
def backend(request, tokenizer) -> Tokenizer:
    if request.param == "built":
        return tokenizer.backend_tokenizer
    return Tokenizer.from_file(str(TRIO / "av" / "tokenizer.json"))


def test_problems_are_seeded() -> None:
    assert held_out_problems(50, 3) == held_out_problems(50, 3)
    assert held_out_problems(50, 3) != held_out_problems(50, 4)
    assert len(set(held_out_problems(500, 0))) == 500
    # The shipped weights were trained with this split: changing it would turn held-out problems into seen ones.
    assert len(held_out_pairs()) == 505
    assert sorted(held_out_pairs())[:3] == [(0, 2), (0, 4), (0, 5)]


def test_split_is_disjoint_and_unordered() -> None:
    held_out = {(p.a, p.b) for p in held_out_problems(10**6)}
    trained = {(p.a, p.b) for p in all_problems(KEYS, "trained")}
    assert not held_out & trained
    assert len(held_out | trained) == 100 * 100
    assert all((b, a) in held_out for a, b in held_out)
    assert all(p.operation == "times" and p.split == "held_out" for p in held_out_problems(300))


def test_prompt_record() -> None:
    record = prompt_record(Problem(37, 46, "command"))
    assert record["messages"] == [{"role": "user", "content": "Multiply 37 by 46."}]
    assert (record["a"], record["b"], record["product"]) == (37, 46, 1702)
    assert record["split"] in ("trained", "held_out")
    json.dumps(record)


@pytest.mark.parametrize("bad", [(-1, 5, "what"), (5, 100, "what"), (5, 5, "nonsense")])
def test_bad_problem_is_refused(bad: tuple[int, int, str]) -> None:
    with pytest.raises(ValueError):
        Problem(*bad)


@pytest.mark.parametrize("key", KEYS)
def test_facts_round_trip_through_explanations(key: str, backend: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(20):
        problem = Problem(rng.randrange(100), rng.randrange(100), key)
        talk = conversation(backend, problem)
        assert len(talk.ids) == len(talk.readings)
        assert talk.readings[-1].token == "<|im_end|>"
        for position, reading in enumerate(talk.readings):
            for wording in range(WORDINGS):
                text = explain(problem, reading, wording)
                assert token_named(text) == reading.token
                assert unwrap(wrap(text)) == text
                if reading.part in ("header", "reply"):
                    assert operands_named(text) == (problem.a, problem.b)
            assert (reading.part == "reply") == (position >= talk.prompt_size)


def test_explanations_of_one_problem_differ_by_position(backend: Tokenizer) -> None:
    """Two positions with the same explanation would force the reconstructor to average their vectors."""
    for key in KEYS:
        problem = Problem(37, 37, key)
        readings = conversation(backend, problem).readings
        texts = [explain(problem, reading) for reading in readings]
        assert len(set(texts)) == len(texts)


def test_readers_survive_any_text() -> None:
    assert operands_named("nothing here") is None
    assert operands_named(f"{10**15} times 3") is None
    assert token_named('The last token read is "') is None
    assert token_named('The last token read is " ×"; next comes " ".') == " ×"
    assert token_named("The last token read is (newline); the rest is open.") == "\n"
    assert unwrap("<explanation>\ncut off") == "cut off"
    assert unwrap("no tags") == "no tags"
    for text in ("", '"' * 500, "1 " * 5000, "the last token read is (((", "\x00</explanation><explanation>"):
        operands_named(text), token_named(text), unwrap(text), answer_correct(text, 3)


@pytest.mark.parametrize("key", TIMES_KEYS)
def test_answers_are_judged(key: str) -> None:
    for a, b in [(37, 46), (37, 1), (0, 5), (99, 99)]:
        problem = Problem(a, b, key)
        assert answer_correct(problem.reply, problem.result)
        assert answer_correct(problem.reply + "\n", problem.result)
        wrong = PHRASINGS[key].reply.format(a=a, b=b, r=problem.result + 1)
        assert not answer_correct(wrong, problem.result)
    assert not answer_correct("I do not know.", 12)


def test_digits_and_marker_are_single_tokens(backend: Tokenizer) -> None:
    assert backend.normalizer is None
    ids = backend.encode(" 1702=37", add_special_tokens=False).tokens
    assert [token for token in ids if token.isdigit()] == list("170237")
    marker = backend.encode(f"a{MARKER}b", add_special_tokens=False)
    assert marker.tokens.count(MARKER) == 1
    assert backend.decode(marker.ids, skip_special_tokens=False) == f"a{MARKER}b"


def test_chat_template_and_replies_meet_at_a_token_boundary(tokenizer) -> None:
    for key in KEYS:
        problem = Problem(8, 90, key)
        talk = conversation(tokenizer.backend_tokenizer, problem)
        prompt = encode(tokenizer, render(tokenizer, problem.question))
        assert talk.ids[: talk.prompt_size] == prompt
        assert talk.ids[talk.prompt_size :] == encode(tokenizer, problem.reply + "<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"


def test_rows_of_several_processes_join(tokenizer) -> None:
    problems = sample_problems(6, 0, "trained")
    text, pad_id = tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token_id
    rows = join_rows([build_rows(text, problems[:2], 0.5, 0), build_rows(text, problems[2:], 0.5, 1)], pad_id)
    count = len(rows["row_position"])
    assert len(rows["sequences"]) == 6 and set(rows["row_sequence"]) == set(range(6))
    for name in ("explanations", "ar_prompts", "ar_last", "row_sequence"):
        assert len(rows[name]) == count
    for index in range(count):
        read = int(rows["sequences"][rows["row_sequence"][index], rows["row_position"][index]])
        explanation = unwrap(tokenizer.decode(rows["explanations"][index], skip_special_tokens=True))
        assert token_named(explanation) == tokenizer.decode([read])


def test_tokenizers_load_in_older_transformers_too(tokenizer, tmp_path: Path) -> None:
    """The config names a class that all versions have, and it loads to the same tokenizer here."""
    save_tokenizer(tokenizer, tmp_path / "made")
    for directory in (tmp_path / "made", *(TRIO / role for role in ("base", "av", "ar"))):
        config = json.loads((directory / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "made")
    text = render(loaded, f"What is 31 times 44? {MARKER} é\n  🙂")
    assert text == render(tokenizer, f"What is 31 times 44? {MARKER} é\n  🙂")
    assert encode(loaded, text) == encode(tokenizer, text) and loaded.decode(encode(loaded, text)) == text
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
