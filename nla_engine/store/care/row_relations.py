"""How the arrays of rows must agree with those of their sequences, looked at some sequences at a time.

Temporary arrays as long as all rows would take several times the memory of the store's own columns, and more time per
row than those of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nla_engine.store.format import EARLY_POSITIONS, NO_TOKEN, RowFlag
from nla_engine.store.records import wrong_logprobs

#: Rows of sequences that are looked at together; more if one sequence has more.
BLOCK_ROWS = 1 << 17
_POSITIONS = "positions ascend within their sequence"
_KNOWN = RowFlag.GENERATED | RowFlag.PROMPT_END | RowFlag.SEQUENCE_END | RowFlag.EARLY


@dataclass
class Relation:
    """How often a relation fails. first: the first row where it does, counted from 0; checked: rows looked at."""

    name: str
    wrong: int = 0
    first: int = 0
    checked: int = 0

    def add(self, wrong: np.ndarray) -> None:
        """The rows that follow: where it fails, bool [n]."""
        count = int(np.count_nonzero(wrong))
        if count and not self.wrong:
            self.first = self.checked + int(np.argmax(wrong))
        self.wrong += count
        self.checked += len(wrong)


def row_relations(values: Mapping[str, np.ndarray], number: np.ndarray) -> list[Relation]:
    """Every relation of the rows. If positions fail, nothing is said of what is found by them.

    values: the arrays of rows/ and sequences/ by path; the rows and tokens of sequences lie end to end
    number: of each sequence, int64 [sequences]
    """
    found: dict[str, Relation] = {}
    for first, last in _blocks(values["sequences/row_size"]):
        for name, wrong in _of_sequences(values, number, first, last):
            found.setdefault(name, Relation(name)).add(wrong)
    if _POSITIONS in found and found[_POSITIONS].wrong:
        return list(found.values())[: list(found).index(_POSITIONS) + 1]
    return list(found.values())


def _blocks(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Sequences [first, last) with together BLOCK_ROWS rows at most, or one. An empty block if there are none.

    sizes: rows of each, int64 [sequences]
    """
    ends, first = np.cumsum(sizes), 0
    while True:
        before = int(ends[first - 1]) if first else 0
        last = min(max(int(np.searchsorted(ends, before + BLOCK_ROWS, "right")), first + 1), len(ends))
        yield first, last
        if (first := last) == len(ends):
            return


def _of_sequences(
    values: Mapping[str, np.ndarray], number: np.ndarray, first: int, last: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Each relation of the rows of sequences [first, last) as stored: its name, and where it fails, bool [rows]."""

    def each(name: str) -> np.ndarray:
        return values[f"sequences/{name}"][first:last]

    sizes, token_sizes = each("row_size"), each("token_size")
    row, token = (int(each(name)[0]) if last > first else 0 for name in ("row_start", "token_start"))
    rows = {
        path.removeprefix("rows/"): array[row : row + int(sizes.sum())]
        for path, array in values.items()
        if path.startswith("rows/")
    }
    owner = np.repeat(np.arange(last - first), sizes)
    yield "rows carry the number of their sequence", rows["sequence"] != number[first:last][owner]
    position, size = rows["position"].astype(np.int64), token_sizes[owner]
    outside = (position < 0) | (position >= size)
    same = np.diff(owner, prepend=-1) == 0
    outside |= same & (np.diff(position, prepend=0) <= 0)
    yield _POSITIONS, outside
    if outside.any():
        return
    tokens = values["sequences/tokens"][token : token + int(token_sizes.sum())]
    tokens = np.append(tokens, np.int32(NO_TOKEN))
    place = (each("token_start") - token)[owner] + position
    yield "token_id is the token at the position", rows["token_id"] != tokens[place]
    final = position == size - 1
    following = np.where(final, NO_TOKEN, tokens[place + 1])
    yield "next_token_id is the token after it", rows["next_token_id"] != following
    if "next_logprob" in rows:
        wrong = wrong_logprobs(rows["next_logprob"], rows["next_token_id"])
        yield "next_logprob is a log-probability where a token follows", wrong
    prompt = each("prompt_size")[owner]
    expected = (position >= prompt) * RowFlag.GENERATED + (position == prompt - 1) * RowFlag.PROMPT_END
    expected += final * RowFlag.SEQUENCE_END + (position < EARLY_POSITIONS) * RowFlag.EARLY
    yield "flags fit the positions", rows["flags"] & _KNOWN != expected
