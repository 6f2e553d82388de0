"""Kernels of csrc on a CPU: their own sources, with a GPU's threads played by coroutines.

It shows what a kernel computes and whether its threads wait for one another as they must, not how fast it is.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_CSRC = _HERE.parent.parent / "csrc"
_KERNELS = ("encode.cu", "encode_fast.cu", "decode.cu", "peer_sum.cu")
_KINDS = {"bf16": 0, "int8": 1, "int4": 2}
_FLOATS = {"float32": 0, "bfloat16": 1, "float16": 2}
#: What a C++ compiler cannot read of CUDA, and how it is said to it.
_SAID = (
    (r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(shared_memory());"),
    (r"__shared__ ", "static "),
    (r"([\w:]+(?:<[^<>;]*>)?)<<<(.+?)>>>\((.*?)\);", r"launch_on_host([&] { \1(\3); }, \2);"),
)


def build(directory: Path) -> Path:
    """Compile csrc's kernels for this machine into `directory`; the library."""
    for path in [*_CSRC.glob("*.cuh"), *_CSRC.glob("*.hpp"), *(_CSRC / name for name in _KERNELS)]:
        text = path.read_text()
        if path.suffix == ".cu":
            for pattern, said in _SAID:
                text = re.sub(pattern, said, text)
        (directory / path.with_suffix(".cpp" if path.suffix == ".cu" else path.suffix).name).write_text(text)
    for path in _HERE.iterdir():
        if path.suffix != ".py" and path.is_file():  # mma.cuh and signals.cuh take the place of csrc's
            (directory / path.name).write_text(path.read_text())
    library = directory / "stand_in_gpu.so"
    # Fortified jumps refuse to leave a stack for another.
    flags = [
        "-std=c++17",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-ffp-contract=off",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-I",
        str(directory),
    ]
    objects = [directory / f"{Path(name).stem}.o" for name in (*_KERNELS, "gpu.cpp")]
    compiling = [
        subprocess.Popen(
            ["g++", *flags, "-c", str(made.with_suffix(".cpp")), "-o", str(made)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for made in objects
    ]
    for process in compiling:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[:3000]
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


class StandIn:
    """Has `encode_rows`, `decode_rows` and `peer_sum` as the extension has them; pointers are the CPU's."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self._library = ctypes.CDLL(str(library))
        for each in (self._library.encode, self._library.decode, self._library.peer_sum):
            each.restype = ctypes.c_char_p

    def start(self, seed: int, multiprocessors: int) -> None:
        """From here on: threads go on in this order, on so many multiprocessors."""
        self._library.start(ctypes.c_uint(seed), ctypes.c_int(multiprocessors))

    def encode_rows(self, device: int, stream: int, **given: Any) -> None:
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        _raise(
            self._library.encode(
                *_shape(given),
                pointer(given["hidden"]),
                _FLOATS[given["hidden_dtype"]],
                size(given["row_stride"]),
                size(given["rows"]),
                *(pointer(given[name]) for name in ("dest", "codes", "scales", "norm")),
                ctypes.c_float(given["sink_norm"]),
                *(pointer(given[name]) for name in ("exact", "exact_dest", "exact_count")),
                size(given["exact_capacity"]),
            )
        )

    def decode_rows(self, device: int, stream: int, **given: Any) -> None:
        pointer = ctypes.c_void_p
        _raise(
            self._library.decode(
                *_shape(given),
                *(pointer(given[name]) for name in ("codes", "scales", "norm")),
                ctypes.c_int64(given["rows"]),
                pointer(given["out"]),
                _FLOATS[given["out_dtype"]],
            )
        )

    def peer_sum(self, device: int, stream: int, **given: Any) -> None:
        size, pointer, memory = ctypes.c_int64, ctypes.c_void_p, given["memory"]
        _raise(
            self._library.peer_sum(
                given["programs"],
                (pointer * len(memory))(*memory),
                given["rank"],
                len(memory),
                *(size(given[name]) for name in ("part", "sum")),
                pointer(given["x"]),
                size(given["size"]),
                _FLOATS[given["dtype"]],
                *(pointer(given[name]) for name in ("turn", "stop")),
            )
        )


def _shape(given: dict[str, Any]) -> tuple[int, ...]:
    return _KINDS[given["codec"]], given["d"], given["block"], given["group"]


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def install_sums(stand_in: StandIn, seed: int, patch: pytest.MonkeyPatch) -> None:
    """Let `ops.peer_sum` take the stand-in for the extension: ranks are processes, and wait for one another."""
    from nla_engine.ops import peer_sum

    stand_in.start(seed, 1)
    patch.setattr(peer_sum, "_launch", lambda device, **given: stand_in.peer_sum(0, 0, **given))


def install(stand_in: StandIn, multiprocessors: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let `ops.encode` take the stand-in for the extension, and tensors on a CPU for those of its device."""
    from nla_engine.ops import encode

    stand_in.start(seed, multiprocessors)
    monkeypatch.setattr(encode, "_extension", lambda: stand_in)
    monkeypatch.setattr(encode, "_where", lambda tensor: (0, 0))
    monkeypatch.setattr(encode, "backend", lambda device, override=None, codec=None: override)
