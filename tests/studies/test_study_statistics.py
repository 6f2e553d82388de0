"""Intervals and measures of studies, against independent truths: closed forms, plain loops, planted texts."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from nla_engine.demo.claims import read_claims
from nla_engine.referee.intervals import FEWEST_CLUSTERS, Bootstrap, proportion, wilson
from nla_engine.studies.multiplication.naming import MEASURES, Facts, TextIndex, chance, named_flags


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Known values: Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_proportion_of_nothing_is_unknown() -> None:
    assert all(math.isnan(value) for value in wilson(0, 0))
    assert not proportion(np.zeros(0, bool)).known


def test_bootstrap_mean_is_what_loops_over_clusters_give(rng: np.random.Generator) -> None:
    values, clusters = rng.normal(size=60), rng.integers(0, 12, 60).astype(str)
    boot = Bootstrap(3, resamples=200)
    found = boot.mean(values, clusters)
    names = sorted(set(clusters))
    means = []
    for weights in boot._weights(len(names)):
        drawn = [
            v for name, w in zip(names, weights, strict=True) for v in list(values[clusters == name]) * int(w)
        ]
        means.append(sum(drawn) / len(drawn))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert (found.rows, found.clusters) == (60, len(names))


def test_rows_of_one_cluster_are_no_new_evidence(rng: np.random.Generator) -> None:
    """Repeating every row ten times must not narrow the interval. For single rows it is the normal theory's."""
    values = rng.normal(size=400)
    boot = Bootstrap(0)
    once = boot.mean(values, np.arange(400))
    many = boot.mean(np.repeat(values, 10), np.repeat(np.arange(400), 10))
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
    expected = 2 * 1.96 * values.std() / 20
    assert once.high - once.low == pytest.approx(expected, rel=0.15)


def test_intervals_cover_as_often_as_they_say() -> None:
    """95% intervals of 40 clusters around a known mean: the percentile method covers it in about 93 of 100 runs."""
    rng, hits, runs = np.random.default_rng(1), 0, 500
    for run in range(runs):
        offsets = rng.normal(size=40)
        values = np.repeat(offsets, 5) + rng.normal(size=200)
        found = Bootstrap(run, 500).mean(values, np.repeat(np.arange(40), 5))
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / runs <= 0.97


def test_unmeasured_values_are_left_out_and_few_clusters_give_no_interval() -> None:
    found = Bootstrap(0).mean(np.array([1.0, math.nan, 3.0]), np.array(["a", "b", "c"]))
    assert (found.value, found.rows, found.clusters) == (2.0, 2, 2)
    assert math.isnan(found.low) and found.clusters < FEWEST_CLUSTERS
    assert not found.above(-9) and not found.below(9), "an unknown interval supports no claim"
    assert not Bootstrap(0).mean(np.array([math.nan]), np.array(["a"])).known


def test_shares_without_exception_keep_their_doubt() -> None:
    values, clusters = np.ones(40), np.repeat(np.arange(20), 2)
    found = Bootstrap(0).mean(values, clusters, binary=True)
    assert (found.low, found.high) == pytest.approx(wilson(20, 20))
    margin = Bootstrap(0).margin(values, np.full(40, 0.25), clusters, binary=True)
    assert margin.value == 0.75 and margin.low == pytest.approx(wilson(20, 20)[0] - 0.25)


def test_difference_between_groups(rng: np.random.Generator) -> None:
    group = rng.random(500) < 0.4
    values = np.where(group, 2.0, 0.5) + rng.normal(size=500) * 0.1
    found = Bootstrap(0).difference(values, np.arange(500), group)
    assert found.value == pytest.approx(values[group].mean() - values[~group].mean())
    assert found.low < found.value < found.high and found.high - found.low < 0.1


def test_intervals_of_a_difference_cover_as_often_as_they_say() -> None:
    """One interval of 95% misses the truth in one run of twenty, so many are tried, always the same ones."""
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        group = rng.random(500) < 0.4
        values = np.where(group, 2.0, 0.5) + rng.normal(size=500) * 0.1
        found = Bootstrap(0).difference(values, np.arange(500), group)
        hits += found.low < 1.5 < found.high
    assert 36 <= hits <= 40
    assert not Bootstrap(0).difference(values, np.arange(500), np.ones(500, bool)).known


def test_separation_counts_pairs(rng: np.random.Generator) -> None:
    values = rng.integers(0, 6, 80).astype(float)  # with ties
    group = rng.random(80) < 0.5
    pairs = list(product(values[group], values[~group]))
    counted = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    found = Bootstrap(0, 100).separation(values, np.arange(80), group)
    assert found.value == pytest.approx(counted) and found.low <= counted <= found.high
    sure = Bootstrap(0, 100).separation(np.arange(80.0), np.arange(80), np.arange(80) >= 40)
    assert (sure.value, sure.low, sure.high) == (1.0, 1.0, 1.0)


def facts(a: int, b: int, **changes: object) -> Facts:
    allowed = frozenset({a, b, a * b})
    values = {"read": "1", "coming": "7", "allowed": allowed, "cluster": f"{a}x{b}", **changes}
    return Facts(a=a, b=b, product=a * b, **values)  # type: ignore[arg-type]


def text(a: int, b: int, read: str = "1", coming: str = "7") -> str:
    return f'The user asks for {a} times {b}, which is {a * b}. The last token read is "{read}"; next comes "{coming}".'


def test_true_explanations_name_all_and_wrong_ones_none() -> None:
    truth = [facts(10 + i, 50 + i) for i in range(20)]
    right = [read_claims(text(f.a, f.b)) for f in truth]
    wrong = [read_claims(text(f.a + 30, f.b + 40, "2", "8")) for f in truth]
    for named, share in ((right, 1.0), (wrong, 0.0)):
        index = TextIndex(named, [f.cluster for f in truth])
        for measure in MEASURES:
            expected = 1 - share if measure == "other" else share
            assert named_flags(index, truth, measure) == [expected] * 20, measure


def test_a_partly_true_explanation() -> None:
    """The true operands with another product: operands 1, product 0, other 1."""
    index = TextIndex([read_claims("37 × 46 = 1703, digit 2 of 4")], ["37x46"])
    flags = {measure: named_flags(index, [facts(37, 46)], measure)[0] for measure in MEASURES}
    assert flags == {"operands": 1, "product": 0, "read": 0, "coming": 0, "other": 1}
    assert math.isnan(named_flags(index, [facts(37, 46, read=None)], "read")[0])


def test_chance_is_the_share_among_texts_of_other_pairs(rng: np.random.Generator) -> None:
    """Against a plain loop over all pairs of texts and facts, with several texts per cluster and many coincidences."""
    truth, named = [], []
    for _ in range(60):
        a, b = (int(x) for x in rng.integers(2, 6, 2))
        read, coming = (str(x) for x in rng.integers(0, 3, 2))
        cluster = f"{min(a, b)}x{max(a, b)}"
        truth.append(facts(a, b, read=read, coming=coming, cluster=cluster))
        x, y = (int(x) for x in rng.integers(2, 6, 2))
        named.append(
            read_claims(text(x, y, *(str(d) for d in rng.integers(0, 3, 2))) if rng.random() < 0.9 else "")
        )
    index = TextIndex(named, [f.cluster for f in truth])
    holds = {
        "operands": lambda n, f: {f.a, f.b} <= n.numbers,
        "product": lambda n, f: f.product in n.numbers,
        "read": lambda n, f: f.read in n.reads,
        "coming": lambda n, f: f.coming in n.nexts,
        "other": lambda n, f: not n.numbers <= f.allowed,
    }
    for measure in MEASURES:
        found = chance(index, truth, measure)
        for f, share in zip(truth, found, strict=True):
            others = [
                holds[measure](n, f) for n, t in zip(named, truth, strict=True) if t.cluster != f.cluster
            ]
            assert share == pytest.approx(sum(others) / len(others)), measure
    alone = TextIndex(named[:1], ["one"])
    assert math.isnan(chance(alone, [facts(2, 3, cluster="one")], "product")[0])
