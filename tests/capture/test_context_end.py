"""`--max-new-tokens max`: every reply may go on to the end of the model's context. Compared with plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, check_refused
from tiny import byte_tokenizer, language_model, save_model, tiny_model, write_records

from nla_engine.capture import estimate as dry
from nla_engine.capture import run as stage
from nla_engine.capture.estimate import estimate_capture
from nla_engine.capture.reply_limits import context_size, reply_limits
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.errors import PromptError, RequestError, StoreError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.store import CaptureStore, Finish
from nla_engine.store.care.verify import verify

CONTEXT = 120


@pytest.fixture
def lm() -> LanguageModel:
    model = tiny_model("qwen2")
    model.config.max_position_embeddings = CONTEXT
    return wrap_model(model, byte_tokenizer(), name="tiny")


def options(directory: Path, rng: np.random.Generator | None = None, **changes: Any) -> CaptureOptions:
    """Raw prompts of random letters. The longest leaves room for one token."""
    if rng is not None:
        sizes = [CONTEXT - 1, 7, *rng.integers(1, CONTEXT - 1, 7).tolist()]
        texts = ["".join(map(chr, rng.integers(97, 123, size))) for size in sizes]
        write_records(directory, [{"prompt": text} for text in texts])
    given = {"model": "m", "layer": (1,), "codec": "bf16", "chat": False, "batch_size": 4}
    given |= {"prompts": directory / "p.jsonl", "out": str(directory / "run.zarr"), "max_new_tokens": "max"}
    return CaptureOptions(**{**given, **changes})


@torch.no_grad()
def reply(lm: LanguageModel, prompt: np.ndarray, eos_ids: tuple[int, ...]) -> list[int]:
    """By transformers' own generation, as far as the context goes."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    made = lm.model.generate(
        ids,
        max_new_tokens=CONTEXT - len(prompt),
        do_sample=False,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kernels", ["auto", "library"])
def test_each_reply_is_that_of_transformers(
    kernels: str, tmp_path: Path, rng: np.random.Generator, lm: LanguageModel
) -> None:
    run_capture(options(tmp_path, rng, kernels=kernels), lm=lm)
    store = CaptureStore.open(tmp_path / "run.zarr")
    sequences = list(store.iter_sequences())
    assert len(sequences) == 9
    lm.model.set_attn_implementation("eager")
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_size]
        expected = reply(lm, prompt, lm.eos_ids)
        assert sequence.tokens[sequence.prompt_size :].tolist() == expected
        cut = len(sequence.tokens) == CONTEXT and expected[-1] not in lm.eos_ids
        assert sequence.finish == (Finish.LENGTH if cut else Finish.EOS)
        with torch.no_grad():
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
            rows = lm.model(ids, output_hidden_states=True).hidden_states[2][0, sequence.prompt_size :]
        assert np.allclose(store.layer(1)[sequence.rows], rows.numpy(), atol=0.05, rtol=0.02)
    assert len(sequences[0].tokens) == CONTEXT
    assert all(check.ok for check in verify(store.path))


def test_a_run_resumes_with_the_same_context_only(
    tmp_path: Path, rng: np.random.Generator, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = options(tmp_path, rng, out=str(tmp_path / "whole.zarr"))
    run_capture(whole, lm=lm)

    class Cut(stage.Appender):
        def add(self, ended: Any) -> None:
            super().add(ended)
            if self.sequences >= 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(stage, "Appender", Cut)
        with pytest.raises(KeyboardInterrupt):
            run_capture(options(tmp_path), lm=lm)
    assert 0 < CaptureStore.open(tmp_path / "run.zarr").sequences < 9
    lm.model.config.max_position_embeddings = CONTEXT + 8
    with pytest.raises(StoreError, match="context"):
        run_capture(options(tmp_path, resume=True), lm=lm)
    lm.model.config.max_position_embeddings = CONTEXT
    write_short = options(tmp_path, resume=True, max_new_tokens=1)
    with pytest.raises(StoreError, match="max_new_tokens"):
        run_capture(write_short, lm=lm)
    run_capture(options(tmp_path, resume=True), lm=lm)
    a, b = CaptureStore.open(tmp_path / "run.zarr"), CaptureStore.open(tmp_path / "whole.zarr")
    assert [s.tokens.tolist() for s in a.iter_sequences()] == [s.tokens.tolist() for s in b.iter_sequences()]


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["at once", "in time"])
def test_a_dry_run_expects_what_it_saw_or_says_that_it_saw_no_end(
    seconds: float,
    tmp_path: Path,
    rng: np.random.Generator,
    lm: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without an end token no reply ends before its limit. With one, at least the reply does from which it is taken."""
    monkeypatch.setattr(LanguageModel, "eos_ids", ())
    given = options(tmp_path, rng, batch_size=None, dry_run=True)
    _, prompts = stage.load_inputs(given, lm)
    most = CONTEXT - prompts.sizes
    assert int(most.max()) >= 3
    monkeypatch.setattr(dry, "MOST_SECONDS", seconds)
    said: list[str] = []
    found = estimate_capture(given, lm=lm, announce=said.append)
    assert found.rows == found.rows_expected == most.sum()
    assert found.reply_tokens_expected == pytest.approx(most.mean(), abs=0.06)
    assert any("no reply ended" in line for line in said)
    monkeypatch.setattr(LanguageModel, "eos_ids", (reply(lm, prompts.token_ids(int(most.argmax())), ())[1],))
    said.clear()
    found = estimate_capture(given, lm=lm, announce=said.append)
    assert found.rows == most.sum()
    if seconds:
        assert 0 < found.rows_expected < found.rows
        assert not any("no reply ended" in line for line in said)
    run_capture(options(tmp_path), lm=lm)
    assert CaptureStore.open(tmp_path / "run.zarr").rows <= found.rows


def test_what_has_no_room_is_refused(tmp_path: Path, lm: LanguageModel) -> None:
    write_records(tmp_path, [{"prompt": "a" * CONTEXT}])
    with pytest.raises(PromptError, match=f"the limit is {CONTEXT - 1}"):
        run_capture(options(tmp_path), lm=lm)
    write_records(tmp_path, [{"prompt": "a"}])
    lm.model.config.max_position_embeddings = 0
    with pytest.raises(RequestError, match="does not state how many positions it has: give a number"):
        run_capture(options(tmp_path), lm=lm)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_rotation_that_changes_with_the_length_ends_the_context(tmp_path: Path) -> None:
    """Phi-3's longrope: a sequence must stay below the length from which on all of a batch are rotated otherwise."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    lm = language_model(
        "Phi3Config", original_max_position_embeddings=64, rope_scaling=scaling, max_position_embeddings=256
    )
    assert context_size(lm) == 63
    write_records(tmp_path, [{"prompt": "abc"}, {"prompt": "a" * 62}])
    given = options(tmp_path)
    assert reply_limits(given, lm, np.array([3, 62])).tolist() == [60, 1]
    run_capture(given, lm=lm)
    assert max(len(s.tokens) for s in CaptureStore.open(given.out).iter_sequences()) <= 63


@pytest.mark.parametrize("given", ["-1", "most", "1.5", "", "0x10"])
def test_what_is_no_length_is_refused(given: str, tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    write_records(tmp_path, [{"prompt": "abc"}])
    ran = call(
        "capture", tmp_path / "base", "--prompts", tmp_path / "p.jsonl", "--layer", 1, "--out", tmp_path / "x.zarr",
        f"--max-new-tokens={given}",
    )  # fmt: skip
    check_refused(ran, f"--max-new-tokens is {given or 'empty'}: it must be 0 or more, or max")
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("given", [-1, 1.5, True, None])
def test_so_is_it_in_python(given: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="it must be 0 or more, or max"):
        options(tmp_path, max_new_tokens=given)


def test_text_that_is_only_read_has_no_replies(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="generates nothing"):
        options(tmp_path, chat=None, corpus=True)
