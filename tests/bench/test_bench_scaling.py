"""The suite of costs that must not grow: it runs, what it counts stays flat, and wrong work gets no figure."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nla_engine.bench import growth, s3_server, settings
from nla_engine.bench.__main__ import main
from nla_engine.bench.made_stores import Made
from nla_engine.bench.plot import plot_growth
from nla_engine.bench.suites import scaling

SHARDS, ROWS = (1_000, 2_000), (100, 200)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    assert main(["scaling", "--device", "cpu", "--repeats", "1", *arguments]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(growth, "_TIMES", 1)
    monkeypatch.setattr(growth, "LOCAL", [each for each in growth.LOCAL if each is not growth.INFO])
    monkeypatch.setattr(s3_server, "missing", lambda: ["moto"])


def test_costs_by_rows_layers_and_length(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="requests are counted with the extra s3")
    monkeypatch.setattr(settings, "_CPU", replace(settings._CPU, scaling_rows=(1_000, 3_000)))
    monkeypatch.setattr(growth, "LAYERS", (1, 2))
    monkeypatch.setattr(growth, "LENGTHS", (10, 400))
    monkeypatch.setattr(growth, "AXIS_ROWS", 500)
    monkeypatch.setattr(scaling, "_SHARDS", SHARDS)
    monkeypatch.setattr(scaling, "_ROWS", ROWS)
    result = run(capsys)
    lines = result["lines"]
    assert all(line["p50"] > 0 for line in lines) and not result["failed"]
    assert [skip.partition(":")[2] for skip in result["skipped"]] == [
        f" S3, {rows} rows: moto not installed" for rows in (100, 300)
    ]
    sizes = [
        "1,000 rows",
        "3,000 rows",
        "1 layer",
        "2 layers",
        "10 rows per sequence",
        "400 rows per sequence",
    ]
    names = ["write", *(operation.name for operation in growth.LOCAL)]
    cases = [line["case"] for line in lines]
    for size in sizes:
        assert [case for case in cases if case.endswith(f", {size}")] == [f"{name}, {size}" for name in names]
    assert {"report page, 2 rows", "report page, 6 rows"} < set(cases)
    figures = {unit: [line["p50"] for line in lines if line["unit"] == unit] for unit in ("GiB", "requests")}
    assert max(figures["GiB"]) <= 1  # a quarter of the host memory
    assert figures["requests"] == [1, 1, 1]
    graphs = [line["p50"] for line in lines if line["unit"] == "graphs"]
    assert graphs == [21, 29, 37]  # eight more where the lanes are four times as many


def test_info_and_s3(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With --scaling-rows only stores of so many rows; the picture is drawn of the file of results."""
    monkeypatch.undo()
    if lacking := s3_server.missing():
        pytest.skip(f"{', '.join(lacking)} not installed")
    monkeypatch.setattr(growth, "LOCAL", (growth.INFO,))
    monkeypatch.setattr(growth, "_TIMES", 1)
    arguments = ["--scaling-rows", "2000", "--csv", str(tmp_path / "r.csv"), "--plot", str(tmp_path)]
    lines = run(capsys, *arguments)["lines"]
    on_s3 = [f"S3 {each.name}, 200 rows" for each in (growth.WRITE, *growth.ON_S3)]
    assert [line["case"] for line in lines] == [
        "write, 2,000 rows",
        "info, 2,000 rows",
        "report page, 4 rows",
        *on_s3,
    ]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "length", "layers"), [(1_000, 7, 2), (130, 128, 1), (20_000, 128, 1)], ids=str
)
def test_what_a_made_store_holds(tmp_path: Path, rows: int, length: int, layers: int) -> None:
    """Counted row by row, from what is read."""
    made = Made(rows, length, layers)
    assert made.write(tmp_path / "m.zarr") == rows
    store = growth.CaptureStore.open(tmp_path / "m.zarr")
    assert (store.rows, store.sequences, len(store.layers)) == (rows, made.sequences, layers)
    assert store.numbers.tolist() == list(range(made.sequences))
    texts = store.token_text(store.column("next_token_id"))
    places, owners = store.column("position").tolist(), store.column("sequence").tolist()
    fit = [t == "t0" and p >= 2 and o % 8 == 3 for t, p, o in zip(texts, places, owners, strict=True)]
    assert made.fitting == sum(fit)
    assert sum(fit) or rows < 1000


def test_wrong_work_gets_no_figure(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Made, "fitting", -1)
    result = run(capsys, "--scaling-rows", "500", code=1)
    assert [failed["case"] for failed in result["failed"]] == ["where, 500 rows"]
    assert result["failed"][0]["error"].startswith("WrongWork")
    assert len(result["lines"]) == len(growth.LOCAL) + 1


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert (
        plot_growth(tmp_path / "no", [{"suite": "join", "case": "link, 5 rows", "p50": 1, "unit": "s"}])
        is None
    )
    assert not (tmp_path / "no").exists()
