"""Fields of rows by name: the same for `where`, `column` and tables. How stores and their parts show themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import create_store, fill_store, sample_sequence

from nla_engine.codec.rows import Codec
from nla_engine.errors import FieldError, RecordFieldError, RequestError, StoreError
from nla_engine.store import CaptureStore
from nla_engine.store.views import frames
from nla_engine.store.views.fields import RowFlag, token_labels

CODEC = Codec.named("int8", 16)
RECORDS: list[Any] = [
    {"topic": "tides", "year": 1987, "share": 0.5, "known": True, "meta": {"fold": 1}, "maybe": False},
    {"topic": "moon <b>", "year": -4, "share": 1, "known": False, "meta": {"fold": 2}, "mixed": 3},
    {"topic": "sun", "year": 12, "share": 2.25, "known": True, "meta": {}, "mixed": "three", "big": 1 << 80},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaptureStore:
    path = tmp_path_factory.mktemp("fields") / "run.zarr"
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    with create_store(path, CODEC, (3, 7)) as writer:
        for record in RECORDS:
            sequence, _ = sample_sequence(rng, CODEC, (3, 7), 40)
            writer.append(replace(sequence, source=json.dumps(record).encode()))
    return CaptureStore.open(path)


def test_every_name_of_where_is_a_column(store: CaptureStore) -> None:
    flags = [RowFlag(int(value)) for value in store.column("flags")]
    ids, following = store.column("token_id"), store.column("next_token_id")
    own = [RECORDS[number] for number in store.column("sequence")]
    expected: dict[str, list[Any]] = {
        "token": store.token_text(ids),
        "next_token": store.token_text(following),
        "row": list(range(store.rows)),
        "norm": store.layer(3).norm().tolist(),
        "norm_3": store.layer(3).norm().tolist(),
        "norm_7": store.layer(7).norm().tolist(),
        "prompt": [not flag & RowFlag.GENERATED for flag in flags],
        **{str(f.name).lower(): [bool(flag & f) for flag in flags] for f in RowFlag},
        "record.topic": [record["topic"] for record in own],
        "record.year": [record["year"] for record in own],
        "record.share": [float(record["share"]) for record in own],
        "record.known": [record["known"] for record in own],
        "record.maybe": [record.get("maybe") for record in own],
        "record.mixed": [record.get("mixed") for record in own],
        "record.big": [record.get("big") for record in own],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(store.column(name), np.array(values, store.column(name).dtype), name)
    fold = store.column("record.meta.fold")
    assert [None if np.isnan(v) else v for v in fold] == [record["meta"].get("fold") for record in own]
    kinds = {"record.year": np.int64, "record.share": np.float64, "record.known": np.bool_, "sink": np.bool_}
    assert {name: store.column(name).dtype.type for name in kinds} == kinds
    raw = {"token_id", "next_token_id", "position", "sequence", "flags"}
    assert set(store.fields) == set(expected) | raw | {"record.meta.fold"}
    for name in store.fields:  # `where` knows each of them: as a condition, or in a comparison
        column = store.column(name)
        if column.dtype == bool:
            np.testing.assert_array_equal(store.where(name), np.flatnonzero(column))
        elif column.dtype.kind in "if":
            value = column[np.isfinite(column)][0].item()
            np.testing.assert_array_equal(
                store.where(f"{name} >= {value!r}"), np.flatnonzero(column >= value)
            )
        elif name == "record.topic":
            np.testing.assert_array_equal(store.where(f"{name} == 'sun'"), np.flatnonzero(column == "sun"))


@pytest.mark.parametrize("wild", [[], [2**31 - 1], [-7]], ids=["known", "too high", "below none"])
def test_texts_of_tokens(store: CaptureStore, wild: list[int], rng: np.random.Generator) -> None:
    """Any id has a text: no token, and ids that the vocabulary lacks, an empty one."""
    ids = np.append(rng.integers(-1, len(store.vocabulary) + 1, 300), wild).astype(np.int32)
    labels = token_labels(store, ids)
    assert len(set(ids.tolist())) == len(labels.values)
    assert [labels.values[place] for place in labels.index] == [
        store.vocabulary.text(i) for i in ids.tolist()
    ]
    assert len(token_labels(store, ids[:0]).index) == 0


def test_columns_are_cached_and_cannot_be_changed(store: CaptureStore) -> None:
    assert store.column("record.topic") is store.column("record.topic")
    with pytest.raises(ValueError, match="read-only"):
        store.column("token")[0] = "x"


def test_what_is_no_field(store: CaptureStore) -> None:
    with pytest.raises(
        FieldError, match=r"run\.zarr: there is no field 'colour': choose one of token, .*record\.KEY$"
    ):
        store.column("colour")
    with pytest.raises(RecordFieldError, match="no prompt record has 'colour' .keys seen: big, known, maybe"):
        store.column("record.colour")
    with pytest.raises(FieldError, match="norm_4"):
        store.to_pandas(["norm_4"])


def test_pandas(store: CaptureStore) -> None:
    pytest.importorskip("pandas")
    rows = store.where("record.topic == 'sun'")
    names = ["token", "record.year", "norm_7", "sink"]
    frame = store.to_pandas(columns=names, rows=rows)
    assert (list(frame.columns), frame.index.name, frame.index.tolist()) == (names, "row", rows.tolist())
    for name in names:
        column = store.column(name)[rows]
        np.testing.assert_array_equal(frame[name].to_numpy(column.dtype), column)
    np.testing.assert_array_equal(store.layer(7)[frame.index], store.layer(7)[rows])
    usual = store.to_pandas()
    assert len(usual) == store.rows
    assert list(usual.columns)[:7] == [
        "sequence",
        "position",
        "token",
        "next_token",
        "generated",
        "norm_3",
        "norm_7",
    ]
    assert list(usual.columns)[7:] == [name for name in store.fields if name.startswith("record.")]
    assert store.to_pandas("token", slice(3, 6))["token"].tolist() == store.column("token")[3:6].tolist()


def test_polars(store: CaptureStore) -> None:
    pl = pytest.importorskip("polars")
    names = [
        "token",
        "record.year",
        "record.mixed",
        "record.maybe",
        "record.meta.fold",
        "norm_7",
        "sink",
        "flags",
    ]
    frame = store.to_polars(names)
    assert frame.columns == ["row", *names]
    texts = ["record.mixed"]
    for name in names:
        wanted = store.column(name).tolist()
        wanted = [None if value is None else str(value) for value in wanted] if name in texts else wanted
        np.testing.assert_array_equal(frame[name].to_list(), wanted)
    lazy = store.to_polars(names, lazy=True)
    assert isinstance(lazy, pl.LazyFrame)
    assert lazy.collect_schema() == frame.schema
    query = lazy.filter(pl.col("sink") | (pl.col("record.year") > 1000)).select("row", "token")
    again = frame.filter(pl.col("sink") | (pl.col("record.year") > 1000)).select("row", "token")
    assert query.collect().equals(again)
    assert lazy.head(5).collect().equals(frame.head(5), null_equal=True)
    few = store.to_polars(["position"], np.arange(store.rows) % 9 == 0)
    assert few["row"].to_list() == list(range(0, store.rows, 9))


def test_a_library_that_is_missing_is_named(store: CaptureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "polars", None)
    for ask, name in ((store.to_pandas, "pandas"), (store.to_polars, "polars")):
        with pytest.raises(RequestError, match=f"a table of {name} needs {name}: pip install {name}"):
            ask()
    assert frames.library("json") is json


def test_how_they_show_themselves(store: CaptureStore) -> None:
    sequence = store.sequence(1)
    assert repr(store).endswith("run.zarr: 120 rows of 3 sequences, layers 3, 7, d_model 16, int8>")
    assert repr(store.layer(7)) == "<layer 7: float32 [120, 16], kept as int8>"
    assert repr(sequence).startswith(
        f"<sequence 1: 40 tokens, {sequence.prompt_size} of the prompt, rows 40 to 79"
    )
    assert "\n" not in repr(sequence) and len(repr(sequence)) < 250
    for shown in (store, store.layer(7), sequence):
        assert shown._repr_html_().startswith("<div><b>")
    assert "moon &lt;b&gt;" in sequence._repr_html_() and '<b>"' not in sequence._repr_html_()
    assert (len(store), len(sequence)) == (120, 40)
    assert np.asarray(sequence).tolist() == sequence.tokens.tolist()
    assert np.asarray(sequence, np.int64).dtype == np.int64


@pytest.mark.parametrize("number", [4, "3", 3.0, None, -1])
def test_a_layer_that_is_not_there(store: CaptureStore, number: Any) -> None:
    with pytest.raises(StoreError, match=r"layer .* is not in .*: it has 3, 7"):
        store.layer(number)


def test_a_store_is_the_array_of_its_only_layer(store: CaptureStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds layers 3, 7: name one"):
        np.asarray(store)
    fill_store(tmp_path / "one.zarr", CODEC, [20])
    one = CaptureStore.open(tmp_path / "one.zarr")
    np.testing.assert_array_equal(np.asarray(one), one.layer(3)[:])
    with pytest.raises(IndexError, match="counted from 0"):
        list(one.iter_sequences(-1))


def test_reading_a_store_loads_neither_torch_nor_a_table_library(store: CaptureStore) -> None:
    """Importing is quick: what is large is loaded when it is used."""
    code = (
        "import sys; from nla_engine import CaptureStore\n"
        f"store = CaptureStore.open({str(store.path)!r}); store.where('generated'); store.layer(3)[0, 3]\n"
        "store.column('record.topic'), repr(store), store._repr_html_()\n"
        "large = ('torch', 'transformers', 'pandas', 'polars', 'pyarrow', 'rich', 'typer')\n"
        "print([name for name in large if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
