"""Compare: planted sides whose differences are known, rows that do not match, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import call, check_refused, contents
from conftest import Open
from report_samples import VARIANCE
from sides import changed, claims, column, controls, patched, planted_run

from nla_engine import compare
from nla_engine.comparison.files import PAGE
from nla_engine.referee.intervals import Estimate

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>{{data}}"


def bootstrap(values: np.ndarray, clusters: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """Percentiles of the mean by drawing whole clusters, one by one and by other random numbers."""
    rng, groups = np.random.default_rng(12345), [values[clusters == c] for c in np.unique(clusters)]
    means = [
        np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]).mean()
        for _ in range(draws)
    ]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def exactly_zero(estimate: Estimate) -> bool:
    return (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_a_planted_difference_is_found_with_the_interval_of_a_plain_bootstrap(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    a = planted_run(tmp_path / "a", rng)
    cos = column(a, "cos")
    better = cos + 0.05 + rng.uniform(-0.02, 0.02, len(cos))
    order = rng.permutation(len(cos))  # a table may be in any order
    b = changed(changed(a, tmp_path / "b.parquet", cos=better), tmp_path / "b.parquet", keep=order)
    found = compare(a, b)
    clusters = column(a, "sequence")
    for key, scale in (("cos", 1.0), ("fve", 2 / VARIANCE)):
        line = found.line(key)
        assert line is not None
        over, expected = line.over[0, 1], (better - cos) * scale
        assert over.value == pytest.approx(expected.mean(), abs=1e-12)
        width = over.high - over.low
        assert (over.low, over.high) == pytest.approx(bootstrap(expected, clusters), abs=0.15 * width)
        assert over.low > 0.02 * scale
        # The pairing matters: apart, the two means are far less certain.
        assert line.values[0].high - line.values[0].low > 2 * width
    line = found.line("fve")
    assert line is not None
    assert line.values[0].value == pytest.approx((1 - 2 * (1 - cos) / VARIANCE).mean(), abs=1e-12)
    control = line.controls[0]
    assert control is not None and control.value == pytest.approx(1 - 2 * (1 - 0.1) / VARIANCE, abs=1e-12)


def test_equal_tables_differ_by_exactly_0(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    kl = rng.uniform(0, 1, len(column(a, "cos")))
    p = patched(a, tmp_path / "p.parquet", kl, kl + 1, kl + 2)
    shuffled = rng.permutation(len(kl))
    b, q = (changed(path, tmp_path / f"{path.stem}2.parquet", keep=shuffled) for path in (a, p))
    found = compare(f"{a},{p}", f"{b},{q}")
    assert {"fve", "retrieval_top1", "loss_recovered", "closed"} <= {line.measure.key for line in found.lines}
    for line in found.lines:
        assert exactly_zero(line.over[0, 1]), line.measure.key


def test_measures_of_further_tables_are_ratios_of_sums(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    cos, size = column(a, "cos"), len(column(a, "cos"))
    kl, mean, other = rng.uniform(0, 1, size), rng.uniform(2, 3, size), rng.uniform(1, 4, size)
    holds, chance = rng.random((size, 3)) < 0.7, rng.random((size, 3)) < 0.2
    p = patched(a, tmp_path / "p.parquet", kl, mean, other)
    c = controls(a, tmp_path / "c.parquet", last_5=cos - 0.3, reader=cos - 0.02)
    t = claims(a, tmp_path / "t.parquet", 3, holds, chance)
    found = compare(f"one={a},{p},{c},{t}", f"two={a}")
    assert set(found.absent) >= {"loss_recovered", "fve_over_text", "claims_true"}
    found = compare(f"one={a},{p},{c},{t}", f"two={a},{p},{c},{t}")
    expected = {
        "loss_recovered": (1 - kl.sum() / mean.sum(), 1 - other.sum() / mean.sum()),
        "kl": (kl.mean(), other.mean()),
        "fve_over_text": (0.04 / VARIANCE, (1 - 2 * (1 - cos + 0.02) / VARIANCE).mean()),
        "claims_true": (holds.mean(), chance.mean()),
        "facts_named": (1.0, 1.0),
    }
    for key, (own, control) in expected.items():
        line = found.line(key)
        assert line is not None and line.controls[0] is not None, key
        assert line.values[0].value == pytest.approx(own, abs=1e-6), key
        assert line.controls[0].value == pytest.approx(control, abs=1e-6), key


def test_rows_that_not_all_have_are_counted_and_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    rows = np.arange(len(column(a, "cos")))
    b = changed(a, tmp_path / "b.parquet", keep=rng.permutation(rows[:-7]))
    c = changed(a, tmp_path / "c.parquet", keep=rows[2:])
    found = compare(a, b, c)
    assert found.left_out == [9, 2, 7] and found.size == len(rows) - 9
    line = found.line("cos")
    assert line is not None
    assert [v.value for v in line.values] == pytest.approx([column(a, "cos")[2:-7].mean()] * 3, abs=1e-12)


def test_one_row_has_values_and_no_interval(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    b = changed(a, tmp_path / "b.parquet", keep=[4])
    found = compare(a, b, out=tmp_path / "out")
    line = found.line("cos")
    assert line is not None and found.size == 1
    assert line.values[0].value == column(a, "cos")[4] and not line.values[0].bounded
    assert line.over[0, 1].value == 0 and not line.over[0, 1].bounded
    assert (tmp_path / "out" / PAGE).exists()


def test_the_same_rows_of_another_store_are_compared(tmp_path: Path, rng: np.random.Generator) -> None:
    a, b = planted_run(tmp_path / "a", rng), planted_run(tmp_path / "b", rng)
    found = compare(a, b)
    assert found.size == len(column(a, "cos")) and "several stores" in found.notes[0]
    norms = column(b, "norm").copy()
    norms[5] += 1
    other = changed(b, tmp_path / "other.parquet", norm=norms)
    check_refused(call("compare", a, other), "another store than .*: compare tables of one store")


def test_samples_of_one_table(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    size, cos = len(column(a, "cos")), column(a, "cos")
    two = changed(
        changed(a, tmp_path / "two.parquet", keep=np.tile(np.arange(size), 2)),
        tmp_path / "two.parquet",
        sample=np.repeat([0, 1], size),
        cos=np.concatenate([cos, cos - 0.25]),
    )
    line = compare(two, by_sample=True).line("cos")
    assert line is not None and line.over[0, 1].value == pytest.approx(-0.25, abs=1e-12)


def test_layers_need_leave_and_lose_cos(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    b = changed(a, tmp_path / "b.parquet", metadata={"layer": 7, "variance": 0.5})
    check_refused(call("compare", a, b), "is about layer 7, .* about layer 3: --across-layers")
    found = compare(a, b, across_layers=True)
    assert found.line("cos") is None and "cos" in found.absent
    line = found.line("fve")
    assert line is not None
    assert line.values[1].value == pytest.approx((1 - 2 * (1 - column(a, "cos")) / 0.5).mean(), abs=1e-12)


def of_other_texts(table: Path, directory: Path) -> Path:
    """The table of patch of other explanations of the same rows."""
    size = len(column(table, "cos"))
    other = changed(table, directory / "b.parquet", explanation=["x"] * size)
    return patched(other, directory / "p.parquet", *np.ones((3, size)))


def test_controls_that_are_read_badly_do_not_make_explanations_good(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """The best control is at least the mean vector, whose FVE is 0."""
    a = planted_run(tmp_path / "a", rng)
    cos = column(a, "cos")
    c = controls(a, tmp_path / "c.parquet", last_1=cos - 1.2, last_5=cos - 1.3)
    line = compare(f"x={a},{c}", f"y={a},{c}").line("fve_over_text")
    assert line is not None and line.controls[0] is not None and line.controls[0].value == 0
    assert line.values[0].value == pytest.approx((1 - 2 * (1 - cos) / VARIANCE).mean(), abs=1e-12)


FAULTS: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "one side": (lambda a, d: [a], "compare takes two sides or more"),
    "no file": (lambda a, d: [a, d / "none.parquet"], "none.parquet: no such file"),
    "no table": (lambda a, d: [a, d / "x.zarr"], "x.zarr: "),
    "nothing in common": (
        lambda a, d: [
            changed(a, d / "b.parquet", keep=[0, 1]),
            changed(a, d / "c.parquet", keep=[2, 3]),
        ],
        "have no row in common",
    ),
    "two tables of a kind": (lambda a, d: [f"{a},{a}", a], "two of its tables are of roundtrip or score"),
    "other texts": (
        lambda a, d: [f"{a},{of_other_texts(a, d)}", a],
        "has another text than",
    ),
    "one name twice": (lambda a, d: [f"x={a}", f"x={a}"], "two sides are named x"),
    "samples of several": (lambda a, d: [a, a, "--by-sample"], "--by-sample takes the tables of one side"),
    "one sample": (lambda a, d: [a, "--by-sample"], "has one sample per row"),
    "another store": (lambda a, d: [a, a, "--store", d / "none.zarr"], "none.zarr: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_refused(fault: str, tmp_path: Path) -> None:
    a = planted_run(tmp_path / "a", np.random.default_rng(0), 6)
    arguments, words = FAULTS[fault]
    given = arguments(a, tmp_path)
    before = contents(tmp_path)  # after the tables of the fault were made
    check_refused(call("compare", *given, "--out", tmp_path / "out"), words)
    assert contents(tmp_path) == before


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    a = planted_run(tmp_path / "a", np.random.default_rng(0), 6)
    check_refused(call("compare", a, a, "--out", tmp_path / "a"), "holds other files and no comparison")
    assert call("compare", a, a, "--out", tmp_path / "out").code == 0
    check_refused(call("compare", a, a, "--out", tmp_path / "out"), "pass --overwrite")
    done = call("compare", a, a, "--out", tmp_path / "out", "--overwrite", "--json")
    assert (
        done.code == 0
        and done.json["measures"].keys()
        == json.loads((tmp_path / "out" / "compare.json").read_text())["measures"].keys()
    )


def test_the_page_in_a_browser(tmp_path: Path, open_page: Open) -> None:
    """Rows by disagreement, search, other orders, both areas, hostile text as text, and no sideways scrolling."""
    a = planted_run(tmp_path / "a", np.random.default_rng(0), 6)
    cos = column(a, "cos").copy()
    cos[[4, 9]] -= [0.5, 1.0]
    said = [text.as_py() for text in pq.read_table(a)["explanation"]]
    said[4] = HOSTILE
    b = changed(a, tmp_path / "b.parquet", cos=cos, explanation=said)
    compare(f"{HOSTILE.replace('/', '').replace('=', '')}={a}", f"b={b}", out=tmp_path / "out")
    for width, height in ((1280, 860), (400, 800)):
        page = open_page(tmp_path / "out" / PAGE)
        page.set_viewport_size({"width": width, "height": height})
        entries = page.locator(".entry")
        assert entries.count() == 18
        assert "sequence 3, position 0" in entries.nth(0).inner_text()
        assert HOSTILE in entries.nth(1).locator(".side").nth(1).inner_text()
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("[name=order]").select_option("as in the store")
        assert "sequence 0, position 0" in entries.nth(0).inner_text()
        page.locator("[name=q]").fill("text 2 1")
        assert entries.count() == 1
        page.locator("#tab-measures").click()
        assert page.locator("#area-measures table").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= width
