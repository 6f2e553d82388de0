"""The sum over ranks by loads and stores: processes that share memory, and play the kernel's threads on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in_gpu import StandIn

from nla_engine.ops.peer_sum import MEETING_BYTES, PROGRAMS, Peers, peer_sum_reference

ROOM = 1 << 15
#: Of meetings, at the start.
_NUMBER = 2**31 - 6
PATHS = [str(Path(__file__).parents[up]) for up in (2, 1, 0)]
#: Rows, width, most programs, dtype: a few elements, several programs, several rounds of each.
CASES = [
    (1, 8, 128, torch.float32),
    (3, 701, 128, torch.float16),
    (16, 500, 2, torch.float32),
    (7, 903, 3, torch.bfloat16),
    (13, 601, 1, torch.float32),
    (1, 1, 7, torch.bfloat16),
    (31, 500, 5, torch.float16),
]
#: Started once for each rank. Sums what the test draws too, without and with x, in turn with itself.
RANK = """
import sys, time
from pathlib import Path
import numpy as np, pytest, torch
sys.path[:0] = {paths!r}
from stand_in_gpu import StandIn, install_sums
from test_peer_sum import CASES, drawn, peers_of

rank, ranks, seed = map(int, sys.argv[1:4])
folder, library = map(Path, sys.argv[4:])
install_sums(StandIn(library), seed + rank, pytest.MonkeyPatch())
peers = peers_of(rank, ranks, folder)
late = np.random.default_rng([seed, rank])
for number, (_, _, programs, _) in enumerate(CASES):
    x, parts = drawn(seed, number, ranks)
    time.sleep(late.random() / 50)
    part = peers.part(*x.shape, x.dtype)
    part.copy_(parts[rank])
    alone = peers.sum(part, programs=programs).clone()
    part.copy_(parts[rank])
    unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    once = peers.sum(part, unaligned, programs)
    first = once.clone()
    part.copy_(parts[rank])
    twice = peers.sum(part, once, programs)
    assert twice.data_ptr() == once.data_ptr() and peers.holds(twice)
    np.savez(folder / f"{{rank}}-{{number}}.npz", *(each.float().numpy() for each in (alone, first, twice)))
"""


def peers_of(rank: int, size: int, folder: Path) -> Peers:
    """Of a process of the test: a file for the memory of each rank. The numbers of meetings wrap around on the way."""
    kept = [
        torch.from_file(str(folder / f"memory-{n}"), shared=True, size=Peers.bytes(ROOM), dtype=torch.uint8)
        for n in range(size)
    ]
    peers = Peers(rank, kept[rank], [each.data_ptr() for each in kept], torch.zeros(1, dtype=torch.int32))
    peers.kept = kept  # type: ignore[attr-defined]
    peers._turn.fill_(_NUMBER)
    return peers


def make_memory(size: int, folder: Path) -> None:
    """The files of `peers_of`, before any rank starts."""
    for number in range(size):
        path = str(folder / f"memory-{number}")
        memory = torch.from_file(path, shared=True, size=Peers.bytes(ROOM), dtype=torch.uint8)
        memory[:MEETING_BYTES].view(torch.int32).fill_(_NUMBER)


def drawn(seed: int, number: int, ranks: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x and every rank's part, the same in every process."""
    rows, width, _, dtype = CASES[number]
    draw = np.random.default_rng([seed, number]).standard_normal((ranks + 1, rows, width))
    x, *parts = (torch.from_numpy(each).to(dtype) for each in draw)
    return x, parts


@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_sum(stand_in: StandIn, tmp_path: Path, seed: int, ranks: int) -> None:
    """All have the same bits, as near to float64 as one rounding. One program of each rank runs at a time."""
    make_memory(ranks, tmp_path)
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK.format(paths=PATHS),
                *map(str, (rank, ranks, seed % 2**31, tmp_path, stand_in.path)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for each in running:
            _, said = each.communicate(timeout=250)
            assert each.returncode == 0, said
    finally:
        for each in running:
            each.kill()
            each.communicate()
    for number, (*_, dtype) in enumerate(CASES):
        x, parts = drawn(seed % 2**31, number, ranks)
        total = sum(part.double() for part in parts)
        every = [np.load(tmp_path / f"{rank}-{number}.npz") for rank in range(ranks)]
        eps = torch.finfo(dtype).eps
        for name, truth in (
            ("arr_0", total),
            ("arr_1", x.double() + total),
            ("arr_2", x.double() + 2 * total),
        ):
            sums = [torch.from_numpy(each[name]).double() for each in every]
            assert all(torch.equal(sums[0], other) for other in sums)
            assert (sums[0] - truth).abs().max() <= 2 * eps * truth.abs().max()
        reference = peer_sum_reference([2 * part for part in parts], x)
        assert torch.allclose(sums[0].to(dtype), reference, rtol=4 * eps, atol=8 * eps)


def test_what_has_no_room_is_summed_elsewhere(tmp_path: Path) -> None:
    peers = peers_of(0, 1, tmp_path)
    assert peers.part(1, ROOM // 4, torch.float32) is not None
    assert peers.part(1, ROOM // 4 + 1, torch.float32) is None
    with pytest.raises(ValueError, match=r"Peers\.part"):
        peers.sum(torch.zeros(3, 4))
    assert len(peers._turn) == PROGRAMS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memory": [64] * 9}, "ranks: 9 are not 1 to 8"),
        ({"rank": 2}, "rank: 2 is not one"),
        ({"programs": PROGRAMS + 1}, "programs: 129 are not 1 to 128"),
        ({"size": 0}, "size: 0 is not positive"),
        ({"memory": [64, 0]}, "memory: is a null pointer"),
        ({"x": 8}, "x: is not at a multiple of 16 bytes"),
        ({"stop": 0}, "stop: is a null pointer"),
    ],
)
def test_what_the_kernel_refuses(stand_in: StandIn, given: dict[str, Any], words: str) -> None:
    usual = {"programs": 1, "memory": [64, 64], "rank": 0, "part": 64, "sum": 64, "x": 64, "size": 8}
    with pytest.raises(RuntimeError, match=words):
        stand_in.peer_sum(0, 0, **{**usual, "dtype": "float32", "turn": 64, "stop": 64, **given})


#: A rank that nobody joins, until the host says so.
_ALONE = """
import sys, threading, time
from pathlib import Path
import pytest, torch
sys.path[:0] = {paths!r}
from stand_in_gpu import StandIn, install_sums
from test_peer_sum import peers_of

install_sums(StandIn(Path(sys.argv[2])), 0, pytest.MonkeyPatch())
peers = peers_of(0, 2, Path(sys.argv[1]))
part = peers.part(1, 8, torch.float32)
def stop():
    time.sleep(0.5)
    print("stopped", flush=True)
    peers.stop.fill_(1)
threading.Thread(target=stop).start()
peers.sum(part)
print("ended", flush=True)
"""


def test_the_host_can_end_a_wait(stand_in: StandIn, tmp_path: Path) -> None:
    make_memory(2, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _ALONE.format(paths=PATHS), str(tmp_path), str(stand_in.path)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.stdout.split() == ["stopped", "ended"], done.stderr
