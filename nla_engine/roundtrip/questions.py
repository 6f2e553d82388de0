"""What is asked about a store: prompts, each with one or several rows and a question."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.config import AskOptions
from nla_engine.config.ask import question_fault
from nla_engine.errors import PromptError, RequestError
from nla_engine.models.prompt_files import read_records
from nla_engine.roundtrip.draws import of_turn
from nla_engine.roundtrip.rows import draws_of, nothing_selected, spread
from nla_engine.store import CaptureStore

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Questions:
    """P prompts about G groups of rows, by sequence and position of the group's first row.

    rows: int64 [R]; start: int64 [G + 1], group g is rows[start[g]:start[g + 1]] in the order of its vectors
    texts: the questions; group, question: int64 [P], those of each prompt
    """

    rows: np.ndarray
    start: np.ndarray
    texts: tuple[str, ...]
    group: np.ndarray
    question: np.ndarray

    def __len__(self) -> int:
        return len(self.group)

    @classmethod
    def of(cls, store: CaptureStore, options: AskOptions) -> Questions:
        """Those that the options ask for. RequestError and StoreError say what is wrong with them."""
        if options.questions is not None:
            return cls.read(options.questions, store)
        rows = store.in_order(np.arange(store.rows) if options.where is None else store.where(options.where))
        if not len(rows):
            raise nothing_selected(options)
        rows, start = grouped(rows, store.column("sequence")[rows], options.rows_per_prompt)
        if options.limit is not None and options.limit < len(start) - 1:
            kept = spread(len(start) - 1, options.limit)
            rows = np.concatenate([rows[start[g] : start[g + 1]] for g in kept.tolist()])
            start = np.append(0, np.cumsum(np.diff(start)[kept]))
        groups, asked = np.arange(len(start) - 1), np.arange(len(options.question))
        return cls(
            rows,
            start,
            options.question,
            np.repeat(groups, len(asked)),
            np.tile(asked, len(groups)),
        )

    @classmethod
    def read(cls, path: Path, store: CaptureStore) -> Questions:
        """Those of a file, JSON lines or Parquet: one prompt per record. RequestError says what is wrong, and where."""
        if path.suffix.lower() not in SUFFIXES:
            raise RequestError(f"{path}: questions are read from {' and '.join(SUFFIXES)} alone: convert it")
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "no such file"
            raise RequestError(f"{path}: {what}: give a file of questions")
        numbers: dict[str, int] = {}
        groups: list[list[int]] = []
        asked: list[int] = []
        for place, record in read_records(path):
            try:
                text, rows = _read(record, store)
            except PromptError as error:
                raise RequestError(f"{path}, {place}: {error}") from error
            groups.append(rows)
            asked.append(numbers.setdefault(text, len(numbers)))
        if not groups:
            raise RequestError(f"{path}: holds no questions: there is nothing to ask")
        first = np.array([rows[0] for rows in groups])
        order = np.lexsort((store.column("position")[first], store.column("sequence")[first]))
        sizes = [len(groups[i]) for i in order]
        return cls(
            np.array([row for i in order for row in groups[i]], np.int64),
            np.append(0, np.cumsum(sizes)),
            tuple(numbers),
            np.arange(len(order)),
            np.array(asked, np.int64)[order],
        )

    def rows_of(self, prompt: int) -> np.ndarray:
        """int64 [n]: the rows whose vectors enter this prompt."""
        group = self.group[prompt]
        return self.rows[self.start[group] : self.start[group + 1]]

    def draws(self, store: CaptureStore) -> np.ndarray:
        """int64 [P]: what names the random numbers of each prompt's answers."""
        first = self.rows[self.start[self.group]]
        new = np.flatnonzero(np.diff(first, prepend=-1))
        turn = np.arange(len(self)) - np.repeat(new, np.diff(np.append(new, len(self))))
        pairs = zip(draws_of(store, first).tolist(), turn.tolist(), strict=True)
        return np.array([of_turn(draw, each) for draw, each in pairs], np.int64)

    def question_of(self, prompt: int) -> str:
        """The question of this prompt."""
        return self.texts[self.question[prompt]]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [P]: the number of rows of each prompt."""
        return np.diff(self.start)[self.group]

    def kinds(self) -> Iterator[tuple[str, int]]:
        """Each pair of a question and a number of rows that occurs, once, in an order that only they decide."""
        for question, size in np.unique(np.stack([self.question, self.sizes], 1), axis=0).tolist():
            yield self.texts[question], size

    def fingerprint(self) -> str:
        """Of all prompts in their order."""
        digest = hashlib.sha256()
        for part in (self.rows, self.start, self.group, self.question):
            digest.update(np.ascontiguousarray(part, np.int64).tobytes())
        digest.update(repr(self.texts).encode())
        return digest.hexdigest()[:16]


def grouped(rows: np.ndarray, sequence: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in groups of at most `size` of one sequence, in their order: (rows, start int64 [G + 1]).

    rows: int64 [R], by sequence and position; sequence: of each
    """
    changes = np.flatnonzero(np.append(True, np.diff(sequence) != 0))
    within = np.arange(len(rows)) - np.repeat(changes, np.diff(np.append(changes, len(rows))))
    return rows, np.append(np.flatnonzero(within % size == 0), len(rows))


def _read(record: Any, store: CaptureStore) -> tuple[str, list[int]]:
    """Question and rows of a record. PromptError, worded to follow its place."""
    if isinstance(record, PromptError):
        raise record
    if not isinstance(record, dict):
        raise PromptError("is not an object: write one per line, with question and row or rows")
    if "question" not in record:
        raise PromptError("has no field question")
    text = record["question"]
    if not isinstance(text, str):
        raise PromptError(f"question is {_short(text)}: it must be a string")
    if fault := question_fault(text):
        raise PromptError(f"question {fault}")
    if ("row" in record) == ("rows" in record):
        raise PromptError("needs row or rows, one of the two")
    rows: Sequence[Any] = [record["row"]] if "row" in record else record["rows"]
    if not isinstance(rows, list) or not rows:
        raise PromptError(f"rows is {_short(rows)}: it must be a list of row numbers, at least one")
    for row in rows:
        if type(row) is not int:
            raise PromptError(f"row {_short(row)} is not an integer")
        if not 0 <= row < store.rows:
            raise PromptError(f"row {row} is not in {store.path}, which has rows 0 to {store.rows - 1}")
    if len(set(rows)) < len(rows):
        twice = next(row for row in rows if rows.count(row) > 1)
        raise PromptError(f"row {twice} stands twice in one prompt: leave one out")
    return text, rows


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
