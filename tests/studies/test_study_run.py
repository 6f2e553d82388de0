"""The multiplication study as a command: a small run on the bundled models, resumed, refused, with planted texts."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Ran, call, check_refused, contents, json_lines

from nla_engine.demo.run import LAYER, TRIO
from nla_engine.roundtrip import score
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.store import CaptureStore
from nla_engine.studies import reread as reread_module
from nla_engine.studies.directory import CLAIMS, CLAUSES, EXPLAINED, PATCHED, REREAD, SAMPLES, STORE
from nla_engine.studies.models import Models
from nla_engine.studies.multiplication.answers import read_replies
from nla_engine.studies.multiplication.naming import MEASURES
from nla_engine.studies.multiplication.outcome import Outcome, Setup, measure
from nla_engine.studies.reread import Explained, plan, run_reread

PROBLEMS = 10
SMALL = (
    "--problems",
    PROBLEMS,
    "--samples",
    2,
    "--sampled-problems",
    2,
    "--ablated-problems",
    3,
    "--device",
    "cpu",
)
SETUP = Setup(Models("m", "v", "r", LAYER, bundled=True), "10-99", "10-99", "held_out", 0, 2, 0.7)


def study(out: Path, *more: object) -> Ran:
    return call("study", "multiplication", "--out", out, *SMALL, *more, "--json")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of a small study, and its JSON line."""
    out = tmp_path_factory.mktemp("study") / "out"
    done = study(out)
    assert done.code == 0, done.err
    return out, done.json


def test_the_numbers_are_those_of_good_models(ran: tuple[Path, dict[str, Any]]) -> None:
    _, summary = ran
    assert summary["problems"] == summary["pairs"] == PROBLEMS and summary["unanswered"] == 0
    assert summary["product_accuracy"][0] >= 0.9 and summary["status_ok"] >= 0.95
    for place, measures in summary["measures"].items():
        own = {name: entry["own"][0] for name, entry in measures.items()}
        assert own["fve"] > 0.5 and own["operands"] >= 0.5 and own["top1_place"] > 0.5, place
        assert measures["fve"]["shuffled"][0] < own["fve"], place
        assert measures["operands"]["shuffled"][0] < 0.1 and measures["other"]["shuffled"][0] > 0.9, place
        for entry in measures.values():
            value, low, high = entry["own"]
            assert low is None or low <= value <= high
    assert set(summary["measures"]) == {"before", "first", "middle", "last", "after", "end"}
    assert "read" not in summary["measures"]["end"] and "coming" not in summary["measures"]["last"]
    assert summary["agreement"]["same_pair"][0] > 0.3
    numbers = summary["clauses"]["1 of 4"]
    assert numbers["fve_lost_swapped"][0] > 0.2 and numbers["kl_added_swapped"][0] > 0.5
    for place, measures in summary["measures"].items():
        assert measures["loss_recovered"]["own"][0] > 0.5 and measures["top1_same"]["own"][0] > 0.5, place
        assert measures["kl"]["own"][0] <= measures["kl"]["shuffled"][0] + 0.05, place
    assert any("cannot be told" in text for text in summary["reading"]), (
        "all products are right: nothing to compare"
    )


def test_everything_is_written(ran: tuple[Path, dict[str, Any]]) -> None:
    out, summary = ran
    written = {
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_file() and STORE not in path.parts
    }
    assert {
        "study.json",
        "problems.jsonl",
        EXPLAINED,
        SAMPLES,
        REREAD,
        PATCHED,
        CLAUSES,
        CLAIMS,
        "multiplication.md",
        "report.html",
    } <= written
    for name in ("scores", "naming", "patch", "clauses", "agreement"):
        assert (out / f"figures/{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert "</svg>" in (out / f"figures/{name}.svg").read_text()
    with (out / "tables/measures.csv").open() as file:
        rows = {(row["place"], row["measure"]): row for row in csv.DictReader(file)}
    for place, measures in summary["measures"].items():
        for name, entry in measures.items():
            assert float(rows[place, name]["own"]) == pytest.approx(entry["own"][0], abs=1e-5)
    text = (out / "multiplication.md").read_text()
    assert all(paragraph in text for paragraph in summary["reading"])
    page = (out / "report.html").read_text()
    assert (
        "cannot be told" in page
        and page.count("data:image/svg+xml") >= 4
        and summary["page"] == str(out / "report.html")
    )


def test_what_was_read_again_is_what_the_reconstructor_gives(ran: tuple[Path, dict[str, Any]]) -> None:
    out, _ = ran
    store = CaptureStore.open(out / STORE)
    table = pq.read_table(out / REREAD).to_pylist()
    first = {entry["row"]: entry["cos"] for entry in pq.read_table(out / EXPLAINED).to_pylist()}
    ar = Reconstructor.load(str(TRIO / "ar"), device=torch.device("cpu"), dtype=torch.float32)
    chosen = table[:: max(len(table) // 40, 1)]
    cos = score.cosine(
        store.layer(LAYER).torch([e["row"] for e in chosen]), ar.reconstruct([e["text"] for e in chosen])
    )
    assert [entry["cos"] for entry in chosen] == pytest.approx(cos.tolist(), abs=1e-4)
    texts = {entry["row"]: entry["text"] for entry in table if entry["variant"] == "whole"}
    for entry in table:
        if entry["variant"] == "whole":
            assert entry["cos"] == pytest.approx(first[entry["row"]], abs=1e-4)
        if entry["variant"] == "another":
            assert entry["text"] == texts[entry["partner"]] and entry["partner"] != entry["row"]
    assert {entry["variant"] for entry in table} == {"whole", "another"}


def test_the_referee_reads_the_same_rows_beside_another_problem_at_the_same_place(
    ran: tuple[Path, dict[str, Any]],
) -> None:
    """KL of the control is that of the partner's explanation, as `patch` alone gives it for that text."""
    out, _ = ran
    other = {
        entry["row"]: entry["text"]
        for entry in pq.read_table(out / REREAD).to_pylist()
        if entry["variant"] == "another"
    }
    table = pq.read_table(out / PATCHED).to_pylist()
    assert {entry["row"] for entry in table} == set(other)
    chosen = table[:: max(len(table) // 12, 1)]
    texts = json_lines(out.parent / "t.jsonl", [{"row": e["row"], "text": other[e["row"]]} for e in chosen])
    patched = out.parent / "other.parquet"
    done = call(
        *("patch", out / STORE, "--model", TRIO / "base", "--ar", TRIO / "ar", "--explained", texts),
        *("--out", patched, "--device", "cpu"),
    )
    assert done.code == 0, done.err
    kl = {entry["row"]: entry["kl"] for entry in pq.read_table(patched).to_pylist()}
    for entry in chosen:
        assert entry["kl_shuffled"] == pytest.approx(kl[entry["row"]], rel=1e-3, abs=1e-5)
    clauses = pq.read_table(out / CLAUSES).to_pylist()
    place = {
        row: spot.place
        for reply in read_replies(CaptureStore.open(out / STORE))
        for row, spot in reply.spots.items()
    }
    for entry in clauses:
        if entry["partner"] is not None:
            assert place[entry["partner"]] == place[entry["row"]] and entry["partner"] != entry["row"]
    assert len({entry["sequence"] for entry in clauses}) == 3 and clauses[0]["kl"] is not None


def results(out: Path) -> dict[str, str]:
    """Checksums of all that the models made, without the store's zarr.json, which says when it was last opened."""
    every = contents(out / STORE) | contents(out / EXPLAINED) | contents(out / SAMPLES)
    return {name: digest for name, digest in every.items() if not name.endswith("run.zarr/zarr.json")}


def test_resuming_a_finished_study_changes_nothing_but_the_time(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(ran[0], out)
    for name in (REREAD, PATCHED, CLAUSES):
        (out / name).unlink()
    shutil.rmtree(out / "figures")
    before = results(out)
    again = study(out, "--resume")
    assert again.code == 0, again.err
    same = {key: value for key, value in ran[1].items() if key not in ("out", "page", "seconds")}
    assert {key: again.json[key] for key in same} == same
    assert results(out) == before
    drawn, drawn_before = (
        {Path(p).name: d for p, d in contents(o / "figures").items()} for o in (out, ran[0])
    )
    assert drawn == drawn_before


def test_overwriting_leaves_nothing_of_the_old_study_and_all_else(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The new one fails at its models. By then the old one's files are gone, but not the user's own file."""
    out = tmp_path / "copy"
    shutil.copytree(ran[0], out)
    (out / "mine.txt").write_text("mine")
    models = ("--model", tmp_path / "none", "--av", "x", "--ar", "x", "--layer", 1)
    assert call("study", "multiplication", "--out", out, *models, "--overwrite").code == 2
    assert {path.name for path in out.iterdir()} == {"study.json", "problems.jsonl", "mine.txt"}


def planted(ran: tuple[Path, dict[str, Any]], path: Path, text_of: Any) -> Outcome:
    """The outcome if every explanation were `text_of(record, place, digits read, digits to come)`."""
    replies = read_replies(CaptureStore.open(ran[0] / STORE))
    spots = {row: (reply.record, spot) for reply in replies for row, spot in reply.spots.items()}
    table = pq.read_table(ran[0] / EXPLAINED)
    texts = [text_of(*spots[row]) for row in table["row"].to_pylist()]
    at = table.schema.get_field_index("explanation")
    pq.write_table(table.set_column(at, "explanation", pa.array(texts)), path)
    return measure(SETUP, replies, path, ran[0] / REREAD)


def test_planted_truth_and_planted_falsehood(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    def text(shift: int) -> Any:
        def of(record: dict[str, Any], spot: Any) -> str:
            a, b = record["a"] + shift, record["b"] + shift
            read, coming = ((int(digits or 0) + shift) % 10 for digits in (spot.read, spot.coming))
            return f'It is {a} times {b}, so {a * b}. Read "{read}"; next comes "{coming}".'

        return of

    for shift, share in ((0, 1.0), (101, 0.0)):
        outcome = planted(ran, tmp_path / f"{shift}.parquet", text(shift))
        for finding in outcome.findings:
            if finding.measure in MEASURES:
                expected = 1 - share if finding.measure == "other" else share
                assert finding.own.value == expected, (shift, finding)
    assert outcome.origins[-1].pair == "other" and outcome.origins[-1].stated_product.value == 1.0
    assert outcome.origins[-1].true_product.value == 0.0


def test_an_interrupted_rereading_goes_on(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CaptureStore.open(ran[0] / STORE)
    replies = read_replies(store)
    entries = [
        Explained(
            row, r.sequence, spot.place, str(r.record["pair"]), f"{r.record['a']} is read.\nIt is {row}."
        )
        for r in replies[:4]
        for row, spot in r.spots.items()
    ]
    readings = plan(entries, 0)
    ar = Reconstructor.load(str(TRIO / "ar"), device=torch.device("cpu"), dtype=torch.float32)
    monkeypatch.setattr(reread_module, "CHUNK", 16)
    common = {"variance": 0.9, "seed": 0, "overwrite": False}

    def stop(done: int, _total: int) -> None:
        if done >= 32:
            raise KeyboardInterrupt

    run_reread(store, LAYER, readings, ar, tmp_path / "whole.parquet", resume=False, **common)
    with pytest.raises(KeyboardInterrupt):
        run_reread(
            store, LAYER, readings, ar, tmp_path / "cut.parquet", resume=False, progress=stop, **common
        )
    assert not (tmp_path / "cut.parquet").exists()
    run_reread(store, LAYER, readings, ar, tmp_path / "cut.parquet", resume=True, **common)
    whole, cut = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "cut"))
    assert whole.drop_columns(["cos", "fve_nrm"]) == cut.drop_columns(["cos", "fve_nrm"]) and len(cut) == len(
        readings
    )
    assert np.allclose(whole["cos"].to_numpy(), cut["cos"].to_numpy(), atol=1e-5)


FAULTS: dict[str, tuple[tuple[object, ...], str]] = {
    "three of four models": (
        ("--model", "x", "--av", "y", "--ar", "z"),
        "--model, --av, --ar and --layer belong together",
    ),
    "large operands": (
        ("--first", "10-200"),
        "--first reaches 200: the bundled models know operands below 100",
    ),
    "no range": (("--second", "ten"), "--second is 'ten': it must be a range"),
    "too many problems": (("--problems", 10**6), "--problems 1000000: .* different problems: ask for fewer"),
    "one problem": (("--problems", 1), "--problems is 1: it must be 2 or more"),
    "one sample": (("--samples", 1), "--samples is 1: it must be 2 or more, or 0"),
    "cold samples": (("--temperature", 0), "--temperature is 0.0: it must be above 0"),
    "unknown phrasing": (("--phrasings", "shout"), "'shout' is unknown; choose from what"),
    "unknown split": (("--split", "half"), "--split is 'half'"),
    "unknown rows": (("--rows", "some"), "--rows is 'some'"),
    "both ways": (("--resume", "--overwrite"), "exclude each other"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_requests_are_refused(fault: str, tmp_path: Path) -> None:
    options, message = FAULTS[fault]
    check_refused(call("study", "multiplication", "--out", tmp_path / "new", *options), message)
    assert not (tmp_path / "new").exists()


def test_directories_in_the_way_are_refused(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    before = contents(ran[0])
    check_refused(study(ran[0]), "exists; pass --resume .* or --overwrite")
    check_refused(study(ran[0], "--resume", "--seed", 1), "seed was 0, is now 1.*--overwrite starts again")
    assert contents(ran[0]) == before
    (tmp_path / "mine.txt").write_text("mine")
    check_refused(study(tmp_path, "--overwrite"), "holds other files and no study")
    check_refused(study(tmp_path / "mine.txt", "--overwrite"), "a file is in the way")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "study.json").write_text("{")
    check_refused(study(broken, "--resume"), "study.json: cannot be read")


def test_a_model_that_states_no_result_is_no_study(root: Path, tmp_path: Path) -> None:
    """A random model: the run fails and says what to look at. Operands of other models may have three digits."""
    models = (
        "--model",
        root / "base",
        "--av",
        root / "av",
        "--ar",
        root / "ar",
        "--layer",
        2,
        "--device",
        "cpu",
    )
    short = ("--problems", 3, "--first", "100-999", "--max-new-tokens", 1)
    done = call("study", "multiplication", "--out", tmp_path / "s", *models, *short)
    assert done.code == 1 and "no reply states a result" in done.err, done.err
    records = [json.loads(line) for line in (tmp_path / "s/problems.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(record["a"] >= 100 for record in records)


def test_models_that_are_named(tmp_path: Path) -> None:
    """The bundled models, given by their directories; without samples and without clauses."""
    names = [
        part for name in ("base", "av", "ar") for part in (f"--{name.replace('base', 'model')}", TRIO / name)
    ]
    done = call(
        "study", "multiplication", "--out", tmp_path / "s", *names, "--layer", LAYER, "--problems", 3, "--samples", 0,
        "--ablated-problems", 0, "--phrasings", "formula", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["agreement"] == {} == done.json["clauses"] and not (tmp_path / "s" / SAMPLES).exists()
    text = " ".join(done.json["reading"])
    assert "positions below 50" in text and "never saw these pairs" not in text and "samples" not in text
