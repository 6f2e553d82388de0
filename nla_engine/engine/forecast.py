"""Which part of a batched generation is done, from lengths alone: replies end when they will, so the rest is estimated.

The lengths of replies are estimated as survival times are (Kaplan and Meier, 1958): those that still run count as
"at least this long". Past the longest that was seen, replies end as often per token as in the half before that. A
decode step costs a fixed part, and the rest in proportion to the sequences in it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

#: What a prompt token costs, where a token of a full decode step costs 1.
_PROMPT_TOKEN = 0.25
#: The part of a full decode step's cost that it has with a single sequence too: the weights are read once.
FIXED_PART = {"cpu": 0.25, "cuda": 0.9}
#: Points at which a long future is looked at.
_POINTS = 256


@dataclass
class Tally:
    """What a generation has done so far. The scheduler keeps it, without asking the device.

    read: prompt tokens; generated: tokens of the sequences that have ended, and `ended`: how many these are
    stopped: how many replies ended by themselves, by their tokens; cut: the same of those that reached their limit
    running: tokens of each running sequence so far
    steps: decode steps; lanes: sequences in them, added up
    stepped_back: how often a sequence lost its keys and values to others; again: tokens that were read again for it
    """

    read: int = 0
    generated: int = 0
    ended: int = 0
    stopped: Counter[int] = field(default_factory=Counter)
    cut: Counter[int] = field(default_factory=Counter)
    running: list[int] = field(default_factory=list)
    steps: int = 0
    lanes: int = 0
    stepped_back: int = 0
    again: int = 0

    def end(self, tokens: int, limit: int) -> None:
        """A sequence has ended with so many generated tokens."""
        self.ended += 1
        self.generated += tokens
        (self.stopped if tokens < limit else self.cut)[tokens] += 1

    @property
    def tokens(self) -> int:
        """Generated, those of running sequences included."""
        return self.generated + sum(self.running)

    def __add__(self, later: Tally) -> Tally:
        """Of one generation and the next, which begins when the first has ended."""
        return Tally(
            read=self.read + later.read,
            generated=self.generated + later.generated,
            ended=self.ended + later.ended,
            stopped=self.stopped + later.stopped,
            cut=self.cut + later.cut,
            running=later.running,
            steps=self.steps + later.steps,
            lanes=self.lanes + later.lanes,
            stepped_back=self.stepped_back + later.stepped_back,
            again=self.again + later.again,
        )


@dataclass(frozen=True)
class Forecast:
    """Of a job of `sequences` with `prompt_tokens` in all, each of at most `limit` new tokens, `slots` at once."""

    sequences: int
    prompt_tokens: int
    limit: int
    slots: int
    device: str = "cpu"

    def part(self, tally: Tally) -> float:
        """The part of the work that is done, 0 to 1."""
        fixed, slots = FIXED_PART[self.device], max(min(self.slots, self.sequences), 1)
        done = fixed * tally.steps + (1 - fixed) * tally.lanes / slots + _PROMPT_TOKEN * tally.read / slots
        left = _PROMPT_TOKEN * max(self.prompt_tokens - tally.read, 0) / slots
        if self.limit:
            left += self._steps_left(tally, fixed, slots)
        return done / (done + left) if done else 0.0

    def survival(self, tally: Tally) -> np.ndarray:
        """float64 [limit + 1]: the probability that a reply has more than so many tokens; 0 at the limit."""
        limit = self.limit
        stopped, others = np.zeros(limit + 1), np.zeros(limit + 1)
        for tokens, count in tally.stopped.items():
            stopped[min(tokens, limit)] += count
        for tokens, count in (*tally.cut.items(), *Counter(tally.running).items()):
            others[min(tokens, limit)] += count
        at_risk = np.cumsum((stopped + others)[::-1])[::-1]
        alive = np.cumprod(1 - stopped / np.maximum(at_risk, 1))
        last = int(np.flatnonzero(at_risk)[-1]) if at_risk.any() else 0
        recent = last // 2
        rate = (stopped[recent:].sum() + 0.5) / (at_risk[recent + 1 :].sum() + 1)
        alive[last:] = alive[max(last - 1, 0)] * np.exp(-rate * np.arange(limit + 1 - last))
        alive[limit] = 0
        return alive

    def _steps_left(self, tally: Tally, fixed: float, slots: int) -> float:
        """The cost of what is left to decode, where a full step costs 1."""
        alive = np.maximum(self.survival(tally), 1e-12)
        waiting = max(self.sequences - tally.ended - len(tally.running), 0)
        ages = np.minimum(
            np.array(tally.running + [0] * min(waiting, slots - len(tally.running))), self.limit
        )
        later = waiting - (len(ages) - len(tally.running))  # enter slots that are not free yet
        cost = later * float(alive.sum()) / slots
        if not len(ages):
            return cost
        ahead = np.unique(np.linspace(0, self.limit, _POINTS).round().astype(np.int64))
        reached = ages[:, None] + ahead[None]
        p = np.where(reached < self.limit, alive[np.minimum(reached, self.limit)], 0) / alive[ages][:, None]
        lanes = p.sum(0)
        step = fixed * (1 - np.exp(-lanes)) + (1 - fixed) * lanes / slots
        # The trapezoidal rule; numpy has a function for it from 2.0 on.
        return cost + float(((step[1:] + step[:-1]) / 2 * np.diff(ahead)).sum())
