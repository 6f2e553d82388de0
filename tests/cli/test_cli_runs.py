"""What commands do when the request is right: output, exit codes, and what they leave when the work fails."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import LAYER, Ran, call, capture, check_refused, contents, roundtrip, shell, written
from tiny import write_prompts

from nla_engine.capture import appender
from nla_engine.capture import run as capture_stage
from nla_engine.capture.summary import CaptureSummary
from nla_engine.config import (
    CaptureOptions,
    ClaimsOptions,
    ClausesOptions,
    ExplainOptions,
    PatchOptions,
    RoundtripOptions,
    ScoreOptions,
)
from nla_engine.roundtrip import results
from nla_engine.roundtrip.summary import RoundtripSummary
from nla_engine.store import CaptureStore, shards, writer

#: Keys of the summary of a round trip of several layers, of prefixes, or in several processes.
OF_SOME_RUNS = {
    "further_layers",
    "fve_by_sentences",
    "fve_by_sentences_shuffled",
    "workers",
    "workers_lost",
    "parts_again",
    "workers_waited",
}


def keys(summary: type) -> set[str]:
    return {field.name for field in dataclasses.fields(summary)}


def test_json_is_the_last_line_and_has_its_keys(root: Path, tmp_path: Path) -> None:
    ran = call(*capture(root, tmp_path / "x.zarr"), "--json")
    assert ran.code == 0 and set(ran.json) == keys(CaptureSummary)
    assert {"rows", "sequences", "rows_per_second", "codec_error"} <= set(ran.json)
    assert (ran.json["sequences"], ran.json["rows"]) == (5, CaptureStore.open(tmp_path / "x.zarr").rows)
    ran = call(*roundtrip(root, tmp_path / "x.parquet", store=tmp_path / "x.zarr"), "--json")
    assert ran.code == 0 and set(ran.json) == keys(RoundtripSummary) - OF_SOME_RUNS
    named = ["cos", "cos_shuffled", "mse_nrm", "fve_nrm", "retrieval_top1", "status_ok", "rows_per_second"]
    assert set(named) <= set(ran.json)
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == ran.json["rows"]
    ran = call("info", tmp_path / "x.zarr", "--json")
    assert ran.code == 0 and (ran.json["layers"], ran.json["complete"]) == ([LAYER], True)
    ran = call("verify", tmp_path / "x.zarr", "--json")
    assert ran.code == 0 and ran.json["ok"] is True and len(ran.json["checks"]) > 5
    out = tmp_path / "x.npy"
    ran = call("export", tmp_path / "x.zarr", "--to", "npy", "--out", out, "--where", "generated", "--json")
    assert ran.code == 0 and ran.json == {
        "out": str(out),
        "to": "npy",
        "layer": LAYER,
        "rows": len(np.load(out)),
    }


def test_results_for_people_are_on_stdout_unless_json_is(root: Path, tmp_path: Path) -> None:
    ran = call(*capture(root, tmp_path / "x.zarr"))
    assert ran.code == 0 and "rows_per_second" in ran.out
    assert "5 sequences: at most 20 rows" in ran.err and "rows_per_second" not in ran.err
    for command, told in {"info": "complete", "verify": "run.zarr: sound: "}.items():
        ran = call(command, root / "run.zarr")
        assert (ran.code, ran.err) == (0, "") and told in ran.out
        ran = call(command, root / "run.zarr", "--json")
        assert ran.code == 0 and told in ran.err and ran.json and len(ran.out.splitlines()) == 1
    assert "; nothing to repair" in call("verify", root / "run.zarr", "--repair").out


@pytest.mark.parametrize("words", [[], ["study"]])
def test_a_bare_command_shows_its_help(words: list[str]) -> None:
    ran = call(*words)
    assert ran.code == 2 and ran.err.startswith("Usage: nla-engine") and "\n\nCommands:\n" in ran.err
    assert call(*words, "-h").out.strip() == call(*words, "--help").out.strip() == ran.err.strip()


def test_resume_of_finished_work_and_overwrite(root: Path, tmp_path: Path) -> None:
    store, result = tmp_path / "x.zarr", tmp_path / "x.parquet"
    for again in ([], ["--resume"], ["--overwrite"]):
        assert call(*capture(root, store), *again).code == 0
        assert call(*roundtrip(root, result, store=store), *again).code == 0
    assert not list(tmp_path.glob(".*")) and sorted(p.name for p in tmp_path.iterdir()) == [
        "x.parquet",
        "x.zarr",
    ]


COMMANDS = {
    "capture": CaptureOptions,
    "roundtrip": RoundtripOptions,
    "explain": ExplainOptions,
    "score": ScoreOptions,
    "patch": PatchOptions,
    "clauses": ClausesOptions,
    "claims": ClaimsOptions,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = call(command, "--help").out
    for field in dataclasses.fields(COMMANDS[command]):
        name = field.name.upper() if field.metadata["argument"] else "--" + field.name.replace("_", "-")
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", text), name
        assert " ".join(field.metadata["help"].split()[:4]) in " ".join(text.split()), field.name
    assert "--json" in text


def test_help_and_version_in_a_process_of_their_own() -> None:
    ran = shell("--help")
    assert ran.code == 0
    commands = ran.out.split("Commands:\n")[1]
    listed = re.findall(r"^  ([a-z]+)  ", commands, re.MULTILINE)
    assert listed[:6] == ["demo", "capture", "roundtrip", "explain", "score", "report"]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme.split("\n## Commands\n")[1].split("\n## ")[0]
    assert sorted(listed) == sorted(re.findall(r"^\| `([a-z]+)", table, re.MULTILINE))
    assert "..." not in commands  # every command is described by a whole sentence
    ran = shell("--version")
    assert ran.code == 0 and re.match(r"nla_engine \d+\.\d+\.\d+\n", ran.out)
    ran = shell("info", "/nowhere")
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith("error: /nowhere: ")


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    ran = call("--debug", "info", tmp_path / "none")
    assert ran.code == 2 and "Traceback (most recent call last)" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: ")
    behind = call("info", tmp_path / "none", "--debug")
    assert behind.code == 2 and "Traceback (most recent call last)" in behind.err
    check_refused(call("info", tmp_path / "none", "--no-such", "--debug"), "No such option: --no-such")


def test_an_error_that_nobody_foresaw_is_one_line_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_stage, "plan_capture", lambda *_: 1 / 0)
    ran = call(*capture(root, tmp_path / "x.zarr"))
    assert (ran.code, ran.err) == (1, "error: ZeroDivisionError: division by zero (--debug shows where)\n")


def test_verify_of_a_damaged_store(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    shutil.copytree(root / "run.zarr", store)
    shard = store / f"layer_{LAYER}" / "codes" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    ran = call("verify", store, "--json")
    assert ran.code == 1 and ran.json["ok"] is False
    assert f"layer_{LAYER}/codes data" in {check["name"] for check in ran.json["checks"] if not check["ok"]}
    assert "FAILED" in ran.err and re.search(r"x.zarr: \d+ of \d+ checks failed", ran.err)
    command = ["export", store, "--to", "npy", "--out", tmp_path / "x.npy"]
    check_refused(call(*command), "inner chunk 0 fails its checksum", code=1)
    (store / "zarr.json").write_text("{")
    check_refused(call("verify", store), "zarr.json: damaged: broken JSON", code=1)


# ---- work that fails ----


def check_failed(ran: Ran, message: str) -> None:
    """Exit code 1; the plan may have been announced, the error is one line and the last one."""
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.code == 1 and errors == ran.err.splitlines()[-1:], ran.err
    assert re.search(message, errors[0]), errors[0]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finish_and_compare(root: Path, store: Path) -> None:
    """Resume the capture; the store must then hold what an uninterrupted one holds."""
    assert call(*capture(root, store), "--resume").code == 0
    assert call("verify", store).code == 0
    whole, resumed = CaptureStore.open(root / "run.zarr"), CaptureStore.open(store)
    assert resumed.complete and resumed.column("token_id").tolist() == whole.column("token_id").tolist()


def test_capture_with_a_full_disk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(root)
    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "write", full)
        check_failed(call(*capture(root, tmp_path / "x.zarr")), "x.zarr.*No space left on device")
    assert not (tmp_path / "x.zarr").exists()
    with monkeypatch.context() as patch:
        patch.setattr(writer.StoreWriter, "create", create_then(patch, writer.StoreWriter.create))
        check_failed(
            call(*capture(root, tmp_path / "x.zarr")),
            "No space left on device; 0 sequences with 0 rows are committed and safe: .*--resume",
        )
    finish_and_compare(root, tmp_path / "x.zarr")
    assert contents(root) == before


def create_then(patch: pytest.MonkeyPatch, create):
    """`create`, after which the disk is full."""

    def made(*arguments, **options):
        found = create(*arguments, **options)
        patch.setattr(shards.os, "write", full)
        return found

    return made


def test_roundtrip_with_a_full_disk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, before = tmp_path / "x.parquet", contents(root)
    monkeypatch.setattr("nla_engine.roundtrip.pipeline.CHUNK", 6)
    real, calls = pq.write_table, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(results.pq, "write_table", lambda *a: full() if next(calls) == 2 else real(*a))
        check_failed(call(*roundtrip(root, out)), "part-000002.parquet: cannot be written: No space left")
    assert not out.exists() and len(list(Path(f"{out}.parts").glob("*.parquet"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        check_failed(call(*roundtrip(root, out), "--resume"), "cannot be written: No space left")
    assert call(*roundtrip(root, out), "--resume").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.parquet"]
    columns = ["row", "explanation", "cos", "retrieval_rank"]
    resumed, whole = (pq.read_table(p, columns=columns) for p in (out, root / "explained.parquet"))
    assert resumed.drop("cos").equals(whole.drop("cos"))
    assert np.allclose(resumed["cos"].to_numpy(), whole["cos"].to_numpy(), atol=1e-6)
    assert contents(root) == before


def test_overwriting_keeps_the_old_result_until_the_new_one_is_whole(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.parquet"
    shutil.copy(root / "explained.parquet", out)
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(results.pq, "write_table", full)
        check_failed(call(*roundtrip(root, out), "--overwrite", "--limit", 3), "No space left")
    assert contents(out) == before
    ran = call(*roundtrip(root, out), "--resume", "--limit", 3, "--json")
    assert ran.code == 0 and ran.json["rows"] == 3 and contents(out) != before


def test_a_real_limit_on_file_size(root: Path, tmp_path: Path) -> None:
    """The system refuses the bytes: enough is allowed for an empty store, not for its rows."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY)); "
        "from nla_engine.cli import main; main()"
    )
    record = json.dumps({"prompt": "say", "note": "x" * 300_000})
    prompts = written(tmp_path / "long.jsonl", f"{record}\n" * 3)
    command = capture(root, tmp_path / "x.zarr", prompts=prompts)
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    check_failed(
        Ran(done.returncode, done.stdout, done.stderr), "cannot be written: File too large; .*--resume"
    )
    assert call(*command, "--resume").code == 0
    assert call("verify", tmp_path / "x.zarr").code == 0
    assert CaptureStore.open(tmp_path / "x.zarr").sequences == 3


def test_an_interrupt_leaves_a_store_that_resumes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = appender.sequence_rows

    def interrupted(prompt, completion, *rest):
        if completion.request.id == 3:
            raise KeyboardInterrupt
        return real(prompt, completion, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(appender, "sequence_rows", interrupted)
        check_failed(
            call(*capture(root, tmp_path / "x.zarr")),
            r"interrupted; 3 sequences are committed in .*x\.zarr: --resume continues",
        )
    store = CaptureStore.open(tmp_path / "x.zarr")
    assert (store.sequences, store.complete) == (3, False)
    finish_and_compare(root, tmp_path / "x.zarr")


def test_an_interrupt_before_anything_is_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nla_engine.capture.run.load_inputs", interrupted)
    monkeypatch.setattr("nla_engine.roundtrip.job.load_pair", interrupted)
    for command in (capture(root, tmp_path / "x.zarr"), roundtrip(root, tmp_path / "x.parquet")):
        check_failed(call(*command), "interrupted; nothing is committed yet: start it again")
    monkeypatch.setattr("nla_engine.capture.estimate.load_inputs", interrupted)
    ran = call(*capture(root, tmp_path / "x.zarr"), "--dry-run")
    assert ran.code == 1 and "committed" not in ran.err


#: The program, which says when the first sequence is in the store, and stands still before the hundredth.
_SLOW = """
import sys, time
from nla_engine.capture import appender
from nla_engine.cli import main
rows, append = appender.sequence_rows, appender.Appender._append
def slow(prompt, completion, *rest):
    if completion.request.id >= 100:
        time.sleep(600)
    return rows(prompt, completion, *rest)
def said(*given):
    append(*given)
    print("there", file=sys.stderr, flush=True)
appender.sequence_rows, appender.Appender._append = slow, said
main()
"""


def test_control_c_in_a_process_of_its_own(root: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "many.jsonl", 300)
    command = capture(root, tmp_path / "x.zarr", prompts=prompts, max_new_tokens=5, batch_size=4)
    arguments = [sys.executable, "-c", _SLOW, *map(str, command)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line == "there\n" for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    err = err.replace("there\n", "")
    check_failed(Ran(process.returncode, out, err), "interrupted; .* --resume continues")
    assert 0 < CaptureStore.open(tmp_path / "x.zarr").sequences < 300
    assert call("verify", tmp_path / "x.zarr").code == 0
