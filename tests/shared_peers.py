"""Ranks on a CPU that sum as GPUs do which write each other's memory: files that all map, and the kernel played on it.

Run as a program: DIRECTORY RANKS LIBRARY (see `stand_in_gpu`). Compares states of split models in DIRECTORY with plain
transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from stand_in_gpu import StandIn, install_sums

from nla_engine.engine import peers
from nla_engine.engine.ranks import Ranks
from nla_engine.ops.peer_sum import Peers

ROOM = 1 << 18
CPU = torch.device("cpu")
LAYER = 2


def mapped(directory: Path, size: int) -> list[torch.Tensor]:
    """The memory of every rank, in this process."""
    return [
        torch.from_file(
            str(directory / f"memory-{rank}"), shared=True, size=Peers.bytes(ROOM), dtype=torch.uint8
        )
        for rank in range(size)
    ]


class Passed:
    """Stands for an event of a device."""

    def record(self) -> None:
        """Nothing is queued here."""

    def query(self) -> bool:
        return True


def share(ranks: Ranks, directory: str, library: str) -> None:
    """On every rank: `connect`, with files in the place of memory of GPUs. Launches of few programs are said to be the
    fastest for small tensors, NCCL for large ones."""
    install_sums(StandIn(Path(library)), ranks.rank, pytest.MonkeyPatch())
    every = mapped(Path(directory), ranks.size)

    def opened(group: Ranks, own: torch.Tensor, told: list[str]) -> tuple[Peers, list[torch.UntypedStorage]]:
        assert told == [f"rank {rank}" for rank in range(group.size)]
        stop = torch.zeros(1, dtype=torch.int32)
        return Peers(group.rank, own, [each.data_ptr() for each in every], stop), []

    def measured(group: Ranks, launch: Callable[[], object]) -> int:
        launch()
        return next(said)

    said = iter([300, 100, 200, 200, 100, 200, 200, 200])
    changed = {
        "ROOM": ROOM,
        "_TRIED": ((1, 8), (37, 100)),
        "_TIMED": (1 << 12, 1 << 16),
        "_unreachable": lambda group: "",
        "_shared": lambda group: (every[group.rank], f"rank {group.rank}"),
        "_opened": opened,
        "_microseconds": measured,
    }
    with mock.patch.multiple(peers, **changed), mock.patch.object(torch.cuda, "Event", Passed):
        found = peers.connect(ranks)
    assert isinstance(found, peers.PeerSums), found
    assert found.part(4, 64, torch.float32) is not None and found.part(16, 1024, torch.float32) is None
    ranks.peers = found
    ranks.kept = every  # type: ignore[attr-defined]


def compare(directory: Path, size: int, library: str) -> None:
    """Prints the largest difference of each model, and how many sums its rank 0 has had."""
    import shared_peers  # as the other ranks know it
    import transformers

    from nla_engine.engine.leader import open_ranks
    from nla_engine.engine.runner import Runner
    from nla_engine.engine.split_load import load_split
    from nla_engine.models.source import find_source
    from nla_engine.ops.backends import Kernels

    for each in mapped(directory, size):
        each.zero_()
    rng = np.random.default_rng()
    with open_ranks((CPU,) * size) as ranks, torch.inference_mode():
        assert ranks is not None
        ranks.together(shared_peers.share, ranks, str(directory), library)
        for base in sorted(path for path in directory.iterdir() if path.is_dir()):
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            lm = load_split(ranks, find_source(str(base)), dtype=torch.float32).truncated(LAYER)
            with ranks.make(Runner, lm, slots=2, length=20, kernels=Kernels("fused")) as runner:
                apart = []
                for _ in range(4):
                    ids = rng.integers(0, 250, rng.integers(1, 19)).tolist()
                    whole = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
                    truth = whole.hidden_states[LAYER + 1][0]
                    states = runner.read([(1, 0, ids)])
                    ranks.check()
                    apart.append(float((states - truth).abs().max() / truth.abs().max()))
            assert ranks.peers is not None
            print(base.name, max(apart), int(ranks.peers.peers._turn[0]) // 2, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    compare(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
