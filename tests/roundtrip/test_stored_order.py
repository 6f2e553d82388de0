"""Where a row lies in a store depends on the batch size of the capture. Nothing that is drawn or written may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_engine.capture.run import run_capture
from nla_engine.config import (
    AskOptions,
    CaptureOptions,
    ExplainOptions,
    LensOptions,
    PatchOptions,
    RoundtripOptions,
    ScoreOptions,
)
from nla_engine.demo.problems import held_out_problems, prompt_record
from nla_engine.demo.run import LAYER, TRIO
from nla_engine.referee.run import run_patch
from nla_engine.roundtrip.ask import run_ask
from nla_engine.roundtrip.lens import run_lens
from nla_engine.roundtrip.run import run_explain, run_roundtrip, run_score
from nla_engine.roundtrip.variance import layer_variance
from nla_engine.store import CaptureStore, StoreWriter
from nla_engine.store.exchange import merge

AV, AR, BASE = (str(TRIO / name) for name in ("av", "ar", "base"))
CPU = {"device": "cpu"}
SEQUENCES = 11


def capture(tmp: Path, name: str, batch: int) -> CaptureStore:
    prompts = tmp / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps(prompt_record(problem)) + "\n" for problem in held_out_problems(SEQUENCES, 3))
    )
    run_capture(
        CaptureOptions(
            model=BASE,
            prompts=(prompts,),
            layer=(LAYER,),
            out=str(tmp / name),
            max_new_tokens=24,
            temperature=0.5,
            batch_size=batch,
            **CPU,
        )
    )
    return CaptureStore.open(tmp / name)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def store(tmp: Path) -> CaptureStore:
    return capture(tmp, "four.zarr", 4)


@pytest.fixture(scope="module")
def other(tmp: Path, store: CaptureStore) -> CaptureStore:
    """The same rows, bit by bit, of sequences that ended in another order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "BLOCK_SEQUENCES", 1)
        blocks = list(merge._blocks(store, 0))
    order = np.random.default_rng().permutation(SEQUENCES)
    writer = StoreWriter.create(
        tmp / "other.zarr",
        layers=store.sites,
        codec=store.codec,
        sink_norm=store.sink_norm,
        vocabulary=[store.vocabulary.raw(token) for token in range(len(store.vocabulary))],
        provenance=store.provenance,
        options=store.options,
    )
    with writer:
        for place in order.tolist():
            writer.append_block(*blocks[place])
        writer.close()
    return CaptureStore.open(tmp / "other.zarr")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are smaller than the store."""
    monkeypatch.setattr("nla_engine.roundtrip.job.CONTROL_ROWS", 17)
    monkeypatch.setattr("nla_engine.referee.run.CONTROL_ROWS", 17)
    monkeypatch.setattr("nla_engine.roundtrip.variance.VARIANCE_ROWS", 23)


def written(out: Path) -> pa.Table:
    """The table without what names places in the store."""
    table = pq.read_table(out)
    return table.drop_columns([name for name in ("row", "rows") if name in table.column_names])


def places(store: CaptureStore, rows: np.ndarray) -> list[tuple[int, int]]:
    return list(
        zip(store.column("sequence")[rows].tolist(), store.column("position")[rows].tolist(), strict=True)
    )


SAMPLED = {"samples": 2, "temperature": 1.0, "seed": 5, "max_new_tokens": 12}


def roundtrip(store: CaptureStore, out: Path) -> Any:
    given = RoundtripOptions(store=str(store.path), av=AV, ar=AR, out=out, limit=30, **SAMPLED, **CPU)
    return run_roundtrip(given)


def explain(store: CaptureStore, out: Path) -> Any:
    given = ExplainOptions(
        store=str(store.path), av=AV, out=out, where="position >= 12", limit=20, **SAMPLED, **CPU
    )
    return run_explain(given)


def score(store: CaptureStore, out: Path) -> Any:
    """Texts of a file in an order of its own, with the rows as they lie in this store."""
    rows = store.in_order(np.arange(store.rows))[::7]
    lines = [
        {"row": int(row), "text": f"The number {place[0]}.", "n": n}
        for n, (row, place) in enumerate(zip(rows, places(store, rows), strict=True))
    ]
    texts = out.with_suffix(".jsonl")
    texts.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    return run_score(ScoreOptions(store=str(store.path), ar=AR, texts=texts, out=out, **CPU))


def ask(store: CaptureStore, out: Path) -> Any:
    given = AskOptions(
        store=str(store.path),
        oracle=BASE,
        question=("What is 1 × 2?", "Why?"),
        out=out,
        limit=9,
        rows_per_prompt=2,
        **ASKED,
        **SAMPLED,
        **CPU,
    )
    return run_ask(given)


ASKED: dict[str, Any] = {
    "injection": "replace@0",
    "injection_scale": "raw",
    "placeholder": "×",
    "prompt": "<INJECT><QUESTION>",
}


def lens(store: CaptureStore, out: Path) -> Any:
    return run_lens(LensOptions(store=str(store.path), model=BASE, out=out, limit=20, top_k=2, **CPU))


def patch(store: CaptureStore, out: Path) -> Any:
    explained = out.with_name("explained-" + out.name)
    made = RoundtripOptions(
        store=str(store.path), av=AV, ar=AR, out=explained, limit=25, max_new_tokens=12, **CPU
    )
    run_roundtrip(made)
    given = PatchOptions(store=str(store.path), model=BASE, explained=explained, out=out, horizon=1, **CPU)
    return run_patch(given)


@pytest.mark.parametrize(
    "job", [roundtrip, explain, score, ask, lens, patch], ids=lambda job: str(job.__name__)
)
def test_the_table_does_not_depend_on_where_rows_lie(
    job: Any, store: CaptureStore, other: CaptureStore, tmp_path: Path
) -> None:
    assert not np.array_equal(store.column("sequence"), other.column("sequence"))
    told = [job(each, tmp_path / name) for each, name in ((store, "a.parquet"), (other, "b.parquet"))]
    first, second = (written(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert first.to_pydict() == second.to_pydict()
    at = list(zip(first["sequence"].to_pylist(), first["position"].to_pylist(), strict=True))
    assert at == sorted(at)
    for key, value in told[0].to_dict().items():
        assert "second" in key or key == "out" or value == told[1].to_dict()[key]


def test_var_is_that_of_the_same_rows(store: CaptureStore, other: CaptureStore) -> None:
    import torch

    found = [layer_variance(each.layer(LAYER), 1, torch.device("cpu")) for each in (store, other)]
    assert found[0].value == found[1].value and found[0].rows == found[1].rows == 23


def test_a_sampled_text_depends_on_its_row_alone(store: CaptureStore, tmp_path: Path) -> None:
    """Neither the other rows nor the number of samples change it."""
    how = {"store": str(store.path), "av": AV, "temperature": 1.0, "max_new_tokens": 12, **CPU}
    run_explain(ExplainOptions(out=tmp_path / "all.parquet", samples=3, **how))
    run_explain(ExplainOptions(out=tmp_path / "some.parquet", where="row > 40", **how))
    names = ["row", "sample", "explanation"]
    every, some = (
        pq.read_table(tmp_path / name, columns=names).to_pylist() for name in ("all.parquet", "some.parquet")
    )
    texts = {(line["row"], line["sample"]): line["explanation"] for line in every}
    assert len(some) and all(texts[line["row"], 0] == line["explanation"] for line in some)
    different = sum(texts[row, 0] != texts[row, 1] for row, _ in texts)
    assert different > len(texts) / 6


def test_two_batch_sizes_of_the_capture(store: CaptureStore, tmp: Path, tmp_path: Path) -> None:
    """Rows of another batch size differ by rounding; their texts and partners do not."""
    again = capture(tmp, "nine.zarr", 9)
    assert not np.array_equal(store.column("sequence"), again.column("sequence"))
    for each, name in ((store, "a.parquet"), (again, "b.parquet")):
        roundtrip(each, tmp_path / name)
    first, second = (written(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    for name in ("sequence", "position", "token", "sample", "explanation", "status"):
        assert first[name].to_pylist() == second[name].to_pylist(), name
    for name in ("cos", "cos_shuffled", "fve_nrm"):
        assert np.allclose(first[name].to_numpy(), second[name].to_numpy(), atol=2e-3), name
