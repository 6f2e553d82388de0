"""How good a pair is on held-out rows: FVE of what the AV writes greedily and of the given texts, beside a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nla_engine.roundtrip.rows import spread
from nla_engine.roundtrip.score import Controls, DirectionVariance, cosine
from nla_engine.train.data import Rows
from nla_engine.train.pair import TrainedAR
from nla_engine.train.rollouts import Rollouts, Written

_SHOWN = 3


@dataclass(frozen=True)
class Measured:
    """fve_nrm, cos and cos_shuffled: of the AV's greedy texts, None if it wrote none; fve_given: of the given texts

    closed: part of the texts that end with their tag; tokens: of a text, on average; variance: Var of all held-out rows
    """

    rows: int
    variance: float
    fve_given: float
    fve_nrm: float | None = None
    cos: float | None = None
    cos_shuffled: float | None = None
    closed: float | None = None
    tokens: float | None = None
    samples: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}

    def line(self) -> str:
        """For people."""
        if self.fve_nrm is None:
            return f"FVE {self.fve_given:.3f} of the given texts, on {self.rows} held-out rows"
        return (
            f"FVE {self.fve_nrm:.3f} of the AV's texts, {self.fve_given:.3f} of the given ones, {self.closed:.1%} "
            f"closed, {self.tokens:.0f} tokens, on {self.rows} held-out rows"
        )


class Measure:
    """Held-out rows that are measured again and again: the same ones, evenly spread. most: of them"""

    def __init__(self, held_out: Rows, most: int, seed: int) -> None:
        variance = DirectionVariance()
        variance.add(held_out.vectors)
        self.variance = variance.value
        count = min(most, len(held_out))
        self.rows = held_out.only(spread(len(held_out), count))
        self._controls = Controls.of(self.rows.sequence, self.rows.position, self.rows.vectors, seed)

    def __call__(self, ar: TrainedAR, rollouts: Rollouts | None) -> Measured:
        """rollouts: None leaves the AV out"""
        rows = self.rows
        given = self._fve(cosine(rows.vectors, read_back(ar, rows.texts)))
        if rollouts is None:
            return Measured(len(rows), _short(self.variance), given)
        rollouts.update()
        written = rollouts.write(rows.vectors, samples=1, temperature=0.0)
        read = read_back(ar, [each.text for each in written])
        cos = cosine(rows.vectors, read)
        shuffled = self._controls.shuffled(rows.sequence, rows.position, read)
        return Measured(
            len(rows),
            _short(self.variance),
            given,
            fve_nrm=self._fve(cos),
            cos=_short(cos.mean()),
            cos_shuffled=_short(shuffled.mean()),
            closed=_short(np.mean([each.status == "ok" for each in written])),
            tokens=_short(np.mean([len(each.ids) for each in written])),
            samples=self._samples(written),
        )

    def _fve(self, cos: np.ndarray) -> float:
        """FVE as the roundtrip has it: rows that could not be read back count as 0."""
        return _short(1 - 2 * (1 - np.nan_to_num(cos)).mean() / self.variance)

    def _samples(self, written: Sequence[Written]) -> tuple[str, ...]:
        return tuple(
            written[place].text for place in spread(len(written), min(_SHOWN, len(written))).tolist()
        )


@torch.no_grad()
def read_back(ar: TrainedAR, texts: Sequence[str], at_once: int = 64) -> torch.Tensor:
    """The AR's vector of each text, float32 [n, d] on the host."""
    parts = [ar.reconstruct(texts[start : start + at_once]) for start in range(0, len(texts), at_once)]
    return torch.cat(parts).float().cpu()


def _short(value: Any) -> float:
    return round(float(value), 4)
