"""The compiled extension: checksums, shards, errors, and that the package works without it."""

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from nla_engine import extension
from nla_engine.ops import encode
from nla_engine.store import shards
from nla_engine.store.format import ArraySpec

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


def image(data: np.ndarray) -> tuple[np.ndarray, int, int, int]:
    """The arguments of seal_shard and write_shard for data [n, d] as chunks of 8 rows, 4 per shard."""
    chunk = 8 * data[0].nbytes
    out = np.full(4 * (chunk + 4) + 4 * 16 + 4, 0xAB, np.uint8)
    for i in range(0, len(data), 8):
        part = data[i : i + 8].reshape(-1).view(np.uint8)
        out[i // 8 * (chunk + 4) :][: len(part)] = part
    return out, data.nbytes, chunk, 4


def sealed(data: np.ndarray) -> bytes:
    arguments = image(data)
    return arguments[0][: _C.seal_shard(*arguments)].tobytes()


@built
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 32])
def test_zarr_reads_a_built_shard(tmp_path, rng, rows):
    """Full, padded and absent chunks."""
    data = rng.integers(-128, 128, (rows, 6), dtype=np.int8)
    array = sharded(tmp_path / "a.zarr", (rows, 6), "int8")
    path = tmp_path / "a.zarr" / "c" / "0" / "0"
    path.parent.parent.mkdir(parents=True)  # the last directory is the writer's to make
    _C.write_shard(path, *image(data))
    np.testing.assert_array_equal(array[:], data)
    assert path.read_bytes() == sealed(data) == expected_shard(data.tobytes(), 48, 4)


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
def test_python_gives_the_same_bytes(tmp_path, rng, monkeypatch, rows):
    spec = ArraySpec("a", np.dtype("<u2"), ("row", "channel"), "rows", 8, 32, (3,))
    data = rng.integers(0, 2**16, (32, 3), dtype=np.uint16)
    contents = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(extension, "load", lambda: None)
        shard = shards.ShardImage(spec)
        shard.put([(0, data)])
        shard.seal(32)
        shard.put([(0, data[:rows])])  # reused: the old rows after these must not show
        contents.append(shard.seal(rows).tobytes())
        shard.write(tmp_path / str(native) / "0", rows)
        contents.append((tmp_path / str(native) / "0").read_bytes())
        assert os.listdir(tmp_path / str(native)) == ["0"]
    assert contents == [sealed(data[:rows])] * 4


@built
def test_rows_lie_where_they_belong(rng, monkeypatch):
    """Pieces of any size at any row, in any order: both ways against one plain array; uncovered rows are unchanged."""
    spec = ArraySpec("a", np.dtype("<f2"), ("row", "channel"), "rows", 8, 32, (3,))
    for _ in range(20):
        edges = np.unique(rng.integers(0, 33, 12))
        pieces = [(int(a), rng.normal(size=(b - a, 3)).astype("<f2")) for a, b in pairwise(edges)]
        dropped = [pieces.pop(rng.integers(len(pieces)))] if len(pieces) > 1 else []
        pieces = [pieces[i] for i in rng.permutation(len(pieces))] + [(5, np.empty((0, 3), "<f2"))]
        want = np.full((32, 3), -7, "<f2")
        for start, rows in pieces:
            want[start : start + len(rows)] = rows
        assert all((want[a : a + len(rows)] == -7).all() for a, rows in dropped)
        for put in (shards.ShardImage.put, shards.ShardImage.put_reference):
            shard = shards.ShardImage(spec)
            shard.chunks[:] = -7
            put(shard, pieces)
            np.testing.assert_array_equal(shard.chunks.reshape(32, 3), want)
    shard.put([(4, want[:9].astype(np.float32)), (20, want[::2][:7])])  # of another type, or not contiguous
    np.testing.assert_array_equal(shard.chunks.reshape(32, 3)[4:13], want[:9])
    np.testing.assert_array_equal(shard.chunks.reshape(32, 3)[20:27], want[::2][:7])
    with pytest.raises(ValueError, match="broadcast"):
        shard.put([(0, np.zeros((2, 6), "<f2"))])


@built
def test_pieces_that_stick_out_are_refused():
    shard, _, chunk, chunks = image(np.ones((5, 3), np.uint16))
    before, inside = shard.copy(), np.zeros(48, np.uint8)
    for start, size in ((192, 1), (0, 193), (150, 43), (2**64 - 8, 16)):
        with pytest.raises(ValueError, match=f"piece: {size} bytes at {start} stick out of 192"):
            _C.fill_shard(shard, chunk, chunks, [(0, inside), (start, np.zeros(size, np.uint8))])
    with pytest.raises(ValueError, match="contiguous"):
        _C.fill_shard(shard, chunk, chunks, [(0, inside[::2])])
    assert np.array_equal(shard, before)
    with pytest.raises(BufferError):
        _C.fill_shard(shard.tobytes(), chunk, chunks, [(0, inside)])


@built
def test_shard_bytes_are_those_of_zarr(tmp_path, rng):
    data = rng.integers(0, 2**16, (32, 5), dtype=np.uint16)
    array = sharded(tmp_path / "a.zarr", data.shape, "uint16")
    array[:] = data
    written = (tmp_path / "a.zarr" / "c" / "0" / "0").read_bytes()
    ours = sealed(data)
    assert len(written) == len(ours)
    # zarr may lay the chunks out in another order: compare what its own index points at
    for index, shard in ((written[-68:-4], written), (ours[-68:-4], ours)):
        places = np.frombuffer(index, "<u8").reshape(4, 2)
        for i, (offset, size) in enumerate(places):
            assert shard[offset : offset + size - 4] == data[8 * i : 8 * i + 8].tobytes()


@built
def test_shard_requests_that_cannot_be_met(tmp_path):
    shard, size, chunk, chunks = image(np.ones((5, 3), np.uint16))
    for arguments, fault in (
        ((shard, size, 0, chunks), "chunk_bytes: 0 is not positive"),
        ((shard, size, chunk, -1), "chunks_per_shard: -1 is not positive"),
        ((shard, -1, chunk, chunks), "data_bytes: -1 is negative"),
        ((shard, 193, chunk, chunks), "data: 193 bytes do not fit in 4 chunks of 48"),
        ((shard[1:], size, chunk, chunks), "image: 275 bytes, a shard needs 276"),
        ((np.zeros((4, 552), np.uint8)[:, ::2], size, chunk, chunks), "contiguous"),
    ):
        with pytest.raises(ValueError, match=fault):
            _C.seal_shard(*arguments)
    with pytest.raises(BufferError):
        _C.seal_shard(shard.tobytes(), size, chunk, chunks)
    missing = tmp_path / "nowhere" / "at all" / "0"
    with pytest.raises(FileNotFoundError) as caught:
        _C.write_shard(missing, shard, size, chunk, chunks)
    assert caught.value.errno == errno.ENOENT
    assert str(missing.parent) in caught.value.filename


@built
def test_a_failed_write_leaves_nothing_behind(tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(IsADirectoryError):
        _C.write_shard(target, *image(np.ones((5, 3), np.uint16)))
    assert os.listdir(tmp_path) == ["taken"]


@built
def test_write_shard_replaces_a_file_and_takes_odd_names(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xc3\xa9 \xff")
    path.write_bytes(b"old")
    _C.write_shard(path, *image(np.full((5, 3), 7, np.uint16)))
    assert path.read_bytes()[:4] == b"\7\0\7\0"
    assert len(os.listdir(tmp_path)) == 1


@built
def test_many_threads_seal_at_once(rng):
    data = rng.integers(0, 2**16, (32, 1 << 14), dtype=np.uint16)
    right = sealed(data)
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(sealed(data) == right)) for _ in range(4)]
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
    assert extension.architectures() == ()
    assert "compiled extension is missing" in extension.why_missing()
    assert encode.backend("cpu") == "numba"
    assert encode.backend("cuda") == "torch"


def test_import_is_silent():
    code = "import nla_engine.extension as e; e.load(); e.why_missing()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == done.stderr == b""


# ---- the CUDA part ----

nvcc, cmake = shutil.which("nvcc"), shutil.which("cmake")
triton = importlib.util.find_spec("triton")
tools = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
cuobjdump = shutil.which("cuobjdump", path=str(tools))
has_nvcc = pytest.mark.skipif(nvcc is None, reason="nvcc is not on PATH")
#: Those that CMakeLists.txt asks for, and the oldest that the kernels are written for.
ARCHITECTURES = ("75", "80", "86", "89", "90a", "100", "120")


def compiled(source: Path, to: Path, architectures: list[str], *options: str) -> subprocess.CompletedProcess:
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    command = [nvcc, "-std=c++17", "-O3", "--threads=4", *codes, *options, "-c", str(source), "-o", str(to)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def architectures_held() -> set[str]:
    """What the module holds code for, if it is newer than its sources; another test finds what this code spills."""
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").iterdir()]
    if cuobjdump is None or _C is None or max(map(os.path.getmtime, sources)) > os.path.getmtime(_C.__file__):
        return set()
    return {name.removeprefix("sm_") for name in extension.architectures()}


@pytest.mark.slow
@has_nvcc
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile_for_every_card_and_spill_nothing(tmp_path, source):
    known = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    names = [name for name in ARCHITECTURES if f"compute_{name.rstrip('a')}" in known]
    names = [name for name in names if name not in architectures_held()] or names[:1]
    names = ["90a"] if source.name == "gated.cu" else names
    done = compiled(source, tmp_path / "out.o", names, "-Xptxas", "-v")
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report, report
    assert {f"sm_{name}" for name in names} == set(re.findall(r"for '(sm_\w+)'", report))
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames
    # ptxas 13.0 puts one register of one decoder on the stack of sm_100.
    spilled = [numbers for numbers in frames if numbers != ("0", "0", "0")]
    assert spilled in ([], [("8", "8", "4")]), report


@has_nvcc
def test_the_gated_product_is_compiled_for_hopper_alone(tmp_path):
    for name in ("90", "100"):
        done = compiled(ROOT / "csrc" / "gated.cu", tmp_path / "out.o", [name])
        assert done.returncode != 0 and "for sm_90a only" in done.stderr


@built
def test_the_module_holds_the_code_that_it_names_and_it_spills_nothing():
    if not _C.cuda or cuobjdump is None:
        pytest.skip("needs the CUDA part and Triton's cuobjdump")

    def listed(*options):
        return subprocess.run(
            [cuobjdump, *options, _C.__file__], capture_output=True, text=True, check=True
        ).stdout

    code = re.findall(r"\.(sm_\w+)\.(cubin|ptx)", listed("--list-elf", "--list-ptx"))
    held = {name if kind == "cubin" else name.replace("sm_", "compute_") for name, kind in code}
    assert held == set(extension.architectures())
    usage = re.split(r"Fatbin elf code:\n", listed("-res-usage"))[1:]
    stacks = re.findall(r"STACK:(\d+)", "".join(usage))
    assert stacks and [size for size in stacks if size != "0"] in ([], ["8"]), "as in the test above"
    gated = {re.search(r"arch = (\w+)", part)[1] for part in usage if "gated_kernel" in part}
    assert gated == ({"sm_90a"} if _C.gated_tiles else set())


@pytest.mark.skipif(cmake is None, reason="cmake is not on PATH")
def test_what_is_built_is_what_the_nvcc_at_hand_knows(tmp_path):
    def asked(wanted, known="compute_75 compute_80 compute_86 compute_89 compute_90"):
        tool, script = tmp_path / "nvcc", tmp_path / "ask.cmake"
        tool.write_text("#!/bin/sh\nprintf '%s\\n' " + known + "\n")
        tool.chmod(0o755)
        script.write_text(
            f'cmake_minimum_required(VERSION 3.20)\nset(CMAKE_CUDA_COMPILER "{tool}")\n'
            "set(CMAKE_CUDA_COMPILER_VERSION 12.4)\n"
            f"include({ROOT}/csrc/architectures.cmake)\n"
            f'nla_architectures("{wanted}" flags built)\nmessage("built: ${{built}}|${{flags}}")\n'
        )
        done = subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, check=False)
        found = re.search(r"built: (\S*)\|(\S*)", done.stderr)
        said = " ".join((done.stdout + done.stderr).split())
        return (found[1].split(";"), found[2].split(";"), said) if done.returncode == 0 else said

    default = re.search(r'set\(NLA_CUDA_ARCH "([^"]+)"', (ROOT / "CMakeLists.txt").read_text())[1]
    names, flags, said = asked(default)
    assert names == ["sm_80", "compute_80", "sm_86", "sm_89", "sm_90a"]
    assert flags[:2] == [f"-gencode=arch=compute_80,code={kind}_80" for kind in ("sm", "compute")]
    assert "nvcc 12.4 does not know sm_100: left out" in said and "sm_120: left out" in said
    newest = "compute_80 compute_86 compute_89 compute_90 compute_100 compute_120"
    assert asked(default, newest)[0] == [*names, "sm_100", "sm_120", "compute_120"]
    assert asked("89,90a-real")[0] == ["sm_89", "compute_89", "sm_90a"]
    assert asked("80-virtual")[:2] == (["compute_80"], ["-gencode=arch=compute_80,code=compute_80"])
    assert "'hopper' is not an architecture: use numbers such as 80" in asked("hopper")
    assert "nvcc 12.4 knows none of 120, only 75;80;86;89;90" in asked("120")
