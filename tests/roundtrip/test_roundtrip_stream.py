"""Streaming of the second stage: shared prompts of samples, models in turns, stores that grow, kills at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import D, save_ar, save_av

from nla_engine.codec.rows import Codec
from nla_engine.config import RoundtripOptions
from nla_engine.errors import EngineError, RequestError, StoreError, WhereError
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip import job, pipeline, results, rows
from nla_engine.roundtrip.background import Background
from nla_engine.roundtrip.draws import of_sample
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore, Finish, LayerRows, SequenceRows, StoreWriter, row_flags

LAYER = 2
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
CODEC = Codec.named("bf16", D)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    save_av(root / "av", LAYER)
    save_ar(root / "ar", LAYER)
    return root


def open_writer(path: Path) -> StoreWriter:
    return StoreWriter.create(
        path,
        layers=[LAYER],
        codec=CODEC,
        sink_norm={LAYER: float("inf")},
        vocabulary=[bytes([i]) for i in range(256)],
        provenance={},
        options={},
    )


def sequence(seed: int, size: int = 5) -> SequenceRows:
    """A sequence of random rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, size).astype(np.int32)
    position = np.arange(size, dtype=np.int32)
    vectors = rng.standard_normal((size, D)).astype(np.float32)
    return SequenceRows(
        token_id=ids,
        next_token_id=np.append(ids[1:], np.int32(-1)),
        position=position,
        flags=row_flags(position, size, size),
        layers={LAYER: LayerRows.encode(CODEC, vectors, float("inf"))},
        tokens=ids,
        prompt_size=size,
        finish=Finish.GIVEN,
        source=b"{}",
    )


def make_store(path: Path, sequences: int, first: int = 0) -> Path:
    with open_writer(path) as writer:
        for number in range(first, first + sequences):
            writer.append(sequence(number))
    return path


def options(pair: Path, store: Path, out: Path, **changes: object) -> RoundtripOptions:
    base = {"store": store, "av": str(pair / "av"), "ar": str(pair / "ar"), "out": out, "device": "cpu"}
    return RoundtripOptions(**{**base, "max_new_tokens": 12, "batch_size": 7, **changes})  # type: ignore[arg-type]


def table(path: Path, but: tuple[str, ...] = ()) -> list[dict[str, object]]:
    return pq.read_table(path).drop_columns(list(but)).to_pylist()


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_samples_that_share_a_prompt_are_those_that_do_not(pair: Path, batch: int) -> None:
    verbalizer = Verbalizer.load(str(pair / "av"), **CPU)
    vectors = np.random.default_rng(1).standard_normal((5, D)).astype(np.float32)
    sampling = Sampling(temperature=1.0, seed=3)
    shared = verbalizer.explain(
        enumerate(vectors), samples=3, max_new_tokens=10, sampling=sampling, batch_size=batch
    )
    alone = verbalizer.explain(
        ((row * 3 + sample, vectors[row]) for row in range(5) for sample in range(3)),
        max_new_tokens=10,
        sampling=sampling,
        batch_size=15,
        draws=lambda id_: of_sample(id_ // 3, id_ % 3),
    )
    together = list(shared)
    assert together == list(alone)
    assert len({e.text for e in together}) > 5


def test_a_prompt_is_read_once_for_its_samples(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nla_engine.engine.runner import Runner

    read: list[int] = []
    real = Runner.prefill
    monkeypatch.setattr(
        Runner,
        "prefill",
        lambda self, parts, *rest: (read.append(sum(len(p[2]) for p in parts)), real(self, parts, *rest))[1],
    )
    verbalizer = Verbalizer.load(str(pair / "av"), **CPU)
    vectors = list(enumerate(np.ones((2, D), np.float32)))
    for samples in (1, 4):
        read.clear()
        list(
            verbalizer.explain(
                iter(vectors),
                samples=samples,
                max_new_tokens=4,
                sampling=Sampling(temperature=1.0),
                batch_size=8,
            )
        )
        assert read[-1] == 2 * len(verbalizer.prompt.token_ids[verbalizer.prompt.places[0] :])


def test_the_shared_part_of_reconstructor_prompts_changes_nothing(pair: Path) -> None:
    reconstructor = Reconstructor.load(str(pair / "ar"), **CPU)
    texts = ["a", "", "some longer words", "x" * 40]
    shared = reconstructor.reconstruct(texts)
    assert len(reconstructor._prefix) > 3
    # a text that a tokenizer merges with the template does not begin with the shared tokens
    whole = reconstructor._prefix
    reconstructor.close()
    reconstructor._prefix = (*whole[:-1], whole[-1] + 1)
    odd = reconstructor.reconstruct(texts)
    reconstructor.close()
    reconstructor._prefix = ()
    plain = reconstructor.reconstruct(texts)
    assert torch.allclose(shared, plain, atol=1e-5) and torch.allclose(odd, plain, atol=1e-5)


def test_a_slot_that_was_overwritten_is_mended(pair: Path) -> None:
    from nla_engine.roundtrip import reconstruct as module

    reconstructor = Reconstructor.load(str(pair / "ar"), **CPU)
    expected = reconstructor.reconstruct(["one", "two", "three"])
    prompts = module.reconstructor_prompts(
        reconstructor.sidecar, reconstructor.lm.tokenizer, ["one", "two", "three"]
    )
    odd = [[*prompts[0][:2], prompts[0][2] + 1, *prompts[0][3:]]]
    reconstructor._last_states(odd)  # reads slot 0 from its first token on
    assert torch.allclose(reconstructor.reconstruct(["one", "two", "three"]), expected, atol=1e-6)


def test_in_turns_equals_together(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s.zarr", 5)
    monkeypatch.setattr(pipeline, "TURN", 8)
    monkeypatch.setattr(pipeline, "CHUNK", 3)
    sampled = {"samples": 2, "temperature": 0.8}
    one = run_roundtrip(options(pair, store, tmp_path / "both.parquet", residency="both", **sampled))
    other = run_roundtrip(options(pair, store, tmp_path / "turns.parquet", residency="turns", **sampled))
    assert table(tmp_path / "both.parquet") == table(tmp_path / "turns.parquet")
    assert one.fve_nrm == other.fve_nrm and one.explanations == 50


def test_following_a_writer_gives_every_row_once(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is made only once the run waits for it."""
    monkeypatch.setattr(rows, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(job, "CONTROL_ROWS", 6)
    asked, read = threading.Event(), threading.Event()

    def write() -> None:
        asked.wait(200)
        with open_writer(tmp_path / "s.zarr") as writer:
            for number in range(8):
                writer.append(sequence(number))
                writer.commit()
                if number == 2:
                    read.wait(200)
                time.sleep(chance.uniform(0, 0.1))

    def announce(line: str) -> None:
        said.append(line)
        if line.startswith("waiting for") and "start its capture" in line:
            asked.set()
        if "rows of layer" in line:
            read.set()

    said: list[str] = []
    chance = random.Random(os.environ.get("NLA_TEST_SEED"))
    thread = threading.Thread(target=write)
    thread.start()
    given = options(
        pair, tmp_path / "s.zarr", tmp_path / "followed.parquet", follow=True, where="position > 0"
    )
    summary = run_roundtrip(given, announce=announce)
    thread.join()
    run_roundtrip(options(pair, tmp_path / "s.zarr", tmp_path / "after.parquet", where="position > 0"))
    controls = ("cos_shuffled", "retrieval_rank")  # a run that follows samples the first rows
    followed, after = (table(tmp_path / f"{name}.parquet", controls) for name in ("followed", "after"))
    assert followed == after and len(after) == summary.rows == 32
    again = options(pair, tmp_path / "s.zarr", tmp_path / "again.parquet", follow=True, where="position > 0")
    run_roundtrip(again)
    assert table(tmp_path / "again.parquet") == table(tmp_path / "followed.parquet")
    assert len({line for line in said if "rows of layer" in line}) > 1


def test_slow_explanations_are_committed_before_a_chunk_is_full(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, parts = make_store(tmp_path / "s.zarr", 2), []
    real = results.ResultTable.append
    monkeypatch.setattr(
        results.ResultTable,
        "append",
        lambda self, columns: (parts.append(len(columns["row"])), real(self, columns)),
    )
    run_roundtrip(options(pair, store, tmp_path / "whole.parquet", samples=2, temperature=0.7))
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    run_roundtrip(options(pair, store, tmp_path / "parts.parquet", samples=2, temperature=0.7))
    assert parts == [20] + [2] * 10, "the samples of a row stay together"
    sums = ("cos", "mse_nrm", "fve_nrm", "fve_meannorm", "cos_shuffled", "best", "retrieval_rank")
    parted, whole = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("parts", "whole"))
    assert parted.drop_columns(list(sums)).equals(whole.drop_columns(list(sums)))
    np.testing.assert_allclose(parted["cos"].to_numpy(), whole["cos"].to_numpy(), atol=1e-5)


def test_a_writer_that_has_gone_is_told(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "POLL_SECONDS", 0.02)
    writer = open_writer(tmp_path / "s.zarr")
    writer.append(sequence(0))
    writer.close(complete=False)
    given = {"follow": True}
    with pytest.raises(EngineError, match="the writer ended without finishing"):
        run_roundtrip(options(pair, tmp_path / "s.zarr", tmp_path / "x.parquet", **given))
    with StoreWriter.resume(tmp_path / "s.zarr", options={}) as writer:
        writer.append(sequence(1))
    summary = run_roundtrip(options(pair, tmp_path / "s.zarr", tmp_path / "x.parquet", resume=True, **given))
    assert summary.rows == 10
    with pytest.raises(RequestError, match="--limit spreads over all rows"):
        options(pair, tmp_path / "s.zarr", tmp_path / "y.parquet", follow=True, limit=3)


def test_an_error_behind_stops_the_run(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s.zarr", 6)
    monkeypatch.setattr(pipeline, "CHUNK", 3)

    def broken(self: Reconstructor, explanations: object) -> torch.Tensor:
        raise ZeroDivisionError("the AR failed")

    monkeypatch.setattr(Reconstructor, "reconstruct_layers", broken)
    with pytest.raises(ZeroDivisionError, match="the AR failed"):
        run_roundtrip(options(pair, store, tmp_path / "x.parquet"))
    assert not (tmp_path / "x.parquet").exists()


def test_what_runs_behind_tells_its_error() -> None:
    def work() -> None:
        with Background() as background:
            background.submit(lambda: time.sleep(0.1))
            background.submit(lambda: {}["second"])
            background.submit(lambda: ran_after.append(1))

    ran_after: list[int] = []
    with pytest.raises(KeyError, match="second"):
        work()
    assert not ran_after


#: Waits for a letter on stdin before each part that it commits.
_RUN = """
import sys
from pathlib import Path
from nla_engine.config import RoundtripOptions
from nla_engine.roundtrip import pipeline
from nla_engine.roundtrip.results import ResultTable
from nla_engine.roundtrip.run import run_roundtrip
append = ResultTable.append
def permitted(*given):
    sys.stdin.read(1)
    append(*given)
ResultTable.append, pipeline.CHUNK = permitted, 4
root, store, out = map(Path, sys.argv[1:4])
print("ready", flush=True)
run_roundtrip(RoundtripOptions(store=store, av=str(root / "av"), ar=str(root / "ar"), out=out, device="cpu",
    max_new_tokens=12, batch_size=7, samples=2, temperature=0.7, resume=True))
"""


def test_killed_at_random_moments_and_resumed(pair: Path, tmp_path: Path) -> None:
    """Of six parts the first process may commit five, so it is killed before it is through."""
    store = make_store(tmp_path / "s.zarr", 12)
    whole, out = tmp_path / "whole.parquet", tmp_path / "x.parquet"
    sampled = {"samples": 2, "temperature": 0.7}
    run_roundtrip(options(pair, store, whole, **sampled))
    chance, parts = random.Random(os.environ.get("NLA_TEST_SEED")), tmp_path / "x.parquet.parts"
    for number in range(3):
        there, more = len(list(parts.glob("part-*.parquet"))), chance.randint(0, 4)
        command = [sys.executable, "-c", _RUN, *map(str, (pair, store, out))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("." * (more + 1))
            process.stdin.flush()
            deadline = time.monotonic() + 200
            while len(list(parts.glob("part-*.parquet"))) < there + more and time.monotonic() < deadline:
                if process.poll() is not None:
                    break
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        if process.returncode == 0:
            assert number > 0, "it cannot be through before the first kill"
            break
        assert process.returncode == -signal.SIGKILL and not out.exists()
    if not out.exists():
        run_roundtrip(options(pair, store, out, resume=True, **sampled))
    assert table(out) == table(whole)
    assert CaptureStore.open(store).rows * 2 == len(table(out))


def test_following_until_nothing_was_selected(pair: Path, tmp_path: Path) -> None:
    store, out = make_store(tmp_path / "s.zarr", 1), tmp_path / "x.parquet"
    with pytest.raises(StoreError, match="no row for --where"):
        run_roundtrip(options(pair, store, out, follow=True, where="position > 99"))
    assert not out.exists()


def test_following_waits_for_a_record_that_later_prompts_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "POLL_SECONDS", 0.01)
    writer = open_writer(tmp_path / "s.zarr")
    writer.append(sequence(0))
    writer.commit()
    store = CaptureStore.open(tmp_path / "s.zarr")
    waited = threading.Event()
    found: list[int] = []

    def follow() -> None:
        for part in rows.follow_rows(store, "record.tag == 'late'", lambda _: waited.set()):
            found.extend(part.tolist())

    thread = threading.Thread(target=follow)
    thread.start()
    assert waited.wait(200)
    writer.append(replace(sequence(1), source=b'{"tag": "late"}'))
    writer.close()
    thread.join(200)
    assert found == [5, 6, 7, 8, 9]
    with pytest.raises(WhereError, match="no prompt record has 'other'"):
        list(rows.follow_rows(store, "record.other == 1"))


def test_parts_without_a_record_belong_to_nobody(pair: Path, tmp_path: Path) -> None:
    """A kill between the last two steps of `finish` leaves them, once the finished table has been moved away."""
    store, out = make_store(tmp_path / "s.zarr", 2), tmp_path / "x.parquet"
    parts = tmp_path / "x.parquet.parts"
    parts.mkdir()
    (parts / "part-000000.parquet").write_bytes(b"of another run")
    run_roundtrip(options(pair, store, out, resume=True))
    assert len(table(out)) == 10


def test_a_table_cannot_be_on_an_object_store(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has to be on a local disk"):
        options(pair, tmp_path / "s.zarr", Path("s3://bucket/x.parquet"))
