"""Controls of the text alone: their texts, draws that know no order, planted verbalizers told apart, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import call, check_refused, flags, json_lines, patch
from transformers import AutoTokenizer

from nla_engine.referee import load as referee_load
from nla_engine.referee.added import MEAN, Added
from nla_engine.referee.intervals import Bootstrap
from nla_engine.referee.partners import partners
from nla_engine.roundtrip import pair as pairs
from nla_engine.store import CaptureStore


def controls(root: Path, out: Path, explained: Path | None = None, **changes: object) -> list[object]:
    given = {
        "explained": explained or root / "explained.parquet",
        "out": out,
        "reader": "none",
        "device": "cpu",
    }
    store = changes.pop("store", root / "run.zarr")
    return ["controls", store, *flags({**given, **changes})]


def test_every_text_is_what_its_name_says(root: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    out, seed = tmp_path / "c.parquet", int(rng.integers(1000))
    ran = call(*controls(root, out, last_k="2,7", seed=seed, reader=root / "base"), "--json")
    assert ran.code == 0, ran.err
    store, lines = CaptureStore.open(root / "run.zarr"), pq.read_table(out).to_pylist()
    given = {line["row"]: line for line in pq.read_table(root / "explained.parquet").to_pylist()}
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    kinds: dict[str, int] = {}
    for line in lines:
        kinds[line["control"]] = kinds.get(line["control"], 0) + 1
        own, of = given[line["row"]], given[line["of_row"]]
        sequence = store.sequence(line["sequence"])
        if line["control"] == "explained":
            assert (line["explanation"], line["of_row"]) == (own["explanation"], line["row"])
            assert line["cos"] == pytest.approx(own["cos"], abs=1e-6)
            assert line["fve_nrm"] == pytest.approx(own["fve_nrm"], abs=1e-4)
            assert line["retrieval_rank"] == own["retrieval_rank"]
        elif line["control"].startswith("last_"):
            k, end = int(line["control"][5:]), line["position"] + 1
            ids = sequence.tokens[max(end - k, 0) : end]
            assert line["explanation"] == tokenizer.decode(ids) and line["n_tokens"] == len(ids)
        elif line["control"] == "other_place":
            assert of["sequence"] == line["sequence"] and of["position"] != line["position"]
            assert line["explanation"] == of["explanation"]
        elif line["control"] == "other_text":
            assert of["sequence"] != line["sequence"] and of["token"] == line["token"]
            assert line["explanation"] == of["explanation"]
    assert kinds["explained"] == kinds["last_2"] == kinds["last_7"] == kinds["reader"] == len(given)
    frame, found = {}, ran.json
    for line in lines:
        frame.setdefault(line["control"], {})[line["row"]] = line["fve_nrm"]
    for name, measured in found["controls"].items():
        apart = [frame["explained"][row] - value for row, value in frame[name].items()]
        assert measured["over"][0] == pytest.approx(np.mean(apart), abs=1e-5)
    assert len(found["says"]) >= 3
    patched = call(*patch(root, tmp_path / "p.parquet", out), "--json")
    assert patched.code == 0, patched.err
    table = pq.read_table(tmp_path / "p.parquet").to_pandas()
    assert patched.json["kl"] == pytest.approx(table[table.control == "explained"].kl.mean(), rel=1e-4)
    own, over = table[table.control == "explained"].set_index("row"), {}
    for name, measured in patched.json["controls"].items():
        part = table[table.control == name]
        both = own.loc[part.row]
        over[name] = (part.kl.to_numpy() - both.kl.to_numpy()).sum() / both.kl_mean.sum()
        assert measured["over"][0] == pytest.approx(over[name], abs=1e-4)
        assert measured["over"][1] <= measured["over"][2]
        assert measured["loss_recovered"] == pytest.approx(1 - part.kl.mean() / part.kl_mean.mean(), abs=1e-4)
    over |= {"mean vector": patched.json["loss_recovered"]}
    counted = [name for name in over if name not in kinds or kinds[name] >= len(given) / 2]
    best = min(counted, key=over.__getitem__)
    assert patched.json["best_control"] == best
    assert patched.json["loss_over_text"][0] == pytest.approx(over[best], abs=1e-4)
    apart = own.kl_shuffled.sum() - own.kl.sum()
    assert patched.json["loss_recovered_margin"][0] == pytest.approx(apart / own.kl_mean.sum(), abs=1e-3)
    bounds = (*patched.json["loss_recovered_interval"], *patched.json["loss_over_text"][1:])
    assert bounds[0] <= bounds[1] and bounds[2] <= bounds[3]


def test_draws_know_no_order(rng: np.random.Generator) -> None:
    sequence = np.repeat(rng.permutation(9), rng.integers(1, 7, 9))
    position = np.concatenate([np.arange(n) for n in np.unique(sequence, return_counts=True)[1]])
    sequence = np.sort(sequence)
    token, seed = rng.integers(0, 4, len(sequence)), int(rng.integers(1000))
    shuffled = rng.permutation(len(sequence))
    for group, own in ((sequence, position), (token, sequence)):
        found = partners(group, own, position, sequence, seed)
        again = partners(*(x[shuffled] for x in (group, own, position, sequence)), seed)
        back = np.where(again >= 0, shuffled[again], -1)
        np.testing.assert_array_equal(found[shuffled], back)
        for place, other in enumerate(found):
            fit = np.flatnonzero((group == group[place]) & (own != own[place]))
            assert other in fit if len(fit) else other == -1


class Planted:
    """An AR that reads the last token of a text, or the code of a vector, and takes other words for the mean."""

    layer, further = 2, {}

    def __init__(self, real: object, store: CaptureStore, coded: dict[str, torch.Tensor]) -> None:
        self.lm, self.sidecar, self.kernels, self.coded = real.lm, real.sidecar, real.kernels, coded  # type: ignore[attr-defined]
        self.maps, self._real = real.maps, real  # type: ignore[attr-defined]
        vectors, token = torch.from_numpy(store.layer(2)[:]), store.column("token_id")
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        self.mean = unit.mean(0)
        names = store.token_text(token)
        self.known = {name: unit[[n == name for n in names]].mean(0) for name in set(names) if name}

    def fingerprint(self) -> str:
        return "planted"

    def prompt_sizes(self, texts: list[str]) -> list[int]:
        return [1] * len(texts)

    def prepare(self, tokens: int) -> None: ...

    def close(self) -> None: ...

    def reconstruct_layers(self, texts: list[str]) -> dict[int, torch.Tensor]:
        return {2: torch.stack([self._read(text) for text in texts])}

    def _read(self, text: str) -> torch.Tensor:
        if text in self.coded:
            return self.coded[text]
        ends = [name for name in self.known if text.endswith(name)]
        return self.known[max(ends, key=len)] if ends else self.mean


@pytest.mark.parametrize("kind", ["copies the text", "encodes the vector", "ignores the vector"])
def test_planted_verbalizers_are_told_apart(kind: str, root: Path, tmp_path: Path, monkeypatch) -> None:
    store = CaptureStore.open(root / "run.zarr")
    vectors = torch.from_numpy(store.layer(2)[:])
    coded = {f"zub {row:x} qof": vector for row, vector in enumerate(vectors)}
    words = {
        "copies the text": store.token_text(store.column("token_id")),
        "encodes the vector": list(coded),
        "ignores the vector": ["\u00b6"] * len(vectors),
    }[kind]
    texts = json_lines(tmp_path / "t.jsonl", [{"row": r, "text": t} for r, t in enumerate(words)])

    def planted(*arguments: object, **more: object) -> pairs.Pair:
        made = pairs.load_pair(*arguments, **more)  # type: ignore[arg-type]
        made.reconstructor = Planted(made.ar, store, coded)  # type: ignore[assignment]
        return made

    monkeypatch.setattr(referee_load, "load_pair", planted)
    ran = call(*controls(root, tmp_path / "c.parquet", texts, ar=root / "ar"), "--json")
    assert ran.code == 0, ran.err
    value, low, high = ran.json["fve_over_text"]
    if kind == "encodes the vector":
        assert low > 0.05 and ran.json["fve_nrm"] == pytest.approx(1, abs=1e-4)
        assert "carry more than any control" in ran.json["says"][0]
    else:
        assert value <= 1e-6 and high <= 1e-6
        assert "carry more than any control" not in ran.json["says"][0]
    if kind == "copies the text":
        assert ran.json["controls"]["last_1"]["over"] == [0, 0, 0]
        assert ran.json["fve_nrm"] > 0.01


def test_the_best_control_is_chosen_in_every_draw(rng: np.random.Generator) -> None:
    clusters = rng.integers(0, 12, 200)
    values = rng.normal(size=(3, 200)) + rng.normal(size=12)[clusters]
    values[1, rng.random(200) < 0.3] = np.nan
    boot = Bootstrap(int(rng.integers(1000)), 400)
    found = boot.least(values, clusters)
    assert found.value == pytest.approx(np.nanmean(values, 1).min())
    names, index = np.unique(clusters, return_inverse=True)
    least = []
    for weights in boot._weights(len(names)):
        w = weights[index]
        least.append(min(np.nansum(w * v) / w[np.isfinite(v)].sum() for v in values))
    np.testing.assert_allclose([found.low, found.high], np.percentile(least, [2.5, 97.5]), rtol=1e-9)
    below = rng.uniform(1, 2, (3, 200))
    found = boot.least(values, clusters, below)
    least = []
    for weights in (np.ones(len(names)), *boot._weights(len(names))):
        w = weights[index]
        least.append(
            min(np.nansum(w * v) / (w * b)[np.isfinite(v)].sum() for v, b in zip(values, below, strict=True))
        )
    bounds = [found.value, found.low, found.high]
    np.testing.assert_allclose(bounds, [least[0], *np.percentile(least[1:], [2.5, 97.5])], rtol=1e-9)


def columns(explained: np.ndarray, control: np.ndarray, sequences: int) -> dict[str, np.ndarray]:
    n = len(explained)
    row = np.tile(np.arange(n), 2)
    kinds = np.repeat(["explained", "last_1"], n)
    fve = np.concatenate([explained, control])
    fixed = {name: np.zeros(2 * n) for name in ("cos", "cos_shuffled", "retrieval_rank", "n_tokens")}
    return {"row": row, "sequence": row % sequences, "control": kinds, "fve_nrm": fve, **fixed}


def test_bad_controls_add_nothing_and_few_sequences_claim_nothing(rng: np.random.Generator) -> None:
    own = rng.uniform(0.4, 0.6, 60)
    added = Added.of(columns(own, np.full(60, -3.0), 12), 0)
    assert added.best == MEAN and added.over_text.value == pytest.approx(own.mean())
    assert any("cannot read the controls" in text for text in added.says())
    few = Added.of(columns(own, own - 0.1, 3), 0)
    assert not few.over_text.bounded and "cannot be told" in few.says()[0]
    worse = Added.of(columns(own, own + 0.1, 12), 0)
    assert worse.over_text.value == pytest.approx(-0.1) and "carry less than last_1" in worse.says()[0]


def test_the_page_begins_with_what_is_added(root: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "c.parquet", tmp_path / "p.html"
    assert call(*controls(root, out)).code == 0
    shown = ["report", root / "run.zarr", "--explained", root / "explained.parquet", "--out", page]
    assert call(*shown, "--also", out).code == 0
    html = page.read_text()
    assert html.index("<dt>added</dt>") < html.index("<dt>FVE</dt>") and "other_place" in html
    other = call(*shown, "--overwrite", "--also", root / "explained.parquet")
    check_refused(other, "two of its tables are of roundtrip or score")
    patched = tmp_path / "patched.parquet"
    assert call(*patch(root, patched, out)).code == 0
    assert call(*shown, "--overwrite", "--also", patched, "--also", out).code == 0
    assert page.read_text().count("<th>explanations over it</th>") == 2
    taken = ["report", root / "run.zarr", "--explained", out, "--out", tmp_path / "x.html"]
    check_refused(call(*taken), "give it with --also")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last_k": "0"}, "--last-k must be numbers of tokens from 1"),
        ({"last_k": "all"}, "--last-k must be numbers of tokens from 1"),
        ({"where": "position > 99999"}, "has no row for --where"),
        ({"reader": "nowhere"}, "nowhere"),
        ({"out": "c.csv"}, "the table is Parquet"),
    ],
    ids=["zero", "all", "no rows", "no reader", "ending"],
)
def test_refused_in_one_line(changes: dict, message: str, root: Path, tmp_path: Path) -> None:
    changes = {**changes, "out": tmp_path / changes.get("out", "c.parquet")}
    check_refused(call(*controls(root, **changes)), message)
    assert not list(tmp_path.iterdir())


def test_resumed_it_is_the_same(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.parquet"
    assert call(*controls(root, out)).code == 0
    before = out.read_bytes()
    check_refused(call(*controls(root, out)), "exists")
    assert call(*controls(root, out), "--resume").code == 0 and out.read_bytes() == before
    check_refused(call(*controls(root, out, last_k="3"), "--resume"), "other options")
    assert call(*controls(root, out, last_k="3"), "--overwrite").code == 0
    assert "last_3" in pq.read_table(out)["control"].to_pylist()
    check_refused(call(*controls(root, tmp_path / "d.parquet", out)), "has a field control")
