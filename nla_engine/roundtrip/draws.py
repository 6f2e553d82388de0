"""What selects the random numbers of a text: its row's sequence and position, and which of the row's texts it is.

Where a row lies in the store has no part in it, nor which other rows are explained, nor how many texts a row gets.
"""

from __future__ import annotations

import numpy as np

#: Between two samples of a row. Odd and large, so that hardly ever another row's number is there.
_SAMPLE = 0x1E3779B97F4A7C15
#: Between two prompts about one row.
_TURN = 0x2545F4914F6CDD1D
_MASK = (1 << 63) - 1


def of_rows(sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
    """int64 [n], not negative: for the number of each row's sequence, and its position there."""
    return (sequence.astype(np.int64) << 32 | position.astype(np.int64)) & _MASK


def of_sample(draw: int, sample: int) -> int:
    """For text number `sample` of a row. The first one has the row's own."""
    return (draw + sample * _SAMPLE) & _MASK


def of_turn(draw: int, turn: int) -> int:
    """For prompt number `turn` about a row. The first one has the row's own."""
    return (draw + turn * _TURN) & _MASK
