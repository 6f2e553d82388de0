"""What ended sequences generated, and the rows that were kept of them, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.engine.following import Following
from nla_engine.engine.request import Completion, NextTokens
from nla_engine.engine.scheduler import Ended
from nla_engine.engine.tap import Collected, Tap
from nla_engine.engine.transfer import to_device
from nla_engine.ops.sampling import SlotState

#: Seconds between two questions whether rows have come.
_MOMENT = 1e-4


@dataclass(frozen=True)
class Arriving:
    """Completions whose rows are on their way to the host."""

    rows: futures.Future[Collected]
    complete: Callable[[Collected], list[Completion]]

    def have_come(self) -> bool:
        """Wait a moment. Whether all is there."""
        return bool(futures.wait([self.rows], _MOMENT).done)

    def wait(self) -> list[Completion]:
        """The completions, once all is there. Raises what went wrong on the way."""
        return self.complete(self.rows.result())


def generated_by(state: SlotState, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """int32 [n, most]: the tokens of these slots, up to the largest count."""
    at = to_device(np.array(slots), state.count.device)
    return state.generated[at, : max(counts)].to(torch.int32)


def completions(ended: list[Ended], generated: np.ndarray, tap: Tap, following: Following) -> Arriving:
    """Fetch the rows that were kept of these sequences, whose tokens are generated, int32 [n, most]. Their slots may be
    opened again."""
    replies = [generated[i, : a.count] for i, a in enumerate(ended)]
    collected = tap.collect(
        [a.kept for a in ended], [(a.request.id, reply) for a, reply in zip(ended, replies, strict=True)]
    )
    told: Sequence[NextTokens | None] = [None] * len(ended)
    if following.asked:  # what it keeps lies in the slots
        positions = [positions for positions, _ in collected.result()]
        told = following.collect([a.slot for a in ended], positions)

    def complete(kept: Collected) -> list[Completion]:
        return [
            Completion(
                request=a.request,
                generated=replies[i],
                finish=a.finish,
                positions=positions,
                rows=rows,
                next_tokens=told[i],
            )
            for i, (a, (positions, rows)) in enumerate(zip(ended, kept, strict=True))
        ]

    return Arriving(collected, complete)
