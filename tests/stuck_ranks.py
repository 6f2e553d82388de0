"""What ranks of a group do together in tests, while one of them hangs."""

from __future__ import annotations

import os
import signal
import time

import torch

from nla_engine.engine.ranks import Ranks


def only_sum(ranks: Ranks) -> None:
    """Nothing hangs. The other rank has loaded this module then."""
    _sum(ranks)


def stop_and_sum(ranks: Ranks) -> None:
    """The other rank stops, as by a debugger, and this one waits for it."""
    if ranks.rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    _sum(ranks)


def sleep_and_sum(ranks: Ranks) -> None:
    """The other rank does something else."""
    if ranks.rank:
        time.sleep(600)
    _sum(ranks)


def _sum(ranks: Ranks) -> None:
    """Waits for the others, on a GPU too."""
    ranks.sum(torch.ones(3, device=ranks.device)).tolist()


def sleep_and_sum_by_peers(ranks: Ranks) -> None:
    """`sleep_and_sum`, in memory that GPUs share. The others begin more, so that they are ahead."""
    if ranks.rank:
        time.sleep(600)
    assert ranks.peers is not None
    ranks.pulse.beat()
    part = ranks.peers.peers.part(4, 64, torch.bfloat16)
    assert part is not None
    part.fill_(1.0)
    ranks.peers.peers.sum(part).tolist()
