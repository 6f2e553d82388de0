"""`--keep-partial`: the rows of replies that had not ended when a run stopped, in a store beside that of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, capture, check_refused
from tiny import byte_tokenizer, save_model, tiny_model, write_prompts, write_records

from nla_engine.capture import run as stage
from nla_engine.capture.partial import partial_name
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine.generator import Generator
from nla_engine.errors import RequestError, StoreError, WriteError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.store import CaptureStore, Finish
from nla_engine.store.care.verify import verify

NEW = 40


@pytest.fixture
def lm() -> LanguageModel:
    return wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")


def options(directory: Path, **changes: Any) -> CaptureOptions:
    given: dict[str, Any] = {
        "model": "m",
        "layer": (0, 2),
        "codec": "bf16",
        "batch_size": 4,
        "positions": "all",
    }
    given |= {"prompts": directory / "p.jsonl", "out": str(directory / "run.zarr"), "max_new_tokens": NEW}
    return CaptureOptions(**{**given, "keep_partial": True, **changes})


def asked(directory: Path, rng: np.random.Generator) -> None:
    """Nine prompts of random letters."""
    texts = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(1, 60, 9)]
    write_records(directory, [{"prompt": text} for text in texts])


def stopped(
    given: CaptureOptions, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, turn: int, error: BaseException
) -> list[str]:
    """Run until the model has chosen tokens so often, then raise the error. Returns what was announced."""
    turns, said, real = 0, [], Generator._advance

    def stops(self: Generator, *more: Any) -> None:
        nonlocal turns
        turns += 1
        if turns == turn:
            raise error
        real(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_advance", stops)
        with pytest.raises(type(error)):
            run_capture(given, lm=lm, announce=said.append)
    return said


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("of the device")], ids=["Ctrl-C", "failure"]
)
@pytest.mark.parametrize(("positions", "codec"), [("all", "int8"), ("generated", "bf16")])
def test_the_rows_of_running_replies_are_kept_and_the_run_resumes(
    positions: str,
    codec: str,
    error: BaseException,
    tmp_path: Path,
    rng: np.random.Generator,
    lm: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is the beginning of what the resumed run stores, and its rows are those of transformers."""
    asked(tmp_path, rng)
    monkeypatch.setattr(LanguageModel, "eos_ids", ())  # no reply ends early
    how = {"positions": positions, "next_token": 2, "codec": codec}
    # Four prompts begin, end with token 40, and four more begin: these are in the middle.
    said = stopped(options(tmp_path, **how), lm, monkeypatch, NEW + 5 + int(rng.integers(30)), error)
    partial, done = CaptureStore.open(tmp_path / "run.partial.zarr"), CaptureStore.open(tmp_path / "run.zarr")
    assert partial.complete and not done.complete
    assert partial.sequences == 4 and not set(partial.numbers.tolist()) & set(done.numbers.tolist())
    assert any(f"4 unfinished sequences with {partial.rows:,} rows are kept in" in line for line in said)
    assert all(check.ok for check in verify(partial.path))
    run_capture(options(tmp_path, **how, resume=True, keep_partial=False), lm=lm)
    whole = CaptureStore.open(tmp_path / "run.zarr")
    assert whole.complete and whole.numbers.tolist() == list(range(9))
    assert all(check.ok for check in verify(whole.path))
    lm.model.set_attn_implementation("eager")
    for number in partial.numbers.tolist():
        some, all_ = partial.sequence(number), whole.sequence(number)
        size, count = len(some.tokens), some.rows.stop - some.rows.start
        assert some.finish == Finish.PARTIAL and some.source == all_.source
        assert some.prompt_size < size < len(all_.tokens)
        assert some.tokens.tolist() == all_.tokens[:size].tolist()
        first = 0 if positions == "all" else some.prompt_size
        assert partial.column("position")[some.rows].tolist() == list(range(first, size))
        with torch.no_grad():
            ids = torch.from_numpy(some.tokens.astype(np.int64))[None]
            states = lm.model(ids, output_hidden_states=True).hidden_states
        for layer in (0, 2):
            want = states[layer + 1][0, first:].numpy()
            off = np.linalg.norm(partial.layer(layer)[some.rows] - want, axis=1)
            assert (off < 0.03 * np.linalg.norm(want, axis=1)).all()
        ours, theirs = (s.column("next_logprob")[x.rows][:count] for s, x in ((partial, some), (whole, all_)))
        assert np.isnan(ours[-1]) and np.allclose(ours[:-1], theirs[:-1], atol=1e-3)


def test_a_stop_while_rows_are_written(
    tmp_path: Path, rng: np.random.Generator, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replies are to be longer than the first: they run when that one is appended."""
    asked(tmp_path, rng)
    ends = iter(range(9))

    class Cut(stage.Appender):
        def add(self, ended: Any) -> None:
            super().add(ended)
            if next(ends) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "eos_ids", ())
    monkeypatch.setattr(stage, "Appender", Cut)
    monkeypatch.setattr(
        stage,
        "reply_limits",
        lambda options, lm, sizes: np.array([5, NEW, 9, NEW, *[NEW] * (len(sizes) - 4)]),
    )
    with pytest.raises(KeyboardInterrupt):
        run_capture(options(tmp_path), lm=lm)
    done, partial = CaptureStore.open(tmp_path / "run.zarr"), CaptureStore.open(tmp_path / "run.partial.zarr")
    assert done.numbers.tolist() == [0, 2] and {1, 3} <= set(partial.numbers.tolist())
    assert all(check.ok for store in (done, partial) for check in verify(store.path))


def test_nothing_is_kept_unless_asked_and_nothing_of_prompts_that_were_being_read(
    tmp_path: Path, rng: np.random.Generator, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(tmp_path, rng)
    said = stopped(options(tmp_path), lm, monkeypatch, 1, KeyboardInterrupt())
    assert any("no unfinished sequence has rows to keep" in line for line in said)
    stopped(options(tmp_path, resume=True, keep_partial=False), lm, monkeypatch, 20, KeyboardInterrupt())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "run.zarr"]


def test_a_later_run_replaces_what_is_unfinished(
    tmp_path: Path, rng: np.random.Generator, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it goes on with the run or replaces it; no other takes the name, and no run goes on with that store."""
    asked(tmp_path, rng)
    monkeypatch.setattr(LanguageModel, "eos_ids", ())
    partial = tmp_path / "run.partial.zarr"
    stopped(options(tmp_path), lm, monkeypatch, 20, KeyboardInterrupt())
    before = CaptureStore.open(partial)
    assert before.numbers.tolist() == [0, 1, 2, 3]
    with pytest.raises(StoreError, match="partial"):
        run_capture(options(tmp_path, out=str(partial), resume=True, keep_partial=False), lm=lm)
    stopped(options(tmp_path, resume=True), lm, monkeypatch, NEW + 9, KeyboardInterrupt())
    after = CaptureStore.open(partial)
    assert after.numbers.tolist() == [4, 5, 6, 7]
    (tmp_path / "run.zarr").rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(StoreError, match=r"run\.partial\.zarr: exists"):
        run_capture(options(tmp_path), lm=lm)
    assert not (tmp_path / "run.zarr").exists()
    stopped(options(tmp_path, overwrite=True), lm, monkeypatch, 9, KeyboardInterrupt())
    assert CaptureStore.open(partial).numbers.tolist() == [0, 1, 2, 3]


def test_what_cannot_be_kept_does_not_hide_the_first_error(
    tmp_path: Path, rng: np.random.Generator, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(tmp_path, rng)

    def full(*_: Any, **__: Any) -> None:
        raise WriteError("no space left")

    monkeypatch.setattr("nla_engine.capture.partial.write_partial", full)
    said = stopped(options(tmp_path), lm, monkeypatch, 20, RuntimeError("of the device"))
    assert any("could not be kept: no space left" in line for line in said)


@pytest.mark.parametrize(
    ("out", "beside"),
    [
        ("run.zarr", "run.partial.zarr"),
        ("a.b/run", "a.b/run.partial"),
        ("/x/run.v2.zarr/", "/x/run.v2.partial.zarr"),
        ("s3://bucket/run.zarr", "s3://bucket/run.partial.zarr"),
        ("s3://bucket", None),
        ("s3://bucket/", None),
    ],
)
def test_its_name(out: str, beside: str | None) -> None:
    if beside is not None:
        assert partial_name(out) == beside
        return
    with pytest.raises(RequestError, match="give a name in the bucket"):
        partial_name(out)


def test_what_has_nothing_unfinished_is_refused(
    tmp_path: Path, rng: np.random.Generator, lm: LanguageModel
) -> None:
    asked(tmp_path, rng)
    with pytest.raises(RequestError, match="--keep-partial.*nothing is generated"):
        options(tmp_path, max_new_tokens=0)
    with pytest.raises(RequestError, match="--keep-partial: tiny runs by transformers' generation"):
        run_capture(options(tmp_path, kernels="library"), lm=lm)
    (tmp_path / "run.partial.zarr").write_text("of the user")
    with pytest.raises(StoreError, match="a file is in the way"):
        run_capture(options(tmp_path, overwrite=True), lm=lm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "run.partial.zarr"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C `info` of both stores works, and so does the command that goes on."""
    save_model(tmp_path / "base")
    write_prompts(tmp_path / "prompts.jsonl", 5)
    command = capture(tmp_path, tmp_path / "run.zarr", keep_partial=True, max_new_tokens=30)
    turns, real = 0, Generator._advance

    def stops(self: Generator, *more: Any) -> None:
        nonlocal turns
        turns += 1
        if turns == 12:
            raise KeyboardInterrupt
        real(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_advance", stops)
        ran = call(*command)
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == "error: interrupted; nothing is committed yet: start it with --resume"
    told = call("info", tmp_path / "run.partial.zarr", "--json").json
    assert told["finish"] == {"partial": told["sequences"]} and told["sequences"] > 0
    check_refused(call(*command), "run.zarr: exists; pass --resume", code=2)
    assert call(*command, "--resume").code == 0
    assert call("info", tmp_path / "run.zarr", "--json").json["sequences"] == 5
