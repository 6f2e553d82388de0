"""The card and the reading of a run, against float64 by hand; what was not measured is never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import call, check_refused
from report_samples import VARIANCE
from sides import changed, claims, column, controls, patched, patched_controls, planted_run

from nla_engine.referee.evidence import Evidence
from nla_engine.referee.reading import NOT_MEASURED, findings


def test_a_full_card_by_hand(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    cos = column(a, "cos")
    kl, mean, other = (rng.uniform(*bounds, len(cos)) for bounds in ((0, 0.1), (2, 3), (2, 4)))
    holds, chance = rng.random((len(cos), 2)) < 0.6, rng.random((len(cos), 2)) < 0.1
    a = changed(a, tmp_path / "s.parquet", metadata={"speed": {"rows_per_second": 12.5, "device": "cpu"}})
    tables = [
        a,
        patched(a, tmp_path / "p.parquet", kl, mean, other),
        controls(a, tmp_path / "c.parquet", last_1=cos - 0.02, other_place=cos - 0.3),
        claims(a, tmp_path / "t.parquet", 2, holds, chance),
    ]
    assert call("card", *tables, "--out", tmp_path / "card.json").code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    measures = card["measures"]
    expected = {
        "fve": (1 - 2 * (1 - cos) / VARIANCE).mean(),
        "fve_over_text": 0.04 / VARIANCE,
        "loss_recovered": 1 - kl.sum() / mean.sum(),
        "top1_same": 1.0,
        "claims_true": holds.mean(),
        "closed": 1.0,
    }
    for key, value in expected.items():
        assert measures[key]["value"] == pytest.approx(value, abs=2e-6), key
        assert measures[key]["low"] <= value + 2e-6 and value - 2e-6 <= measures[key]["high"], key
    assert measures["claims_true"]["control"]["value"] == pytest.approx(chance.mean(), abs=2e-6)
    assert measures["fve_over_text"]["control"]["is"].endswith("last_1")
    assert measures["claims_true_number"]["value"] == measures["claims_true"]["value"]
    assert "claims_true_name" not in measures and measures["fve"]["rows"] == len(cos)
    assert measures["vectors_per_second"] == {"value": 12.5, "device": "cpu", "of": "AR"}
    assert measures["judged_true"] is None and card["rows"]["rows"] == len(cos)
    assert [f["verdict"] for f in card["reading"]][1:] == ["part", "most", "part"]
    words = (tmp_path / "card.md").read_text()
    assert "| judged true | not measured |" in words and "| vectors a second | 12.500 | AR on cpu |" in words


def test_patched_controls_count_as_controls(tmp_path: Path, rng: np.random.Generator) -> None:
    """Their lines are no explanations; what is recovered over the best control is a ratio of sums, by hand."""
    a = planted_run(tmp_path / "a", rng)
    size = len(column(a, "cos"))
    kl, mean = rng.uniform(0, 0.1, size), rng.uniform(2, 3, size)
    near, far = kl + rng.uniform(0.2, 0.4, size), kl + 9
    both = patched_controls(a, tmp_path / "pc.parquet", mean, explained=kl, last_1=near, reader=far)
    slow = controls(a, tmp_path / "c.parquet", last_1=column(a, "cos") - 0.1)
    slow = changed(slow, slow, metadata={"speed": {"rows_per_second": 3.0, "device": "cpu"}})
    for tables in ([a, both], [both, a], [both], [a, both, slow]):
        quantities = Evidence.read(tables, "x").quantities
        recovered, over = quantities["loss_recovered"], quantities["loss_over_text"]
        assert recovered.top.sum() / recovered.bottom.sum() == pytest.approx(1 - kl.sum() / mean.sum())
        assert over.top.sum() / over.bottom.sum() == pytest.approx((near - kl).sum() / mean.sum())
        assert over.of == "last_1"
    alone = patched(a, tmp_path / "p.parquet", kl / 2, mean, mean + 1)
    quantities = Evidence.read([both, alone, a], "x").quantities
    recovered = quantities["loss_recovered"]
    assert recovered.top.sum() / recovered.bottom.sum() == pytest.approx(1 - kl.sum() / 2 / mean.sum())
    assert "loss_over_text" in quantities
    worse = patched_controls(a, tmp_path / "w.parquet", mean, explained=kl, last_1=mean + 1)
    assert Evidence.read([worse], "x").quantities["loss_over_text"].of == "mean vector"
    assert call("card", a, both, slow, "--out", tmp_path / "card.json").code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["measures"]["loss_over_text"]["control"]["is"].endswith("last_1")
    assert card["measures"]["vectors_per_second"] is None, "a run of controls is no run of the pair"
    assert "loss recovered over text is" in card["reading"][1]["says"]


def test_samples_that_agree_stand_beside_another_row(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    flags = np.ones((len(column(a, "cos")), 2), bool)
    t = claims(a, tmp_path / "t.parquet", 2, flags, flags)
    claimed = column(t, "side") == "claim"
    shares = [np.where(claimed, rng.random(len(claimed)), np.nan) for _ in range(2)]
    own, other = ([None if np.isnan(v) else v for v in values] for values in shares)
    t = changed(t, t, agree=own, agree_control=other)
    agree = Evidence.read([a, t], "x").quantities["samples_agree"]
    assert agree.top.sum() / agree.bottom.sum() == pytest.approx(np.nanmean(shares[0]))
    assert agree.control is not None
    assert agree.control[0].sum() / agree.control[1].sum() == pytest.approx(np.nanmean(shares[1]))
    assert call("card", a, t, "--out", tmp_path / "card.json").code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["measures"]["samples_agree"]["value"] == pytest.approx(np.nanmean(shares[0]), abs=2e-6)


def test_what_was_not_measured_is_null_and_said(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    assert call("card", a, "--out", tmp_path / "card.json").code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    for key in ("loss_recovered", "fve_over_text", "claims_true", "top1_same", "vectors_per_second"):
        assert card["measures"][key] is None
    says = {f["verdict"]: f["says"] for f in card["reading"]}
    assert says[NOT_MEASURED].startswith("not measured: run `nla-engine ")
    assert (tmp_path / "card.md").read_text().count("not measured") >= 8
    check_refused(call("card", a, "--out", tmp_path / "card.json"), "exists: pass --overwrite")
    check_refused(call("card", a, "--out", tmp_path / "card.txt"), "ends in .txt, and the card is JSON")


def test_a_measure_without_its_control_is_not_printed(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    bare = changed(a, tmp_path / "b.parquet", cos_shuffled=[None] * len(column(a, "cos")))
    assert call("card", bare, "--out", tmp_path / "card.json").code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["measures"]["fve"] is None and card["measures"]["cos"] is None
    assert card["reading"][0]["verdict"] == NOT_MEASURED


def verdict(path: Path) -> str:
    pair = Evidence.read([path], "x")
    return findings(pair.quantities, pair.rows["sequence"])[0].verdict


def test_verdicts_follow_the_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    size = len(column(a, "cos"))

    def at(fve: float, **more: object) -> Path:
        cos = 1 - (1 - fve - rng.uniform(-0.01, 0.01, size)) * VARIANCE / 2
        return changed(a, tmp_path / "at.parquet", cos=cos, **more)

    assert verdict(at(0.9)) == "most"
    assert verdict(at(0.3)) == "part"
    assert verdict(at(-0.3)) == "no"
    assert verdict(at(0.9, cos_shuffled=column(at(0.95), "cos"))) == "no"  # the control is as good
    assert verdict(at(0.9, keep=[0, 1, 2])) == "undecided"


def test_the_page_of_a_run_says_what_its_numbers_show(tmp_path: Path, rng: np.random.Generator) -> None:
    a = planted_run(tmp_path / "a", rng)
    kl = rng.uniform(0, 0.1, len(column(a, "cos")))
    p = patched(a, tmp_path / "p.parquet", kl, kl + 3, kl + 4)
    page = tmp_path / "page.html"
    store = tmp_path / "a" / "run.zarr"
    assert call("report", store, "--explained", a, "--out", page).code == 0
    assert page.read_text().count("not measured: run `nla-engine") == 3
    assert call("report", store, "--explained", a, "--also", p, "--out", page, "--overwrite").code == 0
    assert "nearly as on the original: loss recovered" in page.read_text()
    other = planted_run(tmp_path / "o", rng)
    check_refused(
        call("report", store, "--explained", a, "--also", other, "--out", page, "--overwrite"),
        "two of its tables are of roundtrip or score",
    )
