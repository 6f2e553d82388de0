"""A store on S3: a local server, our writer and reader, and zarr on its own."""

from __future__ import annotations

import errno
import json
import logging
import os
import urllib.request
from collections.abc import Coroutine, Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import call, capture, check_refused
from store_samples import create_store, fill_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError, WriteError
from nla_engine.store import CaptureStore, StoreWriter, objects
from nla_engine.store.care.repair import repair
from nla_engine.store.care.verify import verify
from nla_engine.store.objects import LOCK_NAME, ObjectPath
from nla_engine.store.shards import index_bytes

CODEC = Codec.named("int8", 48)
SIZES = [5, 0, 30, 20]
OPTIONS = {"seed": 1, "capture": {"layer": 3}}

pytest.importorskip("obstore", reason="stores on S3 need the extra s3")
pytest.importorskip("moto.server", reason="no S3 server to test with")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server of this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def url(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Where a store may be, in a bucket of its own."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = request.node.name.replace("_", "-").lower()[:60]
    urllib.request.urlopen(urllib.request.Request(f"{server}/{bucket}", method="PUT"))
    return f"s3://{bucket}/deep/run.zarr"


def test_the_same_store_as_on_a_disk(url: str, tmp_path: Path) -> None:
    fill_store(tmp_path / "run.zarr", CODEC, SIZES, shard_rows=16)
    fill_store(url, CODEC, SIZES, shard_rows=16)
    there = ObjectPath.open(url)
    files = {str(f.relative_to(tmp_path / "run.zarr")): f for f in tmp_path.rglob("*") if f.is_file()}
    assert there.names() == sorted(files)  # the lock is gone too
    for name, file in files.items():
        if name != "zarr.json":
            assert (there / name).read_bytes() == file.read_bytes(), name
    store, other = CaptureStore.open(url), CaptureStore.open(tmp_path / "run.zarr")
    np.testing.assert_array_equal(store.layer(3)[:], other.layer(3)[:])
    np.testing.assert_array_equal(store.layer(3)[[40, 2, 2]], other.layer(3)[[40, 2, 2]])
    assert [s.text() for s in store.iter_sequences()] == [s.text() for s in other.iter_sequences()]
    assert all(check.ok for check in verify(url)), [check for check in verify(url) if not check.ok]
    bare = zarr.open_group(there._store, mode="r")
    assert np.array_equal(bare["layer_3/codes"][:], store.layer(3).encoded().codes)


def test_a_place_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ObjectPath, request: Coroutine) -> None:
        request.close()
        raise OSError(errno.EIO, "no credentials", str(self))

    monkeypatch.setattr(ObjectPath, "_run", refuse)
    for ask in (ObjectPath.exists, CaptureStore.open):
        with pytest.raises(
            StoreError, match=r"cannot be reached: no credentials: are AWS_ACCESS_KEY_ID, .* set\?"
        ):
            ask(ObjectPath.open("s3://nowhere/x"))


def test_requests_do_not_grow_with_the_objects(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening, looking again and `info` are one request each; so is asking whether there is anything."""
    from werkzeug.serving import WSGIRequestHandler

    fill_store(url, CODEC, [50] * 6, shard_rows=1)
    there = ObjectPath.open(url)
    objects, size = there.names(), sum((there / name).size() for name in there.names())
    assert 300 < len(objects) < 800
    asked: list[str] = []
    # Called once for every request that the server answers.
    monkeypatch.setattr(WSGIRequestHandler, "log_request", lambda handler, *_: asked.append(handler.path))
    store = CaptureStore.open(url)
    assert (len(asked), asked[0].endswith("/deep/run.zarr/zarr.json")) == (1, True)
    store.refresh()
    assert len(asked) == 2
    asked.clear()
    ran = call("info", url)
    assert f"size {size / 2**20:.3g} MiB" in " ".join(ran.out.split())
    assert len(asked) == 1
    asked.clear()
    assert there.exists() and not (there / "no").exists()
    assert len(asked) == 2


def test_a_small_part_of_an_object_is_read_by_itself(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_store(url, CODEC, SIZES, shard_rows=16)  # scales: 16 inner chunks to a shard
    layer = CaptureStore.open(url).layer(3)
    expected, asked, get = layer[:], [], ObjectPath._get

    def recorded(self: ObjectPath, part: tuple[int, int] | None = None) -> bytes:
        data = get(self, part)
        if "scales" in str(self):
            asked.append((part is None, len(data)))
        return data

    monkeypatch.setattr(ObjectPath, "_get", recorded)
    np.testing.assert_array_equal(layer[3:30], expected[3:30])
    two_chunks = 2 * (16 * CODEC.scale_width * 2 + 4)
    assert asked == [(False, index_bytes(16)), (False, two_chunks)]
    asked.clear()
    np.testing.assert_array_equal(layer[[1, 40]], expected[[1, 40]])
    assert [whole for whole, _ in asked] == [True]


def test_an_object_replaced_between_two_requests_is_not_damaged(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_store(url, CODEC, SIZES, shard_rows=16)
    store, wholes = CaptureStore.open(url), []
    expected = store.layer(3)[:]

    def stale(self: ObjectPath) -> int:
        return real(self) - 100 if self.name == "0" else real(self)

    def whole(self: ObjectPath) -> bytes:
        wholes.append(self.name)
        return read(self)

    real, read = ObjectPath.size, ObjectPath.read_bytes
    monkeypatch.setattr(ObjectPath, "size", stale)
    monkeypatch.setattr(ObjectPath, "read_bytes", whole)
    for row in (0, 3, 15):
        wholes.clear()
        np.testing.assert_array_equal(store.layer(3)[row], expected[row])
        assert wholes


def test_resume_and_overwrite(url: str) -> None:
    sequences, _ = sample_sequences(0, CODEC, (3,), SIZES)
    with pytest.raises(KeyboardInterrupt), create_store(url, CODEC, shard_rows=16) as writer:  # noqa: PT012
        writer.append_many(sequences[:2])
        raise KeyboardInterrupt
    assert (CaptureStore.open(url).sequences, CaptureStore.open(url).complete) == (2, False)
    with pytest.raises(StoreError, match=r"exists: pass --overwrite to replace it"):
        create_store(url, CODEC)
    # A writer that dies after its shards and before its commit.
    dying = StoreWriter.resume(url, options=OPTIONS, commit_seconds=1e9)
    dying.append_many(sequences[2:3])
    for log in dying._logs._logs.values():
        log.flush()
    dying._queue.join()
    dying._lock.release()
    assert CaptureStore.open(url).sequences == 2
    with StoreWriter.resume(url, options=OPTIONS) as writer:
        assert writer.sequences == 2
        writer.append_many(sequences[2:])
    assert CaptureStore.open(url).rows == sum(SIZES)
    assert all(check.ok for check in verify(url))
    create_store(url, CODEC, overwrite=True).close()
    assert CaptureStore.open(url).rows == 0
    assert all(check.ok for check in verify(url))
    (ObjectPath.open(url) / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"'notes.txt', which is no part of a store"):
        create_store(url, CODEC, overwrite=True)
    assert CaptureStore.open(url).rows == 0


def test_a_second_writer_is_refused_and_told_of_the_first(url: str) -> None:
    writer = create_store(url, CODEC)
    lock = ObjectPath.open(url) / LOCK_NAME
    assert json.loads(lock.read_bytes())["process"] == os.getpid()
    message = (
        rf"another process is writing this store, or was killed: process {os.getpid()} on \S+, for 0 minutes: "
        rf"wait for it; if it is dead, remove its lock: aws s3 rm {lock}$"
    )
    with pytest.raises(StoreError, match=message):
        StoreWriter.resume(url, options=OPTIONS)
    with pytest.raises(StoreError, match=message):
        create_store(url, CODEC, overwrite=True)
    lock.unlink()  # as that message says, of a writer that was killed
    sequences, _ = sample_sequences(0, CODEC, (3,), SIZES)
    second = StoreWriter.resume(url, options=OPTIONS)
    writer.append(sequences[0])
    with pytest.raises(WriteError, match=f"{lock}: deleted or replaced while this process was writing"):
        writer.commit()  # it lives after all
    writer.close()
    second.append_many(sequences)
    second.close()
    assert CaptureStore.open(url).commit.epoch == 2
    assert CaptureStore.open(url).rows == sum(SIZES)


def test_what_a_lock_tells(url: str) -> None:
    for lock, told in (
        (
            {"process": 7, "host": "h", "since": "2020-01-01T00:00:00+00:00"},
            r"process 7 on h, for \d{5,} hours:",
        ),
        ({"process": 7, "host": "h", "since": "soon"}, "process 7 on h:"),
        ({"process": 7, "host": "h", "token": "of an older version"}, "process 7 on h:"),
        (["else"], r"""the lock says '\["else"\]':"""),
    ):
        (ObjectPath.open(url) / LOCK_NAME).write_bytes(json.dumps(lock).encode())
        with pytest.raises(
            StoreError, match=f"or was killed: {told} wait for it; if it is dead, remove its lock"
        ):
            create_store(url, CODEC)


def test_damage_is_named(url: str) -> None:
    fill_store(url, CODEC, SIZES, shard_rows=16)
    shard = ObjectPath.open(url) / "layer_3/codes/c/0/0"
    data = shard.read_bytes()
    shard.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(StoreError, match=f"^{shard}: damaged: inner chunk 0 fails its checksum"):
        CaptureStore.open(url).layer(3)[:3]
    shard.write_bytes(data[:100])
    with pytest.raises(StoreError, match="cut short"):
        CaptureStore.open(url).layer(3)[:3]
    shard.unlink()
    with pytest.raises(StoreError, match=f"^{shard}: a shard with committed rows is missing"):
        CaptureStore.open(url).layer(3)[:3]
    failed = {check.name: check.detail for check in verify(url) if not check.ok}
    assert failed["damaged sequences"] == "2 sequences: 0, 2"
    with pytest.raises(StoreError, match="repair a copy on a disk"):
        repair(url)


def test_places_that_are_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad, message in (
        (url, "there is no such store"),
        ("s3://no-such-bucket-here/run.zarr", "cannot be reached: .*404"),
        ("gopher://x/run.zarr", "^gopher://x/run.zarr: cannot be reached"),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            CaptureStore.open(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(WriteError, match="^s3://no-such-bucket-here/run.zarr: cannot be written: ") as told:
        create_store("s3://no-such-bucket-here/run.zarr", CODEC)
    assert "\n" not in str(told.value)
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(StoreError, match=r"object stores need obstore: pip install '\.\[s3\]'"):
        objects.place(url)


def test_the_commands(url: str, root: Path, tmp_path: Path) -> None:
    assert call(*capture(root, url)).code == 0
    check_refused(call(*capture(root, url)), f"^error: {url}: exists; pass --resume")
    assert call(*capture(root, url, resume=True)).code == 0
    facts, others = call("info", url, "--json").json, call("info", root / "run.zarr", "--json").json
    assert (facts["rows"], facts["store"]) == (others["rows"], url)
    assert call("verify", url).code == 0
    assert call("export", url, "--to", "npy", "--out", tmp_path / "rows.npy").code == 0
    assert len(np.load(tmp_path / "rows.npy")) == facts["rows"]
