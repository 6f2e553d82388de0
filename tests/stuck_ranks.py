"""What ranks of a group do together in tests, while one of them hangs."""

from __future__ import annotations

import os
import signal
import time

import torch

from nla_engine.engine.ranks import Ranks


def only_sum(ranks: Ranks) -> None:
    """Nothing hangs. The other rank has loaded this module then."""
    ranks.sum(torch.ones(3))


def stop_and_sum(ranks: Ranks) -> None:
    """The other rank stops, as by a debugger, and this one waits for it."""
    if ranks.rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.sum(torch.ones(3))


def sleep_and_sum(ranks: Ranks) -> None:
    """The other rank does something else."""
    if ranks.rank:
        time.sleep(600)
    ranks.sum(torch.ones(3))
