"""What ended sequences generated, and the rows that were kept of them, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nla_engine.engine.following import Following
from nla_engine.engine.request import Completion, Finish, NextTokens
from nla_engine.engine.scheduler import Ended
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.tap import Tap
from nla_engine.engine.transfer import to_device
from nla_engine.ops.sampling import SlotState


def generated_so_far(state: SlotState, at: torch.Tensor) -> np.ndarray:
    """int32 [n, most]: what these slots, int64 [n], have generated, up to the longest. Waits for the device."""
    most = int(state.count[at].max())
    return state.generated[at, :most].to(torch.int32).cpu().numpy()


def completions(
    ended: list[Ended],
    state: SlotState,
    stop: StopAutomaton | None,
    tap: Tap,
    following: Following,
) -> Callable[[], list[Completion]]:
    """Fetch what these sequences generated, and the rows that were kept of them. Their slots may be opened again; the
    function returned waits for the rows."""
    at = to_device(np.array([a.slot for a in ended]), state.count.device)
    generated = generated_so_far(state, at)
    codes = stop.finish_codes(state.stop_state[at]).tolist() if stop else [0] * len(ended)
    replies = [generated[i, : a.count] for i, a in enumerate(ended)]
    collected = tap.collect(
        [a.kept for a in ended], [(a.request.id, reply) for a, reply in zip(ended, replies, strict=True)]
    )
    told: Sequence[NextTokens | None] = [None] * len(ended)
    if following.asked:  # what it keeps lies in the slots
        kept = collected()
        told = following.collect([a.slot for a in ended], [positions for positions, _ in kept])
        collected = lambda: kept  # noqa: E731

    def complete() -> list[Completion]:
        return [
            Completion(
                request=a.request,
                generated=replies[i],
                finish=Finish(codes[i]) if a.request.max_new_tokens else Finish.GIVEN,
                positions=positions,
                rows=rows,
                next_tokens=told[i],
            )
            for i, (a, (positions, rows)) in enumerate(zip(ended, collected(), strict=True))
        ]

    return complete
