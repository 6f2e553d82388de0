"""GPUs that sum in each other's memory, inside CUDA graphs: sizes and programs in turn, late ranks, other streams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from nla_engine.engine.leader import Leader, open_ranks
from nla_engine.engine.peers import SWITCH
from nla_engine.engine.ranks import Ranks
from nla_engine.ops.peer_sum import PROGRAMS, Peers

pytestmark = pytest.mark.gpu
#: Rows, width, dtype, most programs: decode steps of large models, odd sizes, several rounds of one program.
CASES = [
    (256, 8192, torch.bfloat16, PROGRAMS),
    (1, 1, torch.float16, PROGRAMS),
    (300, 3584, torch.bfloat16, 32),
    (37, 1001, torch.float32, 7),
    (1024, 8192, torch.bfloat16, 64),
    (64, 999, torch.float16, 1),
    (1, 64, torch.bfloat16, PROGRAMS),
]
#: Replays of the graph between two looks, which are sums by NCCL.
REPLAYS, LOOKS = 6, 8
LATE_CYCLES = 10_000_000
#: Largest difference of an element, relative: bfloat16 rounds each of two sums to 2^-8. Of parts of another turn: 2.
CLOSE = 2**-6


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Leader]:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        with open_ranks([torch.device("cuda", number) for number in range(request.param)]) as opened:
            assert isinstance(opened, Leader)
            if opened.peers is None:
                pytest.skip(f"sums by NCCL: {opened.without_peers}")
            yield opened


@dataclass
class Sums:
    """Three sums of one size: without x, with it, and added to that in place. Each turn negates the parts.

    own, total: this rank's part, and that of all in float32; x: the same on every rank
    worst: float32 [1], the largest relative difference so far; NaN where a sum was not written
    """

    own: torch.Tensor
    total: torch.Tensor
    x: torch.Tensor
    worst: torch.Tensor
    programs: int

    @classmethod
    def drawn(cls, ranks: Ranks, number: int, seed: int) -> Sums:
        rows, width, dtype, programs = CASES[number]
        mine, same = (
            torch.Generator(ranks.device).manual_seed(each) for each in (seed + 1 + ranks.rank, seed)
        )
        own, x = (
            torch.randn(rows, width, device=ranks.device, generator=each).to(dtype) for each in (mine, same)
        )
        return cls(own, ranks.reduce(own.float()), x, torch.zeros(1, device=ranks.device), programs)

    def turn(self, peers: Peers) -> torch.Tensor:
        """Launch all three; the last one's result."""
        self.own.neg_()
        self.total.neg_()
        part = peers.part(*self.own.shape, self.own.dtype)
        assert part is not None
        self._look(peers.sum(part.copy_(self.own), programs=self.programs), self.total)
        peers._sums[: self.own.nbytes].fill_(255)  # NaN in every dtype
        part.copy_(self.own)
        once = peers.sum(part, self.x, self.programs)
        self._look(once, self.x.float() + self.total)
        part.copy_(self.own)
        twice = peers.sum(part, once, max(self.programs // 2, 1))
        self._look(twice, self.x.float() + 2 * self.total)
        return twice

    def _look(self, y: torch.Tensor, wanted: torch.Tensor) -> None:
        apart = (y.float() - wanted).abs() / (self.x.float().abs() + 2 * self.total.abs() + 1e-2)
        self.worst.copy_(torch.maximum(self.worst, apart.amax()))  # which keeps a NaN


def sums_in_a_graph(ranks: Ranks, seed: int) -> None:
    """On every rank: all cases in one graph, replayed and launched one by one."""
    assert ranks.peers is not None
    peers, device = ranks.peers.peers, ranks.device
    every = [Sums.drawn(ranks, number, seed) for number in range(len(CASES))]
    for each in every:
        each.turn(peers)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        last = [each.turn(peers).clone() for each in every]
    side, busy = torch.cuda.Stream(device), torch.randn(4096, 4096, device=device).bfloat16()
    for look in range(LOOKS):
        for number in range(REPLAYS):
            if look % 4 == 1 and (look + number) % ranks.size == ranks.rank:
                torch.cuda._sleep(LATE_CYCLES)
            if look % 4 == 2 and number % ranks.size == ranks.rank:
                time.sleep(0.02)
            if look % 4 == 3:
                with torch.cuda.stream(side):
                    torch.mm(busy, busy)
            graph.replay()
            for each in every[number::REPLAYS]:
                each.turn(peers)
        for number, (each, y) in enumerate(zip(every, last, strict=True)):
            worst = max(
                ranks.gather(each.worst).flatten().tolist(), key=lambda value: (value != value, value)
            )
            assert worst < CLOSE, f"case {number}, look {look}: {worst:.2g}"
            same = ranks.gather(y.view(torch.uint8))  # NCCL knows no int16
            assert bool((same == same[:1]).all()), f"case {number}, look {look}: ranks differ"


def test_gpus_sum_by_themselves_in_a_graph(ranks: Leader, seed: int) -> None:
    ranks.together(sums_in_a_graph, ranks, seed % 1000)
    ranks.check_alive()
