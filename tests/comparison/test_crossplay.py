"""Cross-play: every cell of the grid is what score gives for these texts and this AR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from commands import LAYER, call, check_refused, score
from sides import changed, column
from tiny import save_ar


def test_the_grid_is_what_score_gives(root: Path, tmp_path: Path) -> None:
    other = save_ar(tmp_path / "other", LAYER)
    texts = [root / "explained.parquet", tmp_path / "again.parquet"]
    rows = len(column(texts[0], "row"))
    changed(texts[0], texts[1], explanation=[f"text {n}" for n in range(rows)])
    given = [word for path in texts for word in ("--texts", path)]
    readers = ["--ar", root / "ar", "--ar", other]
    command = [
        "crossplay",
        root / "run.zarr",
        *given,
        *readers,
        "--out",
        tmp_path / "grid",
        "--device",
        "cpu",
    ]
    done = call(*command, "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == rows and len(done.json["sides"]) == 4
    one = call(*score(root, tmp_path / "one.parquet", texts[1], ar=other, device="cpu"))
    assert one.code == 0, one.err
    np.testing.assert_array_equal(
        column(tmp_path / "grid" / "01-01.parquet", "cos"), column(tmp_path / "one.parquet", "cos")
    )
    values = done.json["measures"]["cos"]["values"]["again by other"]
    assert abs(values[0] - column(tmp_path / "one.parquet", "cos").mean()) < 1e-5
    check_refused(call(*command), "exists; pass --resume")
    check_refused(
        call("crossplay", root / "run.zarr", *given[:2], *readers[:2], "--out", tmp_path / "g"),
        "several --texts, several --ar",
    )
    assert not (tmp_path / "g").exists()
