"""The model and its prompts: read while the weights load, checked by the loaded model, rendered as of the first run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from commands import written
from tiny import DATED, save_model, tiny_model, write_prompts, write_records

from nla_engine.capture import load
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.errors import CheckpointError, PromptError, RequestError, StoreError
from nla_engine.models import prompts as reading
from nla_engine.models.load import LanguageModel
from nla_engine.store import CaptureStore


def options(tmp_path: Path, **changes: Any) -> CaptureOptions:
    if not (tmp_path / "base").exists():
        save_model(tmp_path / "base")
    if "prompts" not in changes:
        changes["prompts"] = write_prompts(tmp_path / "prompts.jsonl")
    base: dict[str, Any] = {
        "model": str(tmp_path / "base"),
        "layer": (1,),
        "max_new_tokens": 4,
        "device": "cpu",
    }
    return CaptureOptions(**{**base, "out": str(tmp_path / "run.zarr"), **changes})


@pytest.fixture
def reads(monkeypatch) -> list[reading.Limits]:
    """The limits of each reading of the prompts."""
    seen = []
    real = load.read_prompts

    def spy(*args: Any, **how: Any) -> Any:
        seen.append(how["limits"])
        return real(*args, **how)

    monkeypatch.setattr(load, "read_prompts", spy)
    return seen


def test_prompts_are_checked_before_the_weights_are_loaded(tmp_path: Path, monkeypatch, reads) -> None:
    """A wrong record, and weights that cannot be read: the record is told, and nothing was loaded."""
    given = options(tmp_path)
    lm, prompts = load.load_inputs(given)
    assert len(prompts) == 12 and reads == [reading.Limits(512 - 4, lm.vocab_size)]
    asked: list[str] = []
    monkeypatch.setattr(load, "load_model", lambda name, **_: asked.append(name))
    wrong = written(tmp_path / "wrong.jsonl", '{"prompt": "a"}\nnonsense\n')
    with pytest.raises(PromptError, match="line 2: not JSON"):
        load.load_inputs(options(tmp_path, prompts=wrong))
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    with pytest.raises(PromptError, match="the prompt has"):
        load.load_inputs(options(tmp_path, max_new_tokens=500))
    assert asked == []
    with pytest.raises(PromptError, match="no such file"):
        load.load_inputs(options(tmp_path, prompts=tmp_path / "none.jsonl", model=str(tmp_path / "none")))


def test_the_loaded_model_decides_what_it_can_read(tmp_path: Path, monkeypatch, reads) -> None:
    """Its configuration promises more positions than the model allows."""
    prompts = write_records(tmp_path, [{"prompt": "a" * 300}])
    monkeypatch.setattr(LanguageModel, "max_length", property(lambda _: 200))
    with pytest.raises(PromptError, match="the limit is 196"):
        load.load_inputs(options(tmp_path, prompts=prompts))
    assert [limits.tokens for limits in reads] == [508, 196]


def test_then_the_model_is_judged(tmp_path: Path) -> None:
    given = options(tmp_path, layer=(9,))
    with pytest.raises(RequestError, match="layer 9 does not exist"):
        load.load_inputs(given)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load.load_inputs(given)
    with pytest.raises(CheckpointError, match="no such directory"):
        load.load_inputs(options(tmp_path, model=str(tmp_path / "none")))


def test_a_fault_of_the_prompts_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\nnonsense\n')
    with pytest.raises(PromptError, match="line 2: not JSON"):
        load.load_inputs(options(tmp_path, prompts=tmp_path / "p.jsonl"))


def test_an_embedding_shorter_than_the_vocabulary(tmp_path: Path) -> None:
    """A token was added to the tokenizer alone; the last of several prompts holds it."""
    from transformers import AutoTokenizer

    given = options(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(given.model)
    prompts = write_records(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c <extra>"}])
    with pytest.raises(PromptError, match=r"line 3: token 260 \('<extra>'\) has no row"):
        run_capture(options(tmp_path, prompts=prompts))
    assert not (tmp_path / "run.zarr").exists()
    said: list[str] = []
    summary = run_capture(options(tmp_path, prompts=prompts, skip_bad=True), announce=said.append)
    assert (summary.sequences, summary.skipped) == (2, 1)
    assert next(line for line in said if line.startswith("skipped")).count("line 3: token 260")


class Day(datetime):
    """Stands in for the clock."""

    today = 1

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime(2031, 1, cls.today)


def test_a_resumed_run_renders_with_the_time_of_the_first(tmp_path: Path, monkeypatch) -> None:
    """The run is cut after its first commit and resumes the next day: every prompt says the first day."""
    from tiny import byte_tokenizer

    from nla_engine.capture import run as capture
    from nla_engine.models.load import wrap_model

    monkeypatch.setattr(reading, "datetime", Day)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED
    lm = wrap_model(tiny_model("qwen2"), tokenizer, name="dated")
    given = options(tmp_path, batch_size=3, layer=(1,))

    class Cut(capture.Appender):
        def add(self, ended: Any) -> None:
            super().add(ended)
            if self.sequences:
                raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(capture, "Appender", Cut)
        with pytest.raises(KeyboardInterrupt):
            run_capture(given, lm=lm)
    store = CaptureStore.open(given.out)
    assert 0 < store.sequences < 12 and store.provenance[load.CLOCK] == "2031-01-01T00:00:00"
    Day.today = 2
    run_capture(options(tmp_path, batch_size=3, resume=True), lm=lm)
    texts = [sequence.prompt_text() for sequence in CaptureStore.open(given.out).iter_sequences()]
    assert len(texts) == 12 and all(text.startswith("Today: 01 Jan 2031") for text in texts)
    run_capture(options(tmp_path, overwrite=True), lm=lm)
    assert CaptureStore.open(given.out).sequence(0).prompt_text().startswith("Today: 02 Jan 2031")
    tokenizer.chat_template = "Other. " + DATED
    with pytest.raises(StoreError, match="the content of prompts differs"):
        run_capture(options(tmp_path, resume=True), lm=lm)


def test_notes_are_said_at_the_start(tmp_path: Path) -> None:
    from nla_engine.capture.estimate import estimate_capture

    answered = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "It is"}]
    prompts = write_records(tmp_path, [{"messages": answered}])
    for run, more in ((run_capture, {}), (estimate_capture, {"dry_run": True, "out": str(tmp_path / "x")})):
        said: list[str] = []
        run(options(tmp_path, prompts=prompts, **more), announce=said.append)
        assert "1 of 1 prompts end with the assistant's words: they are continued" in said
    store = CaptureStore.open(tmp_path / "run.zarr")
    assert store.sequence(0).prompt_text().endswith("assistant\nIt is")
    how = {"max_new_tokens": 0, "positions": "last", "overwrite": True}
    run_capture(options(tmp_path, prompts=prompts, **how))
    assert (
        CaptureStore.open(tmp_path / "run.zarr").sequence(0).text().endswith("assistant\nIt is<|im_end|>\n")
    )


def test_what_costs_nothing_to_refuse_comes_before_the_model_is_fetched(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    def find(name: str, *_: Any, **__: Any) -> Path:
        asked.append(name)
        raise CheckpointError(f"{name}: gated")

    monkeypatch.setattr(load, "find_source", find)
    for wrong in ({"device": "cuda:9"}, {"dtype": "int3"}):
        with pytest.raises(RequestError):
            load.load_inputs(options(tmp_path, **wrong))
    assert asked == []
    with pytest.raises(CheckpointError, match="gated"):
        load.load_inputs(options(tmp_path))
    assert len(asked) == 1  # and only once
