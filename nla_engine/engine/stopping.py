"""When a sequence ends: an automaton over tokens that finds stop strings across token borders, and EOS ids.

It runs on the device as one table look-up per token: state' = table[state, token].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nla_engine.engine.request import Finish, Request


class StopAutomaton:
    """table: uint8 [states, vocab]; state 0 is the start; `stopped` and `ended` are the two accepting states."""

    def __init__(self, tokens: Sequence[bytes], eos_ids: Sequence[int], stop: Sequence[bytes] = ()) -> None:
        """tokens: the bytes of every id; eos_ids: those outside `tokens` are ignored, as they are never generated.

        stop: strings that end a sequence as soon as its text contains one of them
        """
        prefixes = [b"", *sorted({text[:size] for text in stop for size in range(1, len(text))})]
        self.stopped, self.ended = len(prefixes), len(prefixes) + 1
        if self.ended > 255:
            raise ValueError(
                "the stop strings are too long: together they have more than 253 distinct prefixes"
            )
        table = np.zeros((len(prefixes) + 2, len(tokens)), np.uint8)
        if stop:
            number = {prefix: i for i, prefix in enumerate(prefixes)}
            table[0] = [self._next(token, 0, stop, number) for token in tokens]
            for state, prefix in enumerate(prefixes[1:], 1):
                table[state] = table[0]
                # Only tokens whose first byte continues the prefix can lead to another state than from the start.
                firsts = {bytes([b]) for b in range(256)}
                live = {
                    b
                    for b in firsts
                    if self._next(prefix + b, len(prefix), stop, number) != self._next(b, 0, stop, number)
                }
                for id_, token in enumerate(tokens):
                    if token[:1] in live:
                        table[state, id_] = self._next(prefix + token, len(prefix), stop, number)
            table[1 : len(prefixes), [i for i, token in enumerate(tokens) if not token]] = np.arange(
                1, len(prefixes)
            )[:, None]
        table[:, [id_ for id_ in eos_ids if 0 <= id_ < len(tokens)]] = self.ended
        self.table = torch.from_numpy(table)

    def _next(self, text: bytes, known: int, stop: Sequence[bytes], number: dict[bytes, int]) -> int:
        """The state after `text`, whose first `known` bytes hold no stop string."""
        if len(text) == known:
            return number[text]
        if any(entry in text for entry in stop):
            return self.stopped
        longest = max(len(entry) for entry in stop) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if (state := number.get(text[-size:])) is not None:
                return state
        return 0

    def to(self, device: torch.device) -> StopAutomaton:
        self.table = self.table.to(device)
        return self

    def finish(self, state: int) -> Finish:
        """Of a sequence that ended in this state: LENGTH unless it is an accepting one."""
        return {self.stopped: Finish.STOP, self.ended: Finish.EOS}.get(state, Finish.LENGTH)


def finish_of(request: Request, state: int, stop: StopAutomaton | None) -> Finish:
    """Why the sequence of a request ended, in this state of the automaton that it ran with."""
    return stop.finish(state) if stop is not None and request.max_new_tokens else Finish.GIVEN
