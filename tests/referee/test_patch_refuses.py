"""What patch refuses: exit code 2, one line, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import LAYER, call, capture, check_refused, contents, explain, json_lines, patch
from store_samples import random_store
from tiny import save_ar, save_model

import nla_engine
from nla_engine.store import CaptureStore

TEXTS = [{"row": 0, "text": "a"}, {"row": 7, "text": "b"}, {"row": 9, "text": "c"}]
Fault = tuple[Callable[[Path, Path], dict[str, object]], str]


def lines(directory: Path, *records: dict[str, object]) -> Path:
    return json_lines(directory / "t.jsonl", list(records))


def unscored(root: Path, directory: Path) -> Path:
    assert call(*explain(root, directory / "e.parquet", limit=2)).code == 0
    return directory / "e.parquet"


def another_store(root: Path, directory: Path) -> Path:
    assert call(*capture(root, directory / "other.zarr")).code == 0
    return directory / "other.zarr"


def without_weights(directory: Path) -> Path:
    return random_store(directory / "n.zarr", np.ones((12, 64), np.float32), LAYER)


def imported(directory: Path) -> Path:
    np.save(directory / "x.npy", np.ones((12, 64), np.float32))
    out = directory / "i.zarr"
    assert call("import", directory / "x.npy", "--out", out, "--layer", LAYER).code == 0
    return out


def ar_elsewhere(root: Path, directory: Path, **metadata: object) -> Path:
    """The table of the round trip, whose AR is told otherwise."""
    table = pq.read_table(root / "explained.parquet")
    made = json.loads(table.schema.metadata[b"nla_engine"]) | metadata
    path = directory / "moved.parquet"
    pq.write_table(table.replace_schema_metadata({b"nla_engine": json.dumps(made)}), path)
    return path


FAULTS: dict[str, Fault] = {
    "a model of other weights": (
        lambda r, t: {"model": save_model(t / "other", seed=9)},
        r"--model .*other: its weights \(\w+\) are not those that .*run.zarr was captured with .*: give the captured",
    ),
    "a model of another architecture": (
        lambda r, t: {"model": save_model(t / "llama", "llama")},
        "--model .*llama: its weights .* give the captured model",
    ),
    "no such model": (lambda r, t: {"model": t / "none"}, "none: no such directory"),
    "an AR as the model": (lambda r, t: {"model": r / "ar"}, "--model .*ar: its weights .* are not those"),
    "the table of another store": (
        lambda r, t: {"store": another_store(r, t), "explained": r / "explained.parquet"},
        "explained.parquet: explains another store than .*other.zarr",
    ),
    "a store without weights": (
        lambda r, t: {"store": without_weights(t)},
        "n.zarr: does not say with which weights it was captured",
    ),
    "an imported store": (
        lambda r, t: {"store": imported(t)},
        "i.zarr: was imported: its tokens are not known",
    ),
    "no AR": (lambda r, t: {"ar": None}, "t.jsonl: does not name an AR, since none has scored it: give --ar"),
    "a table without an AR": (
        lambda r, t: {"ar": None, "explained": unscored(r, t)},
        "e.parquet: does not name an AR",
    ),
    "an AR that has moved": (
        lambda r, t: {"ar": None, "explained": ar_elsewhere(r, t, ar=str(t / "gone"))},
        "moved.parquet: names the AR .*gone, which cannot be read: .*no such directory.*: give it with --ar",
    ),
    "a map of the AR that has moved": (
        lambda r, t: {
            "ar": None,
            "explained": ar_elsewhere(r, t, run={"ar_map": str(t / "lost.safetensors")}),
        },
        "names the AR .*ar, which cannot be read: .*lost.safetensors",
    ),
    "another revision of the AR": (
        lambda r, t: {"ar": None, "explained": ar_elsewhere(r, t, ar_revision="0123abc")},
        "moved.parquet: its AR .*ar was read in revision 0123abc, and is now None: name the one to use with --ar",
    ),
    "an AR of another layer": (
        lambda r, t: {"ar": save_ar(t / "ar1", 1)},
        "run.zarr holds layer 2, the AR was made for layer 1: capture that one",
    ),
    "an AR of another width": (
        lambda r, t: {"ar": save_ar(t / "ar32", LAYER, d_model=32)},
        r"value_head.safetensors: weight has shape \(64, 64\), this AR needs width 32",
    ),
    "another layer": (lambda r, t: {"layer": 1}, "--layer 1: this AR was made for layer 2"),
    "the table of another layer": (
        lambda r, t: {"explained": ar_elsewhere(r, t, layer=1)},
        "moved.parquet: explains layer 1, --ar .* gives layer 2",
    ),
    "one row": (
        lambda r, t: {"explained": lines(t, TEXTS[0], TEXTS[0])},
        "t.jsonl: one row has no control, .* select two or more",
    ),
    "a limit of one": (lambda r, t: {"limit": 1}, "one row has no control"),
    "no row": (lambda r, t: {"where": "position > 999"}, "has no row for --where 'position > 999'"),
    "a where that is none": (
        lambda r, t: {"where": "position >"},
        "where expression, column 11: it ends too early",
    ),
    "a row that is not there": (
        lambda r, t: {"explained": lines(t, TEXTS[0], {"row": 999, "text": ""})},
        "line 2: row 999 is not in .*run.zarr",
    ),
    "no texts": (lambda r, t: {"explained": t / "none.parquet"}, "none.parquet: no such file"),
    "a field of the result": (
        lambda r, t: {"explained": lines(t, *({**text, "kl_mean": 1.0} for text in TEXTS))},
        "t.jsonl: the result has a field kl_mean of its own: rename it in the file",
    ),
    "a result that exists": (lambda r, t: {"out": r / "explained.parquet"}, "exists; pass --resume"),
    "onto the texts": (
        lambda r, t: {
            "explained": r / "explained.parquet",
            "out": r / "explained.parquet",
            "overwrite": True,
        },
        "explained.parquet: is the file of the texts",
    ),
    "over a round trip": (
        lambda r, t: {"out": r / "explained.parquet", "resume": True},
        "explained.parquet: was made with other options",
    ),
    "into the store": (lambda r, t: {"out": r / "run.zarr" / "x.parquet"}, "lies inside the store"),
    "no Parquet": (lambda r, t: {"out": t / "x.csv"}, "give a name that ends in .parquet"),
    "a norm of zero": (lambda r, t: {"norm": 0}, "--norm is '0': it must be row, raw or a positive number"),
    "a norm in other words": (lambda r, t: {"norm": "sqrt_d_model"}, "--norm is 'sqrt_d_model'"),
    "a horizon below zero": (lambda r, t: {"horizon": -1}, "--horizon is -1: it must be 0 or more"),
    "an unknown device": (lambda r, t: {"device": "tpu"}, "device 'tpu'"),
    "a base for whole weights": (lambda r, t: {"base": r / "base"}, "--base .* leave --base out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_refuses(fault: str, root: Path, tmp_path: Path) -> None:
    before = contents(root)
    changes, message = FAULTS[fault]
    given = {"out": tmp_path / "x.parquet", "explained": lines(tmp_path, *TEXTS), "ar": root / "ar"}
    check_refused(call(*patch(root, **{**given, **changes(root, tmp_path)})), message)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("x.parquet*")) and contents(root) == before


def test_the_last_block_leaves_only_the_head(root: Path, tmp_path: Path) -> None:
    last = 3
    store = tmp_path / "last.zarr"
    assert call(*capture(root, store, layer=last)).code == 0
    ar = save_ar(tmp_path / "ar3", last)
    texts = lines(tmp_path, *TEXTS)
    ran = call(*patch(root, tmp_path / "p.parquet", texts, store=store, ar=ar, horizon=2, json=True))
    assert ran.code == 0, ran.err
    assert ran.json["kl_mean"] > 0 and ran.json["later_kl"] == 0.0 == ran.json["later_kl_zero"]


def test_rows_that_the_model_does_not_compute_are_refused(
    root: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    made = CaptureStore.open(root / "run.zarr").provenance
    kept = {name: made[name] for name in ("model", "weights", "dtype")}
    vectors = rng.standard_normal((12, 64)).astype(np.float32)
    store = random_store(tmp_path / "other.zarr", vectors, LAYER, provenance=kept)
    ran = call(*patch(root, tmp_path / "x.parquet", lines(tmp_path, *TEXTS), store=store, ar=root / "ar"))
    assert ran.code == 1 and "computes other rows than" in ran.err.splitlines()[-1]
    assert not list(tmp_path.glob("x.parquet*"))


def test_the_page_does_not_show_the_table_of_patch(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.parquet"
    assert call(*patch(root, out, limit=2)).code == 0
    shown = call("report", root / "run.zarr", "--explained", out, "--out", tmp_path / "r.html")
    check_refused(shown, "p.parquet: is the table of patch, which the page does not show")
    again = call(*patch(root, tmp_path / "q.parquet", out))
    check_refused(
        again, "p.parquet: the result has a field kl of its own: rename it in the file, or give the table"
    )
    assert pa.types.is_boolean(pq.read_schema(out).field("top1_same").type)
    assert callable(nla_engine.run_patch)
