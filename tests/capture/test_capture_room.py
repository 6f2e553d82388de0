"""A capture whose sequences have less room for keys and values than all of them would need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import byte_tokenizer, tiny_model, write_prompts

from nla_engine.capture import plan
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine.slots import Room, SlotCache
from nla_engine.models.load import wrap_model
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify

LAYERS = (0, 2)


def test_the_plan_says_what_all_sequences_have_room_for() -> None:
    shape = {
        "sequences": 9,
        "already_done": 0,
        "rows": 1,
        "bytes": 1,
        "row_bytes": 1,
        "codec": "int8",
        "length": 1000,
        "new": 900,
        "slot_rows": 900,
        "prefix": 0,
        "whole": False,
    }
    few, many = (str(plan.CapturePlan(**shape, room=Room(4, blocks))) for blocks in (40, 64))
    assert "4 at once, of at most 1,000 tokens and 2,560 together" in few and "together" not in many
    half = plan.CapturePlan(**shape, room=Room(4, 40)).half()
    assert half.room == Room(2, 20) and half.half().room == Room(1, 16)


def test_a_store_written_over_too_few_blocks_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    stores = []
    make = SlotCache.__init__

    def small(
        self: SlotCache, lm: Any, slots: int, length: int, prefix: int, blocks: int | None = None, *_: Any
    ):
        make(self, lm, slots, length, prefix, None if blocks is None else -(-(length + 1) // 4) + 3, 4)

    monkeypatch.setattr(SlotCache, "__init__", small)
    for name, blocks in (("few", 1), ("many", None)):
        monkeypatch.setattr(plan, "default_room", lambda *_, blocks=blocks, **more: Room(5, blocks))
        options = CaptureOptions(
            model="m", prompts=prompts, layer=LAYERS, out=str(tmp_path / name), max_new_tokens=30, positions="all",
            chat=False, temperature=1.0,
        )  # fmt: skip
        summary = run_capture(options, lm=lm)
        assert (summary.stepped_back > 0) == (blocks is not None)
        assert all(check.ok for check in verify(options.out))
        stores.append(CaptureStore.open(options.out))
    few, many = stores
    assert few.rows == many.rows and few.sequences == many.sequences == 12
    for a, b in zip(few.iter_sequences(), many.iter_sequences(), strict=True):
        assert (a.tokens.tolist(), a.source, a.finish) == (b.tokens.tolist(), b.source, b.finish)
    for layer in LAYERS:
        apart = np.linalg.norm(few.layer(layer)[:] - many.layer(layer)[:], axis=1)
        assert (apart <= 0.02 * np.linalg.norm(many.layer(layer)[:], axis=1)).all()
