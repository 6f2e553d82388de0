"""Numbers of the study from planted rows and tables, where the right answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_engine.demo.claims import read_claims
from nla_engine.referee.intervals import Bootstrap
from nla_engine.studies.clauses import clause_losses
from nla_engine.studies.findings import ALL
from nla_engine.studies.multiplication.agreement import agreement
from nla_engine.studies.multiplication.analysis import (
    Rows,
    correctness,
    detection,
    findings,
    origins,
    tokenisation,
)
from nla_engine.studies.multiplication.answers import PLACES, Reply, Spot
from nla_engine.studies.multiplication.naming import Facts, kind_of
from nla_engine.studies.patched import load_patched, patch_findings, patched_means

BOOT = Bootstrap(0, 300)


def rows_of(count: int, *, right: float, fooled: float, names_the_wrong: bool) -> Rows:
    """One row ("first") per problem i: 10+i times 50+i. A share `right` is answered right. A share `fooled`
    is explained with other operands (those answered wrongly, if names_the_wrong); FVE is 0.9, or 0.2 if fooled."""
    correct = np.arange(count) < right * count
    wrong_text = ~correct if names_the_wrong else np.arange(count) % round(1 / fooled) == 0
    facts, named = [], []
    for i in range(count):
        a, b = 10 + i, 200 + i
        x, y = (a + 1000, b + 1000) if wrong_text[i] else (a, b)
        facts.append(Facts(a, b, a * b, "1", "2", frozenset({a, b, a * b}), f"{a}x{b}"))
        named.append(read_claims(f'{x} × {y} = {x * y}. The last token read is "1"; next comes "2".'))
    fve = np.where(wrong_text, 0.2, 0.9)
    return Rows(
        row=np.arange(count),
        sequence=np.arange(count),
        text=[""] * count,
        place=np.array(["first"] * count),
        cluster=np.array([f.cluster for f in facts]),
        correct=correct,
        fve=fve,
        rank=np.where(wrong_text, 5.0, 1.0),
        another=np.full(count, -0.5),
        rank_in_place=np.where(wrong_text, 3.0, 1.0),
        facts=facts,
        named=named,
    )


def test_naming_is_better_where_the_model_is_right() -> None:
    found = {
        (c.place, c.measure): c
        for c in correctness(rows_of(60, right=0.5, fooled=0.5, names_the_wrong=True), BOOT)
    }
    operands = found[ALL, "operands"]
    assert (operands.first.value, operands.second.value, operands.difference.value) == (1.0, 0.0, 1.0)
    assert found["first", "fve"].difference.value == pytest.approx(0.7)
    assert found[ALL, "other"].difference.value == -1.0 and found[ALL, "read"].difference.value == 0.0
    even = correctness(rows_of(60, right=0.5, fooled=0.5, names_the_wrong=False), BOOT)
    difference = next(c.difference for c in even if c.measure == "operands" and c.place == ALL)
    assert difference.value == 0 and difference.low < 0 < difference.high


@pytest.mark.parametrize("right", [1.0, 0.9, 0.1, 0.0])
def test_too_few_of_one_kind_give_no_comparison(right: float) -> None:
    assert correctness(rows_of(60, right=right, fooled=0.5, names_the_wrong=False), BOOT) == []


def test_scores_and_margins() -> None:
    rows = rows_of(40, right=1.0, fooled=0.25, names_the_wrong=False)
    found = {f.measure: f for f in findings(rows, 40, {}, BOOT)}
    assert found["fve"].own.value == pytest.approx(0.75 * 0.9 + 0.25 * 0.2)
    assert found["fve"].shuffled.value == -0.5 and found["fve"].margin.value == pytest.approx(1.225)
    assert found["top1"].own.value == found["top1_place"].own.value == 0.75
    assert found["top1"].shuffled.value == 1 / 40 and found["top1"].margin.value == pytest.approx(0.725)
    assert found["operands"].own.value == 0.75 and found["operands"].shuffled.value == 0
    assert found["read"].own.value == found["read"].shuffled.value == 1, "every text names the same digit"
    assert not found["read"].margin.above(0), "and so it says nothing"


def test_fve_tells_planted_falsehood() -> None:
    rows = rows_of(40, right=1.0, fooled=0.5, names_the_wrong=False)
    (contrast, auc), _ = detection(rows, BOOT)
    assert contrast.place == ALL and (contrast.first.value, contrast.second.value) == pytest.approx(
        (0.9, 0.2)
    )
    assert auc.value == auc.low == 1.0
    blind = Rows(**{**rows.__dict__, "fve": np.full(40, 0.5)})
    assert detection(blind, BOOT)[0][1].value == 0.5
    assert detection(rows_of(40, right=1.0, fooled=0.1, names_the_wrong=False), BOOT) == [], (
        "4 false ones are too few"
    )


def test_origin_of_products() -> None:
    true, other = origins(rows_of(40, right=1.0, fooled=0.5, names_the_wrong=False), BOOT)
    assert (true.pair, true.texts, other.texts) == ("true", 20, 20)
    assert true.true_product.value == true.stated_product.value == 1.0
    assert other.true_product.value == 0.0 and other.stated_product.value == 1.0


def replies(count: int) -> list[Reply]:
    out = []
    for i in range(count):
        record: dict[str, object] = {
            "a": 10 + i,
            "b": 50 + i,
            "product": 0,
            "pair": f"{i}",
            "phrasing": "what",
        }
        out.append(
            Reply(i, record, 1702, ("1", "7", "02"), {i: Spot("first", "1", "7")}, frozenset(), {i: 1})
        )
    return out


def test_agreement_of_planted_samples(tmp_path: Path) -> None:
    """Problems in quarters: three samples agree and are right (operands swapped in one), agree and are wrong, differ
    with one right, name nothing."""
    table: dict[str, list[object]] = {"row": [], "sequence": [], "explanation": []}
    for i in range(40):
        a, b = 10 + i, 50 + i
        texts = {
            0: [f"{a} × {b}", f"{b} × {a}", f"{a} × {b} = 7000"],
            1: [f"{a + 300} × {b}"] * 3,
            2: [f"{a} × {b}", f"{a + 500} × {b}", f"{a + 600} × {b}"],
            3: ["no numbers"] * 3,
        }[i % 4]
        for text in texts:
            table["row"].append(i), table["sequence"].append(i), table["explanation"].append(text)
    pq.write_table(pa.table(table), tmp_path / "samples.parquet")
    everywhere, first = agreement(replies(40), tmp_path / "samples.parquet", BOOT)
    assert (everywhere.place, first.place, first.rows) == (ALL, "first", 40)
    assert everywhere.same_pair.value == 0.5 and everywhere.chance.value == 0
    assert everywhere.unanimous.value == 0.5 and everywhere.right.value == pytest.approx(
        (1 + 0 + 1 / 3 + 0) / 4
    )
    assert everywhere.right_unanimous.value == 0.5
    assert everywhere.right_divided.value == pytest.approx((1 / 3 + 0) / 2)
    quarters = [
        (1 + 2 / 3 + 2 / 3) / 3,
        1.0,
        1 / 3,
        1.0,
    ]  # Jaccard: {a, b} with {a, b, 7000} is 2/3; one of three is shared
    assert everywhere.overlap.value == pytest.approx(sum(quarters) / 4)


def test_clause_losses_of_planted_scores(tmp_path: Path) -> None:
    """FVE 0.9 whole; each of two clauses costs a different amount; explanations of three are too rare to show."""
    entries: list[dict[str, object]] = []
    for row in range(40):
        parts = 3 if row == 0 else 2
        entries.append({"row": row, "variant": "whole", "units": parts, "fve_nrm": 0.9, "kl": 0.5})
        for unit in range(parts):
            clause = "37 × 46 = 1702." if unit == 0 else 'The token is "1".'
            of = {"row": row, "unit": unit, "units": parts, "clause": clause}
            for variant, lost in (("removed", 0.8 - unit / 10), ("swapped", 0.4), ("negated", 0.1)):
                if variant == "negated" and row % 2:
                    continue
                entries.append(
                    of | {"variant": variant, "fve_lost": None if row == 1 else lost, "kl_added": 3 * lost}
                )
                entries.append(of | {"variant": f"{variant}_control", "fve_lost": 0.25, "kl_added": 1.0})
    table = tmp_path / "clauses.parquet"
    names = {name: None for entry in entries for name in entry}
    pq.write_table(pa.table({name: [entry.get(name) for entry in entries] for name in names}), table)
    clusters, places = {row: str(row) for row in range(40)}, dict.fromkeys(range(40), "first")
    by_number, by_kind = clause_losses(table, places, clusters, PLACES, kind_of, BOOT)
    assert [(c.place, c.clause, c.about) for c in by_number] == [
        (ALL, "1 of 2", "numbers"),
        (ALL, "2 of 2", "tokens"),
        ("first", "1 of 2", "numbers"),
        ("first", "2 of 2", "tokens"),
    ]
    for clause, lost in zip(by_number[:2], (0.8, 0.7), strict=True):
        removed, negated = clause.cost("removed"), clause.cost("negated")
        assert (removed.own.value, removed.control.value) == pytest.approx((lost, 0.25))
        assert removed.margin.value == pytest.approx(lost - 0.25)
        assert removed.own.rows == removed.control.rows == 38, (
            "a text without a score is left out, with its control"
        )
        assert clause.rows == 39 and negated.own.rows == 19 and negated.margin.value == pytest.approx(-0.15)
        assert clause.cost("swapped", "kl_added").own.value == pytest.approx(1.2)
        assert clause.whole["fve_lost"].value == pytest.approx(0.9) and clause.whole["kl_added"].value == 0.5
    assert [c.clause for c in by_kind[:2]] == ["numbers", "tokens"] and by_kind[0].rows == 40


def test_what_the_model_makes_of_planted_patches(tmp_path: Path, rng: np.random.Generator) -> None:
    """Sums and means by hand; rows that were not patched are left out."""
    rows = rows_of(40, right=1.0, fooled=0.5, names_the_wrong=False)
    kl = {name: rng.uniform(0, 4, 40) for name in ("kl", "kl_mean", "kl_shuffled", "kl_zero", "kl_stored")}
    table = {name: values.tolist() for name, values in kl.items()}
    for variant in ("", "_mean", "_shuffled", "_zero", "_stored"):
        table["logprob_change" + variant] = [-1.0] * 40
        table["top1_same" + variant] = [bool(n % 2) if variant else True for n in range(40)]
    gone = {3, 17}
    for name, values in table.items():
        table[name] = [None if n in gone else value for n, value in enumerate(values)]
    order = rng.permutation([n for n in range(40) if n != 5])  # row 5 is not in the table
    path = tmp_path / "patched.parquet"
    pq.write_table(pa.table({"row": order} | {name: [table[name][n] for n in order] for name in table}), path)
    columns = load_patched(path, rows.row)
    there = [n for n in range(40) if n not in gone | {5}]
    sums = {name: values[there].sum() for name, values in kl.items()}
    found = {finding.measure: finding for finding in patch_findings(rows, columns, "first", BOOT)}
    assert found["kl"].own.value == pytest.approx(sums["kl"] / 37)
    assert found["kl"].margin.value == pytest.approx((sums["kl"] - sums["kl_shuffled"]) / 37)
    own, other = (1 - sums[name] / sums["kl_mean"] for name in ("kl", "kl_shuffled"))
    recovered = found["loss_recovered"]
    assert (recovered.own.value, recovered.shuffled.value) == pytest.approx((own, other))
    assert recovered.margin.value == pytest.approx(own - other)
    assert recovered.margin.low < own - other < recovered.margin.high
    assert found["top1_same"].own.value == 1.0
    assert found["top1_same"].shuffled.value == pytest.approx(sum(n % 2 for n in there) / 37)
    means = {(p.place, p.measure, p.variant): p.value for p in patched_means(rows, columns, ["first"], BOOT)}
    assert means[ALL, "kl", "zero"].value == pytest.approx(sums["kl_zero"] / 37)
    assert means["first", "logprob_change", "stored"].value == -1.0
    assert patch_findings(rows, {name: np.full(40, np.nan) for name in columns}, "first", BOOT) == []


def test_tokenisation_counts() -> None:
    ((digits, cut, count, share, sticking),) = tokenisation(replies(7))
    assert (digits, cut, count, share.value, sticking.value) == (4, "1+1+2", 7, 1.0, 0.0)
    assert not math.isnan(share.low)
