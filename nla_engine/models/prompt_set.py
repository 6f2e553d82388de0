"""Encoded prompts, with the user's own records kept untouched beside them.

Ids and records lie in flat buffers: in memory or, past a limit, in a temporary file.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import overload

import numpy as np

from nla_engine.errors import WriteError

#: Bytes of ids, and of records, that stay in memory.
SPOOL_BYTES = 64 << 20
#: Prompts whose ids are read at once.
BLOCK = 4096


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt. token_ids: int32 [t], what the model reads; source: the user's record as UTF-8 JSON."""

    token_ids: np.ndarray
    source: bytes


class PromptSet(Sequence[Prompt]):
    """Every usable prompt of a file, in file order, and why the others were skipped.

    A prompt is a document, or a window of one: the windows of a document follow each other. Documents are counted from
    0, without those that were skipped.

    skipped: one line per record that was left out; notes: lines with what else the user should know
    clock: the time that the chat template was given, None if it did not ask for one (local, without a zone)
    One thread at a time may read it.
    """

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.clock: datetime | None = None
        self._ids, self._sources = _Spool(), _Spool()
        self._digest = hashlib.sha256()
        self._document = array("q")
        self._first = np.zeros(0, np.int32)
        self._shortest = self._common = 0

    def messages(self) -> list[str]:
        """What a user should know before the run."""
        return [*(f"skipped: {why}" for why in self.skipped), *self.notes]

    def add(self, ids: np.ndarray, source: bytes, *, same_document: bool = False) -> None:
        """The next prompt. ids: int32 [t], at least one; same_document: it is a window of the one before."""
        self._document.append(self.documents - same_document)
        if len(self):
            self._shortest = min(self._shortest, len(ids))
            size = min(self._common, len(ids))
            differs = np.flatnonzero(self._first[:size] != ids[:size])
            self._common = int(differs[0]) if len(differs) else size
        else:
            self._first, self._shortest, self._common = ids, len(ids), len(ids)
        self._digest.update(np.asarray((len(ids), len(source)), np.int64).tobytes())
        self._digest.update(ids.astype(np.int64).tobytes() + source)
        self._ids.append(ids.astype(np.int32, copy=False).tobytes())
        self._sources.append(source)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Prompt(self.token_ids(index), self._sources.read(index))

    def token_ids(self, index: int) -> np.ndarray:
        """int32 [t]: the ids of one prompt."""
        return np.frombuffer(self._ids.read(index), np.int32)

    @property
    def documents(self) -> int:
        """How many documents the prompts are of."""
        return self._document[-1] + 1 if self._document else 0

    def document(self, index: int) -> int:
        """The number of the document that a prompt is of."""
        return self._document[index]

    def owners(self) -> np.ndarray:
        """int64 [n]: the number of the document that each prompt is of."""
        return np.array(self._document, np.int64)

    def of_document(self, number: int) -> range:
        """The prompts of one document."""
        return range(bisect_left(self._document, number), bisect_right(self._document, number))

    def part(self, indices: Iterable[int]) -> PromptSet:
        """These prompts by themselves, ascending, with documents counted from 0 again."""
        out = PromptSet()
        out.clock = self.clock
        before = -1
        for index in indices:
            follows = before >= 0 and self._document[index] == self._document[before]
            out.add(self.token_ids(index), self._sources.read(index), same_document=follows)
            before = index
        return out

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids of all prompts, some prompts at a time: int32 [t], end to end, and int64 [k], their sizes."""
        sizes = self.sizes
        for first in range(0, len(self), BLOCK):
            last = min(first + BLOCK, len(self))
            yield np.frombuffer(self._ids.read_many(first, last), np.int32), sizes[first:last]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]: how many tokens each prompt has."""
        return self._ids.sizes() // 4

    def fingerprint(self) -> str:
        """sha256 over the token ids and the record of every prompt, in order."""
        return self._digest.hexdigest()[:16]

    def common_prefix(self) -> int:
        """How many leading tokens all prompts share, at most all but the last token of the shortest."""
        return min(self._common, self._shortest - 1) if len(self) > 1 else 0


class _Spool:
    """Pieces of bytes, each written once and read by its number."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115  # closed with the spool
        weakref.finalize(self, self._file.close)
        self._start = array("q", [0])

    def __len__(self) -> int:
        return len(self._start) - 1

    def append(self, piece: bytes) -> None:
        try:
            self._file.seek(self._start[-1])
            self._file.write(piece)
        except OSError as error:
            raise WriteError(
                f"{tempfile.gettempdir()}: the prompts cannot be kept there ({error.strerror}): set TMPDIR to a "
                "directory with more room"
            ) from error
        self._start.append(self._start[-1] + len(piece))

    def read(self, index: int) -> bytes:
        number = range(len(self))[index]
        return self.read_many(number, number + 1)

    def read_many(self, start: int, stop: int) -> bytes:
        """Pieces [start, stop), end to end."""
        self._file.seek(self._start[start])
        return self._file.read(self._start[stop] - self._start[start])

    def sizes(self) -> np.ndarray:
        """int64 [n], in bytes."""
        return np.diff(np.array(self._start, np.int64))
