"""Replies: several of a prompt, begun by the user, ended by a text. Compared with plain transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, capture, check_refused, json_lines
from tiny import byte_tokenizer, tiny_model, write_prompts, write_records

from nla_engine.capture.audit import audit
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine.generator import Generator
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.store import CaptureStore, Finish
from nla_engine.store.care.verify import verify


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")


def options(tmp_path: Path, **changes: Any) -> CaptureOptions:
    if "prompts" not in changes:
        changes["prompts"] = write_prompts(tmp_path / "prompts.jsonl", 4)
    base: dict[str, Any] = {
        "model": "in memory",
        "layer": (1,),
        "out": str(tmp_path / "run.zarr"),
        "codec": "bf16",
    }
    return CaptureOptions(**{**base, "max_new_tokens": 12, "batch_size": 5, **changes})


def made(tmp_path: Path, lm: LanguageModel, **changes: Any) -> CaptureStore:
    run_capture(options(tmp_path, **changes), lm=lm)
    return CaptureStore.open(changes.get("out", tmp_path / "run.zarr"))


@torch.no_grad()
def rows_of(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """hidden_states[2] of one sequence, by transformers alone: float32 [t, d]."""
    lm.model.set_attn_implementation("eager")
    return (
        lm.model(torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True)
        .hidden_states[2][0]
        .numpy()
    )


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_each_reply_is_a_sequence_with_rows_of_its_own(
    positions: str, tmp_path: Path, lm: LanguageModel, monkeypatch
) -> None:
    """Prompts are read once where no row of them is kept, and the rows are those of transformers either way."""
    again: list[bool] = []
    check = Generator._check
    monkeypatch.setattr(Generator, "_check", lambda self, r: (again.append(r.again), check(self, r))[1])
    store = made(tmp_path, lm, replies=3, temperature=1.0, positions=positions, seed=7)
    assert sum(again) == (8 if positions == "generated" else 0)  # two of three of each of 4 prompts
    assert store.sequences == 12
    given = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    texts = []
    for number, sequence in enumerate(store.iter_sequences()):
        prompt, reply = divmod(number, 3)
        assert sequence.source == {**given[prompt], "nla_reply": {"prompt": prompt, "reply": reply}}
        first = sequence.prompt_size if positions == "generated" else 0
        rows = store.layer(1)[sequence.rows]
        assert np.allclose(rows, rows_of(lm, sequence.tokens)[first:], atol=0.05, rtol=0.02)
        assert store.column("position")[sequence.rows].tolist() == list(range(first, len(sequence.tokens)))
        texts.append(sequence.generated_text())
    assert all(len(set(texts[i : i + 3])) == 3 for i in range(0, 12, 3)), "each has its own random numbers"
    assert all(check.ok for check in [*verify(store.path), *audit(store, lm)])
    assert (
        store.where("record.nla_reply.reply == 2").tolist()
        == np.flatnonzero(store.column("sequence") % 3 == 2).tolist()
    )


def test_replies_are_the_same_however_their_prompts_are_read(tmp_path: Path, lm: LanguageModel) -> None:
    """With rows of prompts or without, in one slot or in many."""
    texts = []
    for number, how in enumerate(({"positions": "all"}, {"batch_size": 1}, {"batch_size": 12})):
        out = tmp_path / f"{number}.zarr"
        store = made(tmp_path, lm, replies=3, temperature=0.8, seed=3, out=str(out), **how)
        texts.append([sequence.tokens.tolist() for sequence in store.iter_sequences()])
    assert texts[0] == texts[1] == texts[2]


def test_replies_resume(tmp_path: Path, lm: LanguageModel, monkeypatch) -> None:
    """Cut in the middle of a prompt's replies, the rest is the same."""
    from nla_engine.capture import run as stage

    how: dict[str, Any] = {"replies": 3, "temperature": 1.0, "batch_size": 2}
    whole = made(tmp_path, lm, out=str(tmp_path / "whole.zarr"), **how)

    class Cut(stage.Appender):
        def add(self, ended: Any) -> None:
            super().add(ended)
            if self.sequences >= 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(stage, "Appender", Cut)
        with pytest.raises(KeyboardInterrupt):
            run_capture(options(tmp_path, **how), lm=lm)
    assert 0 < CaptureStore.open(tmp_path / "run.zarr").sequences < 12
    again = made(tmp_path, lm, resume=True, **how)
    assert [s.tokens.tolist() for s in again.iter_sequences()] == [
        s.tokens.tolist() for s in whole.iter_sequences()
    ]
    assert np.array_equal(again.layer(1)[:], whole.layer(1)[:])


def test_per_document_draws_for_each_reply(tmp_path: Path, lm: LanguageModel) -> None:
    store = made(tmp_path, lm, replies=2, temperature=1.0, per_document=2)
    assert store.row_sizes().tolist() == [2] * 8


def test_a_reply_ends_as_soon_as_it_holds_a_stop_text(tmp_path: Path, lm: LanguageModel) -> None:
    """The texts are taken from replies without one: longer ones span tokens. Cut by hand, the replies are the same."""
    free = list(made(tmp_path, lm, max_new_tokens=30).iter_sequences())
    texts = [sequence.generated_text() for sequence in free]
    found = [match for text in texts if (match := re.search("[ -~]{3}", text[2:]))]
    stops = (found[0][0], found[-1][0][:2])
    store = made(tmp_path, lm, max_new_tokens=30, stop=stops, overwrite=True)
    stopped = 0
    for before, sequence in zip(free, store.iter_sequences(), strict=True):
        new = before.tokens[before.prompt_size :]
        ends = [n for n in range(1, len(new) + 1) if any(s in before.vocabulary.join(new[:n]) for s in stops)]
        assert sequence.tokens[sequence.prompt_size :].tolist() == new[: ends[0] if ends else None].tolist()
        assert (sequence.finish == Finish.STOP) == bool(ends)
        stopped += bool(ends)
        rows = store.layer(1)[sequence.rows]
        assert np.allclose(rows, rows_of(lm, sequence.tokens)[sequence.prompt_size :], atol=0.05, rtol=0.02)
    assert stopped and store.provenance["options"]["stop"] == list(stops)


def test_a_stop_text_in_the_prompt_ends_nothing(tmp_path: Path, lm: LanguageModel) -> None:
    prompts = write_records(tmp_path, [{"prompt": "zebra"}])
    free = made(tmp_path, lm, prompts=prompts).sequence(0)
    assert "zebra" not in free.generated_text()
    assert made(tmp_path, lm, prompts=prompts, stop=("zebra",), overwrite=True).sequence(
        0
    ).tokens.tolist() == (free.tokens.tolist())


def test_a_reply_that_begins_with_given_words(tmp_path: Path, lm: LanguageModel) -> None:
    """The text is what transformers renders with continue_final_message; a record's own beginning comes first."""
    said: list[str] = []
    user = {"role": "user", "content": "U"}
    records = [
        {"prompt": "U"},
        {"prompt": "U", "prefill": "No,"},
        {"messages": [user, {"role": "assistant", "content": "It is"}]},
    ]
    prompts = write_records(tmp_path, records)
    run_capture(options(tmp_path, prompts=prompts, prefill="Yes, "), lm=lm, announce=said.append)
    store = CaptureStore.open(tmp_path / "run.zarr")
    for sequence, words in zip(store.iter_sequences(), ("Yes, ", "No,", "It is"), strict=True):
        begun = [user, {"role": "assistant", "content": words}]
        text = lm.tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
        assert sequence.prompt_text() == text and text.rstrip().endswith(words.strip())
    assert '1 of 3 prompts have "prefill": their reply begins with it' in said
    assert any("they keep them, and do not get those of --prefill" in line for line in said)
    shown = next(line for line in said if line.startswith("the first prompt"))
    assert shown.endswith("assistant\n    Yes, "), shown


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "U", "prefill": 3}, '"prefill" is not a text'),
        ({"prompt": "U", "prefill": " "}, '"prefill" is not a text'),
        (
            {
                "prefill": "a",
                "messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}],
            },
            "leave one out",
        ),
        ({"prompt": "U", "nla_reply": 1}, 'has a field "nla_reply", which is to say which reply this is'),
    ],
)
def test_records_that_cannot_be_used(record: object, message: str, root: Path, tmp_path: Path) -> None:
    prompts = json_lines(tmp_path / "p.jsonl", [record])
    command = capture(root, tmp_path / "x.zarr", prompts=prompts, replies=2, temperature=1.0)
    check_refused(call(*command), f"line 1: .*{message}")
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replies": 0}, "--replies is 0: it must be 1 or more"),
        ({"replies": 2}, "--replies above 1 .*: give a --temperature"),
        ({"stop": ""}, "--stop is : it must be text in UTF-8, and not empty"),
        ({"stop": "x" * 300}, "--stop: the stop strings are too long: .*: give shorter ones"),
        (
            {"stop": "x", "max_new_tokens": 0, "positions": "all"},
            "--replies, --stop and --keep-partial are for replies",
        ),
        ({"prefill": " "}, "--prefill is ' ': it must be text in UTF-8, and not blank"),
        ({"prefill": "a", "raw": True}, "--prefill .*are for a chat template"),
    ],
)
def test_options_that_cannot_be_met(changes: dict, message: str, root: Path, tmp_path: Path) -> None:
    check_refused(call(*capture(root, tmp_path / "x.zarr", **changes)), message)
    assert not (tmp_path / "x.zarr").exists()


def test_a_stop_text_is_part_of_the_run(tmp_path: Path, lm: LanguageModel) -> None:
    made(tmp_path, lm, stop=("q",))
    with pytest.raises(Exception, match="stop"):
        run_capture(options(tmp_path, stop=("r",), resume=True), lm=lm)
    run_capture(options(tmp_path, stop=("q",), resume=True), lm=lm)
    with pytest.raises(RequestError, match="give a --temperature"):
        options(tmp_path, replies=2)


def test_the_first_prompt_is_shown(root: Path, tmp_path: Path) -> None:
    """Before the run, in the dry run and by `info`: with special tokens, and safe in a terminal."""
    prompts = json_lines(tmp_path / "p.jsonl", [{"prompt": "A\x1b[2Jb" + "x" * 60}, {"prompt": "zebra"}])
    command = capture(root, tmp_path / "x.zarr", prompts=prompts, stop="zz")
    for ran in (call(*command, "--dry-run"), call(*command), call("info", tmp_path / "x.zarr")):
        assert ran.code == 0, ran.err
        text = ran.err + ran.out
        assert "first prompt" in text and "<|im_start|>user" in text and "A\\x1b[2Jb" in text
        assert "\x1b[2J" not in text and "zebra" not in text
    info = call("info", tmp_path / "x.zarr", "--json")
    assert info.json["first_prompt"].startswith("<|im_start|>user\nA\\x1b[2Jbxxx")
    assert "zz" in call("info", tmp_path / "x.zarr").out
