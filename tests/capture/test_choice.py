"""Which rows of a document are stored: against plain Python over the tokens, and a run that stores all of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import byte_tokenizer, tiny_model, write_records

from nla_engine.capture import appender
from nla_engine.capture.audit import audit
from nla_engine.capture.choice import RowChoice
from nla_engine.capture.estimate import estimate_capture
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.errors import RequestError, StoreError
from nla_engine.models.documents import WINDOW
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.prompt_set import PromptSet
from nla_engine.store import CaptureStore
from nla_engine.store.care.repair import repair
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.export import export
from nla_engine.store.exchange.merge import merge

NOTHING = np.zeros(0, np.int32)
COLUMNS = ("token_id", "next_token_id", "position", "sequence", "flags")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="qwen2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to about 60 tokens, some of them special."""
    rng = np.random.default_rng()
    pieces = ["a", "bc ", "<|im_start|>", "<|im_end|>", "37", "\n"]
    texts = ["x" + "".join(rng.choice(pieces, rng.integers(0, 30))) for _ in range(13)]
    texts[4], texts[5] = (
        "<|im_end|>",
        "one more document, of a length that is known: <|im_end|> and so on, and on",
    )
    return write_records(
        tmp_path_factory.mktemp("corpus"), [{"text": text, "n": i} for i, text in enumerate(texts)]
    )


def options(corpus: Path, out: Path, **changes: object) -> CaptureOptions:
    base: dict[str, object] = {"model": "in memory", "prompts": corpus, "layer": (1, 2), "out": str(out)}
    base |= {"codec": "int8", "batch_size": 5}
    if "max_new_tokens" not in changes:
        base["corpus"] = True
    return CaptureOptions(**{**base, **changes})  # type: ignore[arg-type]


def equal(a: CaptureStore, b: CaptureStore) -> bool:
    same = all(a.column(name).tolist() == b.column(name).tolist() for name in COLUMNS)
    return same and all(np.allclose(a.layer(k)[:], b.layer(k)[:], rtol=1e-2, atol=0.05) for k in a.layers)


def eligible(tokens: np.ndarray, least: int, skip: bool) -> list[int]:
    names = byte_tokenizer().convert_ids_to_tokens(tokens.tolist())
    return [p for p, name in enumerate(names) if p >= least and not (skip and name.startswith("<|im_"))]


WINDOWS = {"long": "windows", "max_tokens": 11}
ALL_THREE = {"per_document": 3, "min_position": 2, "skip_special": True}


@pytest.mark.parametrize(
    ("choice", "long"),
    [
        ({"per_document": 4}, {}),
        ({"min_position": 7}, WINDOWS),
        ({"skip_special": True}, {}),
        (ALL_THREE, {}),
        (ALL_THREE, WINDOWS),
    ],
)
def test_rows_are_some_of_those_of_a_whole_run(
    choice: dict, long: dict, lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    run_capture(options(corpus, tmp_path / "all.zarr", **long), lm=lm)
    chosen = options(corpus, tmp_path / "some.zarr", **long, **choice)
    summary = run_capture(chosen, lm=lm, announce=said.append)
    whole, some = CaptureStore.open(tmp_path / "all.zarr"), CaptureStore.open(tmp_path / "some.zarr")
    assert all(check.ok for check in verify(tmp_path / "some.zarr"))
    assert all(check.ok for check in audit(some, lm))
    allowed: dict[int, int] = Counter()
    kept: dict[int, int] = Counter()
    for number, (sequence, full) in enumerate(
        zip(some.iter_sequences(), whole.iter_sequences(), strict=True)
    ):
        assert sequence.tokens.tolist() == full.tokens.tolist()
        document = sequence.source[WINDOW]["document"] if long else number
        may = eligible(full.tokens, choice.get("min_position", 0), choice.get("skip_special", False))
        positions = some.column("position")[sequence.rows]
        assert set(positions.tolist()) <= set(may)
        allowed[document] += len(may)
        kept[document] += len(positions)
        rows = full.rows.start + positions
        for name in COLUMNS:
            assert some.column(name)[sequence.rows].tolist() == whole.column(name)[rows].tolist()
        for layer in some.layers:
            assert (some.layer(layer)[sequence.rows] == whole.layer(layer)[rows]).all()
    most = choice.get("per_document", 1 << 30)
    assert kept == {document: min(count, most) for document, count in allowed.items()}
    assert f"at most {summary.rows:,} rows" in said[-1], "nothing is generated, so the plan knows the rows"
    estimate = estimate_capture(
        options(corpus, tmp_path / "none.zarr", dry_run=True, **long, **choice), lm=lm
    )
    assert (estimate.rows, estimate.rows_expected) == (summary.rows, summary.rows)
    assert estimate.sequences == summary.sequences and not (tmp_path / "none.zarr").exists()


@pytest.mark.parametrize("long", [{}, WINDOWS])
def test_an_interrupted_run_and_other_batches_choose_the_same(
    long: dict, lm: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch
) -> None:
    choice = {"per_document": 3, "min_position": 1, "skip_special": True, **long}
    run_capture(options(corpus, tmp_path / "whole.zarr", **choice), lm=lm)
    whole = CaptureStore.open(tmp_path / "whole.zarr")
    run_capture(options(corpus, tmp_path / "other.zarr", batch_size=1, host_memory=1e-6, **choice), lm=lm)
    assert equal(whole, CaptureStore.open(tmp_path / "other.zarr"))
    real = appender.sequence_rows
    for committed in (1, 8):
        monkeypatch.setattr(appender, "_TOGETHER", 1)

        def fail_at(prompt, completion, *rest, at=committed):
            if completion.request.id == at:
                raise KeyboardInterrupt
            return real(prompt, completion, *rest)

        monkeypatch.setattr(appender, "sequence_rows", fail_at)
        with pytest.raises(KeyboardInterrupt):
            run_capture(options(corpus, tmp_path / "cut.zarr", overwrite=True, **choice), lm=lm)
        monkeypatch.undo()
        assert CaptureStore.open(tmp_path / "cut.zarr").sequences == committed
        for name, other in (("per_document", 4), ("min_position", 2), ("skip_special", False), ("seed", 5)):
            with pytest.raises(StoreError, match=f"other options: {name} was"):
                run_capture(
                    options(corpus, tmp_path / "cut.zarr", resume=True, **{**choice, name: other}), lm=lm
                )
        run_capture(options(corpus, tmp_path / "cut.zarr", resume=True, batch_size=3, **choice), lm=lm)
        assert equal(whole, CaptureStore.open(tmp_path / "cut.zarr"))
    run_capture(options(corpus, tmp_path / "seed.zarr", seed=1, **choice), lm=lm)
    assert not equal(whole, CaptureStore.open(tmp_path / "seed.zarr"))


def test_generated_rows_are_chosen_too(lm: LanguageModel, tmp_path: Path) -> None:
    prompts = write_records(tmp_path, [{"prompt": "ab " * (i % 4) + str(i)} for i in range(9)])
    given = {"max_new_tokens": 8, "temperature": 1.0, "positions": "all", "seed": 2}
    said: list[str] = []
    choice = {"per_document": 5, "min_position": 4, "skip_special": True}
    run_capture(options(prompts, tmp_path / "all.zarr", **given), lm=lm)
    run_capture(options(prompts, tmp_path / "some.zarr", **given, **choice), lm=lm, announce=said.append)
    whole, some = CaptureStore.open(tmp_path / "all.zarr"), CaptureStore.open(tmp_path / "some.zarr")
    for sequence, full in zip(some.iter_sequences(), whole.iter_sequences(), strict=True):
        assert sequence.tokens.tolist() == full.tokens.tolist()
        positions = some.column("position")[sequence.rows]
        may = eligible(full.tokens, 4, True)
        assert set(positions.tolist()) <= set(may) and len(positions) == min(len(may), 5)
        assert (some.layer(2)[sequence.rows] == whole.layer(2)[full.rows.start + positions]).all()
    assert "at most 45 rows" in said[-1] and some.rows <= 45
    assert all(check.ok for check in verify(tmp_path / "some.zarr"))
    assert all(check.ok for check in audit(some, lm))
    dry = options(prompts, tmp_path / "x.zarr", dry_run=True, **given, min_position=4, skip_special=True)
    estimate = estimate_capture(dry, lm=lm)
    exact = sum(len(eligible(sequence.tokens, 4, True)) for sequence in whole.iter_sequences())
    assert estimate.rows >= exact and abs(estimate.rows_expected - exact) <= 9


def prompt_set(sizes: list[int], windows: int = 1) -> PromptSet:
    prompts = PromptSet()
    for size in sizes:
        for number in range(windows):
            prompts.add(np.arange(size, dtype=np.int32), b"{}", same_document=number > 0)
    return prompts


def test_every_position_is_drawn_as_often_and_for_itself() -> None:
    """4,000 documents of three windows of 4 tokens: each of the 12 places in a quarter of them, each pair as often as
    without replacement."""
    count = 4000
    prompts = prompt_set([4] * count, windows=3)
    choice = RowChoice(prompts, RowRange.parse("all"), per_document=3, seed=9)
    drawn = np.zeros((count, 12), bool)
    for number in range(len(prompts)):
        positions = choice.positions(number, NOTHING)
        drawn[number // 3, 4 * (number % 3) + positions] = True
    assert (drawn.sum(1) == 3).all()
    sd = (count * 0.25 * 0.75) ** 0.5
    assert np.abs(drawn.sum(0) - count / 4).max() < 4.5 * sd
    pairs = drawn.T.astype(int) @ drawn
    np.fill_diagonal(pairs, count * 3 * 2 / (12 * 11))
    sd = (count * 6 / 132 * (1 - 6 / 132)) ** 0.5
    assert np.abs(pairs - count * 6 / 132).max() < 5 * sd
    assert (drawn[1:] == drawn[:-1]).all(1).mean() < 0.02, "documents draw alike"


def test_a_draw_depends_on_seed_and_document_alone() -> None:
    """Not on what was asked before; more rows per document hold those of fewer."""
    prompts = prompt_set([40] * 5)

    def positions(number: int, rows: int, seed: int = 0) -> list[int]:
        choice = RowChoice(prompts, RowRange.parse("all"), per_document=rows, seed=seed)
        return choice.positions(number, NOTHING).tolist()

    assert positions(3, 6) == positions(3, 6) == sorted(positions(3, 6))
    assert len({tuple(positions(number, 6, seed)) for number in range(5) for seed in (0, 1, 2**63 - 1)}) == 15
    assert set(positions(3, 6)) < set(positions(3, 7))
    assert positions(3, 40) == list(range(40)) == positions(3, 50)


def test_a_choice_that_leaves_nothing_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    prompts = write_records(tmp_path, [{"text": "abc"}, {"text": "<|im_end|>"}])
    for choice in ({"min_position": 3}, {"min_position": 1, "positions": "last", "skip_special": True}):
        given = options(prompts, tmp_path / "x.zarr", **choice)
        if "positions" in choice:
            (tmp_path / "p.jsonl").write_text(json.dumps({"text": "ab<|im_end|>"}) + "\n")
        with pytest.raises(
            RequestError, match="no row would be left of any prompt: change --positions or --min-position"
        ):
            run_capture(given, lm=lm)
        assert not (tmp_path / "x.zarr").exists()


def test_sparse_rows_pass_through_merge_export_and_repair(
    lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    choice = {"per_document": 2, "min_position": 3, "long": "windows", "max_tokens": 11, "layer": (1,)}
    some = options(corpus, tmp_path / "a.zarr", **choice)
    run_capture(some, lm=lm)
    run_capture(options(corpus, tmp_path / "b.zarr", **choice), lm=lm)
    a = CaptureStore.open(tmp_path / "a.zarr")
    assert (a.row_sizes() == 0).any(), "some windows have no row"
    merged = merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "m.zarr")
    assert merged.column("position").tolist() == a.column("position").tolist() * 2
    assert all(check.ok for check in verify(tmp_path / "m.zarr"))
    (tmp_path / "a.zarr" / "rows" / "token_id" / "c" / "0").write_bytes(b"damaged")
    repair(tmp_path / "a.zarr")
    again = CaptureStore.open(tmp_path / "a.zarr")
    assert all(check.ok for check in verify(tmp_path / "a.zarr"))
    assert again.column("token_id").tolist() == merged.column("token_id")[: again.rows].tolist()
    export(again, "nla", tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["n_raw_tokens"].to_pylist() == (again.column("position") + 1).tolist()
    owners = [json.loads(s.record)[WINDOW]["document"] for s in again.iter_sequences()]
    documents = [str(owners[number]) for number in again.column("sequence")]
    assert table["doc_id"].to_pylist() == documents, "windows of a document share its name"
    sidecar = yaml.safe_load((tmp_path / "a.parquet.nla_meta.yaml").read_text())["extraction"]
    assert sidecar["corpus_slice"]["length"] == 13 and sidecar["positions_per_doc"] == 2
    export(merged, "nla", tmp_path / "m.parquet")
    names = Counter(pq.read_table(tmp_path / "m.parquet")["doc_id"].to_pylist())
    assert sorted(names.values()) == sorted(2 * list(Counter(documents).values())), "of each store for itself"
