"""Sequences are stored when they end: a long reply holds up none, and a stopped run goes on with what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_capture import check_store, equal_but_for_roundings, options
from tiny import byte_tokenizer, tiny_model

from nla_engine.capture import run as stage
from nla_engine.capture.audit import audit
from nla_engine.capture.estimate import estimate_capture
from nla_engine.capture.run import run_capture
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify


def counting_down() -> LanguageModel:
    """A model that writes the alphabet backwards from the prompt's last letter, and ends at its end token, a."""
    tokenizer, model = byte_tokenizer(), tiny_model("qwen2")
    first, last = (int(tokenizer.encode(letter)[0]) for letter in "az")
    with torch.no_grad():
        for block in model.model.layers:  # they keep the token's own direction, and add a little of the rest
            block.self_attn.o_proj.weight *= 0.01
            block.mlp.down_proj.weight *= 0.01
        directions = model.model.embed_tokens.weight
        directions /= directions.norm(dim=1, keepdim=True)
        model.lm_head.weight.zero_()
        model.lm_head.weight[first:last] = 100 * directions[first + 1 : last + 1]
    model.generation_config.eos_token_id = first
    return wrap_model(model.float(), tokenizer, name="counting")


def letters(path: Path, ends: str) -> Path:
    """Prompts that end in these letters."""
    path.write_text("".join(json.dumps({"prompt": f"from {end}", "end": end}) + "\n" for end in ends))
    return path


def stored_order(store: CaptureStore) -> list[int]:
    return list(dict.fromkeys(store.column("sequence").tolist()))


class StopAfter(stage.Appender):
    """Appends `most` sequences, then the run is interrupted."""

    most = 0

    def add(self, ended: Any) -> None:
        super().add(list(ended)[: self.most - self.sequences])
        if self.sequences == self.most:
            raise KeyboardInterrupt


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_the_longest_reply_first_holds_up_none(positions: str, tmp_path: Path, monkeypatch) -> None:
    """It is the last in the store, and the run is stopped while it is written: all others are safe."""
    lm, ends = counting_down(), "zbcedbgfbe"
    prompts = letters(tmp_path / "prompts.jsonl", ends)
    how: dict[str, Any] = {"prompts": prompts, "chat": False, "max_new_tokens": 40, "positions": positions}
    run_capture(options(tmp_path, out=tmp_path / "whole.zarr", batch_size=2, **how), lm=lm)
    whole = check_store(lm, tmp_path / "whole.zarr", positions, (1, 3), limit=2**-8)
    assert [len(each.generated_text()) for each in whole.iter_sequences()] == [
        ord(end) - ord("a") for end in ends
    ]
    assert [each.source["end"] for each in whole.iter_sequences()] == list(ends)
    order = stored_order(whole)
    assert order != sorted(order) and order.index(0) > 4
    assert all(check.ok for check in audit(whole, lm))
    monkeypatch.setattr(StopAfter, "most", 5)
    with monkeypatch.context() as cut:
        cut.setattr(stage, "Appender", StopAfter)
        with pytest.raises(KeyboardInterrupt):
            run_capture(options(tmp_path, batch_size=2, **how), lm=lm)
    done = CaptureStore.open(tmp_path / "run.zarr")
    assert done.sequences == 5 and 0 not in done.numbers and done.provenance["sequences_asked"] == 10
    again = options(tmp_path, resume=True, batch_size=3, **how)
    dry = estimate_capture(options(tmp_path, resume=True, dry_run=True, **how), lm=lm)
    assert (dry.sequences, dry.already_done, dry.sample_sequences) == (5, 5, 5)
    left = [ord(ends[n]) - ord("a") for n in set(range(10)) - set(done.numbers)]
    assert abs(dry.reply_tokens_expected - np.mean(left)) < 2 and dry.bytes_expected < dry.bytes / 2
    told: list[tuple[int, int]] = []
    summary = run_capture(again, lm=lm, progress=lambda *n: told.append(n))
    assert told[0] == (5, 10) and told[-1] == (10, 10) and summary.sequences == 10
    assert summary.tokens_generated == sum(left)
    resumed = check_store(lm, tmp_path / "run.zarr", positions, (1, 3), limit=2**-8)
    for a, b in zip(whole.iter_sequences(), resumed.iter_sequences(), strict=True):
        assert (a.number, a.record, a.tokens.tolist()) == (b.number, b.record, b.tokens.tolist())


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_any_part_may_be_done_already(
    positions: str, tmp_path: Path, monkeypatch, rng: np.random.Generator
) -> None:
    """Some replies of a prompt and not others; the rest is as in a run without a break."""
    lm = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")
    sampled = {"temperature": 1.0, "replies": 3, "positions": positions, "codec": "int8"}
    run_capture(options(tmp_path, out=tmp_path / "whole.zarr", **sampled), lm=lm)
    whole = CaptureStore.open(tmp_path / "whole.zarr")
    chosen = set(rng.permutation(36)[:15].tolist())

    class Some(stage.Appender):
        def add(self, ended: Any) -> None:
            super().add([each for each in ended if each.request.id in chosen])
            if self.sequences == len(chosen):
                raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(stage, "Appender", Some)
        with pytest.raises(KeyboardInterrupt):
            run_capture(options(tmp_path, **sampled), lm=lm)
    assert CaptureStore.open(tmp_path / "run.zarr").numbers.tolist() == sorted(chosen)
    run_capture(options(tmp_path, resume=True, batch_size=4, **sampled), lm=lm)
    resumed = CaptureStore.open(tmp_path / "run.zarr")
    assert resumed.complete and all(check.ok for check in verify(resumed.path))
    for a, b in zip(whole.iter_sequences(), resumed.iter_sequences(), strict=True):
        assert (a.number, a.record, a.tokens.tolist()) == (b.number, b.record, b.tokens.tolist())
    a, b = (each.layer(3)[np.argsort(each.column("sequence"), kind="stable")] for each in (whole, resumed))
    assert equal_but_for_roundings(a, b)


def test_rows_drawn_per_document_stay_the_same(tmp_path: Path, monkeypatch, rng: np.random.Generator) -> None:
    """Windows of documents, of which a stopped run has stored any."""
    lm = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")
    text = tmp_path / "text.txt"
    text.write_text("".join("some words " * int(n) + "\n" for n in rng.integers(1, 9, 6)))
    how = {"prompts": text, "corpus": True, "max_tokens": 20, "long": "windows", "per_document": 7}
    run_capture(options(tmp_path, out=tmp_path / "whole.zarr", **how), lm=lm)
    whole = CaptureStore.open(tmp_path / "whole.zarr")
    chosen = set(rng.permutation(whole.sequences)[: whole.sequences // 2].tolist())

    class Some(stage.Appender):
        def add(self, ended: Any) -> None:
            super().add([each for each in ended if each.request.id in chosen])
            if self.sequences == len(chosen):
                raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(stage, "Appender", Some)
        with pytest.raises(KeyboardInterrupt):
            run_capture(options(tmp_path, **how), lm=lm)
    dry = estimate_capture(options(tmp_path, resume=True, dry_run=True, **how), lm=lm)
    assert dry.sequences == whole.sequences - len(chosen)
    run_capture(options(tmp_path, resume=True, batch_size=2, **how), lm=lm)
    resumed = CaptureStore.open(tmp_path / "run.zarr")
    for a, b in zip(whole.iter_sequences(), resumed.iter_sequences(), strict=True):
        assert a.record == b.record
        assert whole.column("position")[a.rows].tolist() == resumed.column("position")[b.rows].tolist()
