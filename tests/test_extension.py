"""The compiled extension: checksums, shards, errors, and that the package lives without it."""

import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from nla_engine import extension
from nla_engine.ops import encode
from nla_engine.store import shards

ROOT = Path(__file__).resolve().parent.parent
_C = extension.load()
built = pytest.mark.skipif(_C is None, reason=f"the extension is not built: {extension.why_missing()}")


@built
@pytest.mark.parametrize("portable", [False, True])
def test_crc32c_agrees_with_googles(rng, portable):
    assert _C.crc32c(b"123456789", portable) == 0xE3069283
    data = rng.bytes(40_000)
    for size in [0, 1, 7, 8, 9, 63, 2047, 2048, 6143, 6144, 6145, 20_000, 39_999]:
        for start in (0, 1):
            piece = data[start : start + size]
            assert _C.crc32c(piece, portable) == google_crc32c.value(piece), (size, start)


def sharded(path: Path, shape: tuple[int, int], dtype: str) -> zarr.Array:
    """Chunks of 8 rows, 4 to a shard."""
    return zarr.create_array(
        path,
        shape=shape,
        chunks=(8, shape[1]),
        shards=(32, shape[1]),
        dtype=dtype,
        compressors=zarr.codecs.Crc32cCodec(),
        fill_value=0,
    )


@built
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 32])
def test_zarr_reads_a_built_shard(tmp_path, rng, rows):
    """Full, padded and absent chunks."""
    data = rng.integers(-128, 128, (rows, 6), dtype=np.int8)
    array = sharded(tmp_path / "a.zarr", (rows, 6), "int8")
    path = tmp_path / "a.zarr" / "c" / "0" / "0"
    path.parent.mkdir(parents=True)
    _C.write_shard(path, data, 48, 4)
    np.testing.assert_array_equal(array[:], data)
    assert path.read_bytes() == _C.build_shard(data, 48, 4) == expected_shard(data.tobytes(), 48, 4)


def expected_shard(data: bytes, chunk_bytes: int, chunks_per_shard: int) -> bytes:
    """The layout as its specification reads."""
    body, index = b"", b""
    for i in range(chunks_per_shard):
        chunk = data[i * chunk_bytes : (i + 1) * chunk_bytes]
        if chunk:
            chunk = chunk.ljust(chunk_bytes, b"\0")
            index += len(body).to_bytes(8, "little") + (chunk_bytes + 4).to_bytes(8, "little")
            body += chunk + google_crc32c.value(chunk).to_bytes(4, "little")
        else:
            index += b"\xff" * 16
    return body + index + google_crc32c.value(index).to_bytes(4, "little")


@built
@pytest.mark.parametrize("rows", [1, 8, 11, 32])
def test_the_stores_own_builder_gives_the_same_bytes(rng, rows):
    data = rng.integers(0, 2**16, (rows, 3), dtype=np.uint16)
    assert _C.build_shard(data, 8 * 6, 4) == shards.build_shard_reference(data, 8, 4).tobytes()


@built
def test_shard_bytes_are_those_of_zarr(tmp_path, rng):
    data = rng.integers(0, 2**16, (32, 5), dtype=np.uint16)
    array = sharded(tmp_path / "a.zarr", data.shape, "uint16")
    array[:] = data
    written = (tmp_path / "a.zarr" / "c" / "0" / "0").read_bytes()
    ours = _C.build_shard(data, 80, 4)
    assert len(written) == len(ours)
    # zarr may lay the chunks out in another order: compare what its own index points at
    for index, shard in ((written[-68:-4], written), (ours[-68:-4], ours)):
        places = np.frombuffer(index, "<u8").reshape(4, 2)
        for i, (offset, size) in enumerate(places):
            assert shard[offset : offset + size - 4] == data[8 * i : 8 * i + 8].tobytes()


@built
def test_shard_requests_that_cannot_be_met(tmp_path):
    with pytest.raises(ValueError, match="chunk_bytes: 0 is not positive"):
        _C.build_shard(b"abc", 0, 4)
    with pytest.raises(ValueError, match="data: 9 bytes do not fit in 2 chunks of 4"):
        _C.build_shard(b"123456789", 4, 2)
    with pytest.raises(ValueError, match="contiguous"):
        _C.build_shard(np.zeros((4, 4))[:, ::2], 4, 2)
    missing = tmp_path / "nowhere" / "0"
    with pytest.raises(FileNotFoundError) as caught:
        _C.write_shard(missing, b"abc", 4, 2)
    assert caught.value.errno == errno.ENOENT
    assert str(missing) in caught.value.filename


@built
def test_a_failed_write_leaves_nothing_behind(tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(IsADirectoryError):
        _C.write_shard(target, b"abc", 4, 2)
    assert os.listdir(tmp_path) == ["taken"]


@built
def test_write_shard_replaces_a_file_and_takes_odd_names(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xc3\xa9 \xff")
    path.write_bytes(b"old")
    _C.write_shard(path, b"new!", 4, 1)
    assert path.read_bytes()[:4] == b"new!"
    assert len(os.listdir(tmp_path)) == 1


@built
def test_many_threads_build_at_once(rng):
    data = rng.bytes(1 << 20)
    right = _C.build_shard(data, 1 << 16, 16)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(_C.build_shard(data, 1 << 16, 16) == right))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@pytest.fixture
def without_extension(monkeypatch):
    def refuse(name):
        raise ImportError("No module named 'nla_engine._C'")

    extension._import.cache_clear()
    monkeypatch.setattr(importlib, "import_module", refuse)
    yield
    extension._import.cache_clear()


@pytest.mark.usefixtures("without_extension")
def test_a_missing_extension_is_named_and_the_op_still_runs():
    assert extension.load() is None
    assert not extension.has_cuda()
    assert "compiled extension is missing" in extension.why_missing()
    assert encode.backend("cpu") == "numba"
    assert encode.backend("cuda") == "torch"


def test_import_is_silent():
    code = "import nla_engine.extension as e; e.load(); e.why_missing()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == done.stderr == b""


nvcc = shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.skipif(nvcc is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile_for_hopper_and_spill_nothing(tmp_path, source):
    command = [
        *(nvcc, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"),
        *("-c", str(source), "-o", str(tmp_path / "out.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report, report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames
    assert all(numbers == ("0", "0", "0") for numbers in frames), report
