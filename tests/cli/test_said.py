"""What commands say: what a store holds, what failed, JSON and nothing else, names that tell another format."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import LAYER, call, capture, check_refused, contents, explain, json_lines, roundtrip, score
from tiny import save_ar, save_av, write_prompts

from nla_engine.store import CaptureStore


@pytest.fixture(scope="module")
def both(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of prompt and generated rows; only the third of four records has a nested field."""
    directory = tmp_path_factory.mktemp("both")
    records = [{"prompt": f"{n} and {n + 1}", "topic": "sums"} for n in range(4)]
    records[2]["deep"] = {"inner": 1}
    prompts = json_lines(directory / "p.jsonl", records)
    ran = call(*capture(root, directory / "run.zarr", prompts=prompts, positions="all", max_new_tokens=3))
    assert ran.code == 0, ran.err
    return directory / "run.zarr"


def test_info_says_which_layer_which_rows_and_which_fields(both: Path) -> None:
    ran = call("info", both, "--json")
    page = " ".join(ran.err.split())
    group = zarr.open_group(both, mode="r")
    flags, finish = np.asarray(group["rows/flags"]), np.asarray(group["sequences/finish"])
    generated = int((flags & 1).sum())
    assert 0 < generated < len(flags)
    assert ran.json["prompt_rows"] == len(flags) - generated and ran.json["generated_rows"] == generated
    assert f"prompt rows {len(flags) - generated} generated rows {generated} " in page
    assert f"vectors layer {LAYER} " in page
    names = {0: "eos", 1: "length"}
    assert ran.json["finish"] == {names[code]: count for code, count in Counter(finish.tolist()).items()}
    meanings = {0: "the model wrote its end token", 1: "the limit of new tokens was reached"}
    for code, count in Counter(finish.tolist()).items():
        assert f"{count}: {meanings[code]}" in page
    assert ran.json["record_fields"] == {"prompt": 4, "topic": 4, "deep.inner": 1}
    assert "record fields prompt, topic, deep.inner (1 of 4) " in page
    assert len(CaptureStore.open(both).where("record.deep.inner == 1")), "the name is the one --where knows"


def test_info_says_how_many_records_it_read(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nla_engine.cli.page.RECORDS_READ", 2)
    page = " ".join(call("info", both).out.split())
    assert "record fields prompt, topic (in the first 2 records) " in page


def test_info_describes_a_damaged_store_too(both: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.zarr"
    shutil.copytree(both, broken)
    for part in (broken / "rows" / "flags").rglob("*"):
        if part.is_file() and part.name != "zarr.json":
            part.write_bytes(b"\x00" * part.stat().st_size)
    ran = call("info", broken, "--json")
    assert ran.code == 0 and "flags" in ran.json["cannot_be_counted"] and "prompt_rows" not in ran.json
    assert "cannot be counted" in ran.err and ran.json["rows"] == CaptureStore.open(both).rows


def test_verify_ends_with_what_failed(both: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.zarr"
    shutil.copytree(both, broken)
    for name in ("position", "token_id"):
        part = next(p for p in (broken / "rows" / name).rglob("*") if p.is_file() and p.name != "zarr.json")
        part.write_bytes(part.read_bytes()[:-3])
    ran = call("verify", broken)
    lines = [line.rstrip() for line in ran.out.splitlines()]
    failed = call("verify", broken, "--json").json["checks"]
    failed = [check for check in failed if not check["ok"]]
    assert ran.code == 1 and len(failed) >= 2
    assert lines[-len(failed) :] == [f"FAILED {check['name']}: {check['detail']}" for check in failed]
    assert "checks failed" in lines[-len(failed) - 1]
    assert len(lines) > 30  # all are listed where one failed


def test_verify_of_a_sound_store_is_short(both: Path) -> None:
    lines = call("verify", both).out.splitlines()
    assert "FAILED" not in lines and lines[-1].endswith(" checks") and "[]" not in "".join(lines)
    assert [line.split()[0] for line in lines[1:4]] == ["manifest", "rows", "layer_2"]
    assert len(lines) < 12 and any("arrays, every checksum matches" in line for line in lines)
    verbose = call("verify", both, "--verbose").out.splitlines()
    checks = call("verify", both, "--json").json["checks"]
    assert len(verbose) == len(checks) + 2 and lines[-1] == verbose[-1]


def test_json_is_all_that_stands_on_stdout(root: Path, both: Path, tmp_path: Path) -> None:
    store, table = root / "run.zarr", root / "explained.parquet"
    ones = json_lines(tmp_path / "t.jsonl", [{"row": row, "text": "words"} for row in range(4)])
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    commands = {
        "capture": capture(root, tmp_path / "x.zarr", prompts=prompts),
        "another capture": capture(root, tmp_path / "z.zarr", prompts=prompts),
        "dry run": capture(root, tmp_path / "y.zarr", prompts=prompts, dry_run=True),
        "roundtrip": roundtrip(root, tmp_path / "r.parquet", limit=3),
        "explain": explain(root, tmp_path / "e.parquet", limit=3),
        "score": score(root, tmp_path / "s.parquet", ones),
        "report": ["report", store, "--explained", table, "--out", tmp_path / "x.html"],
        "info": ["info", both],
        "verify": ["verify", both],
        "export": ["export", store, "--to", "parquet", "--out", tmp_path / "v.parquet"],
        "import": ["import", tmp_path / "v.parquet", "--out", tmp_path / "i.zarr"],
        "merge": ["merge", tmp_path / "x.zarr", tmp_path / "z.zarr", "--out", tmp_path / "m.zarr"],
        "variance": ["variance", tmp_path / "v.parquet"],
    }
    for name, arguments in commands.items():
        ran = call(*arguments, "--json")
        assert ran.code == 0, f"{name}: {ran.err}"
        assert isinstance(json.loads(ran.out), dict) and ran.out.count("\n") == 1, f"{name}: {ran.out[:200]}"


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x", "x.parquet.csv"])
@pytest.mark.parametrize("command", ["roundtrip", "explain", "score", "export", "nla", "datasets"])
def test_parquet_is_written_under_no_other_name(command: str, name: str, root: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    if command == "datasets" and "." not in name:
        pytest.skip("a directory, which needs no ending")
    made = {"roundtrip": roundtrip, "explain": explain}.get(command)
    if made:
        arguments = made(root, out)
    elif command == "score":
        arguments = score(root, out, root / "explained.parquet")
    else:
        to = "parquet" if command == "export" else command
        arguments = ["export", root / "run.zarr", "--to", to, "--out", out]
    before = contents(root)
    ran = call(*arguments)
    check_refused(ran, f"{re.escape(str(out))}: ")
    assert ("directory" if command == "datasets" else ".parquet") in ran.err
    assert contents(root) == before and not list(tmp_path.iterdir())


def test_a_page_is_written_under_no_other_name(root: Path, tmp_path: Path) -> None:
    arguments = ["report", root / "run.zarr", "--explained", root / "explained.parquet", "--out"]
    check_refused(
        call(*arguments, tmp_path / "x.csv"), r"x.csv: ends in .csv, and the page is HTML: .*\.html"
    )
    assert not list(tmp_path.iterdir())


def test_early_rows_are_told_unless_both_models_know_them(root: Path, tmp_path: Path) -> None:
    ran = call(*roundtrip(root, tmp_path / "r.parquet", limit=3))
    assert "early_rows (positions below 50)" in ran.out and "early_rows" in json.dumps(
        call(*roundtrip(root, tmp_path / "j.parquet", limit=3), "--json").json
    )
    for role, save in (("av", save_av), ("ar", save_ar)):
        save(
            tmp_path / role, LAYER, extraction={"injection_scale": 12.0, "mse_scale": 8.0, "min_position": 0}
        )
    known = {"av": tmp_path / "av", "ar": tmp_path / "ar", "limit": 3}
    assert "early_rows (" not in call(*roundtrip(root, tmp_path / "k.parquet", **known)).out


def test_the_report_lists_what_the_page_warns_of(root: Path, tmp_path: Path) -> None:
    ran = call(
        "report", root / "run.zarr", "--explained", root / "explained.parquet", "--out", tmp_path / "x.html"
    )
    said = ran.err.splitlines()
    assert said[0].startswith("It is ")  # what the run shows
    told = said[[line.startswith("the page warns") for line in said].index(True) :]
    assert ran.out.startswith("report: open it in a browser")
    assert re.fullmatch(r"the page warns of \d+ things?:", told[0]) and told[1].startswith("- ")
    assert len([line for line in told if line.startswith("- ")]) == int(told[0].split()[4])


def test_a_table_without_a_text_names_its_columns(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("question,answer\nwhy,x\n")
    check_refused(
        call(*capture(root, tmp_path / "x.zarr", prompts=table)),
        'line 2: no field "prompt" or "messages": the fields are question, answer: .* --text-column',
    )
    ran = call(*capture(root, tmp_path / "x.zarr", prompts=table), "--text-column", "question")
    assert ran.code == 0 and "codec_error (relative L2)" in ran.out
    for name, advice in (
        ("gone.csv", "no such file: check the name"),
        ("gone.doc", "no such file: give .jsonl"),
    ):
        check_refused(call(*capture(root, tmp_path / "y.zarr", prompts=tmp_path / name)), f"{name}: {advice}")
