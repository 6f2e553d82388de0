"""Which of the rows in the tap's range are stored: those of each document that tokens, positions and a draw leave.

Chosen on the host once a sequence has ended, before any row leaves the device. A choice depends on the document and the
options alone, never on batches, order or an interruption. Does not know the rows themselves: the tap leaves out sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np

from nla_engine.capture.row_range import RowRange
from nla_engine.config import CaptureOptions
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.tokens import matching_tokens, special_tokens

#: Sets these random numbers apart from others of the same seed.
_DRAW = 0x6472_6177 << 64


class Documents(Protocol):
    """What positions of a prompt depend on. A `PromptSet` is one."""

    def token_ids(self, index: int) -> np.ndarray:
        """int32 [t]: the ids of one prompt."""

    def document(self, index: int) -> int:
        """The number of the document that a prompt is of."""

    def of_document(self, number: int) -> range:
        """The prompts of one document."""


class RowChoice:
    """Chooses rows of the sequences of a run.

    prompts: those of the run; a process that has some of them can choose positions, and not count rows
    keep: the range of the tap; every: of its positions, those that this number divides
    tokens: bool [V], tokens whose rows may be stored; None: all
    """

    def __init__(
        self,
        prompts: Documents,
        keep: RowRange,
        *,
        per_document: int | None = None,
        min_position: int = 0,
        every: int = 1,
        tokens: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.keep, self.every, self.tokens = keep, every, tokens
        self._prompts, self._per_document, self._min_position = prompts, per_document, min_position
        self._seed = seed
        self._held: tuple[int, list[np.ndarray]] = (-1, [])

    @classmethod
    def of(
        cls, options: CaptureOptions, lm: LanguageModel, prompts: Documents, vocabulary: Sequence[bytes]
    ) -> RowChoice:
        """The choice that the options ask for. RequestError if no token is left.

        vocabulary: the bytes of every token
        """
        return cls(
            prompts,
            RowRange.parse(str(options.positions)),
            per_document=options.per_document,
            min_position=max(options.min_position, int(options.skip_first)),
            every=options.every,
            tokens=_tokens(options, lm, vocabulary),
            seed=options.seed,
        )

    @property
    def takes_all(self) -> bool:
        """Whether every row that the tap keeps is stored."""
        whole = self._per_document is None and not self._min_position and self.every == 1
        return whole and self.tokens is None

    def positions(self, number: int, generated: np.ndarray) -> np.ndarray:
        """The positions to store, int64 [n], ascending.

        number: of the prompt; generated: int [t], what follows it in its sequence
        """
        given, document = self._prompts.token_ids(number), self._prompts.document(number)
        tokens, size = np.concatenate([given, generated]), len(given)
        if self._per_document is None:
            return self._eligible(tokens, size)
        windows = self._prompts.of_document(document)
        if len(windows) == 1:
            return self._drawn(document, [tokens], [self._eligible(tokens, size)])[0]
        if self._held[0] != document:
            texts = [self._prompts.token_ids(window) for window in windows]
            found = [self._eligible(ids, len(ids)) for ids in texts]
            self._held = (document, self._drawn(document, texts, found))
        return self._held[1][number - windows.start]

    def _eligible(self, tokens: np.ndarray, prompt_size: int) -> np.ndarray:
        """Positions that may be stored, int64 [n], ascending."""
        first = self.keep.first(prompt_size)
        position = np.arange(first, self.keep.end(prompt_size, len(tokens)))
        return position[self.allows(position, tokens[position])]

    def allows(self, position: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """bool [n]: which of these positions, int [n], may be stored; tokens: int [n], those read there."""
        allowed = (position >= self._min_position) & (position % self.every == 0)
        return allowed if self.tokens is None else allowed & self.tokens[tokens]

    def _drawn(
        self, document: int, texts: Sequence[np.ndarray], eligible: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Of the eligible positions of a document's sequences at most `per_document`, without replacement.

        Every position of the document has a random number of its own; the smallest are taken.
        """
        assert self._per_document is not None
        end = np.cumsum([len(text) for text in texts])
        start = end - [len(text) for text in texts]
        place = np.concatenate([each + begin for each, begin in zip(eligible, start, strict=True)])
        if len(place) > self._per_document:
            random = np.random.Philox(key=_DRAW | self._seed, counter=document << 64).random_raw(int(end[-1]))
            order = np.argsort(random[place], kind="stable")
            place = np.sort(place[order[: self._per_document]])
        border = np.searchsorted(place, [start, end])
        return [place[a:b] - begin for a, b, begin in zip(*border, start, strict=True)]

    def most_rows(self, todo: np.ndarray, new: np.ndarray, share: float = 1.0) -> int:
        """Rows of the prompts with these numbers, int64 [n], sinks among them. new: by how many tokens each prompt of
        the run is continued, int64 [all]

        share: part of the new tokens that `tokens` allows. If 1, an upper bound; exact if nothing is generated
        """
        given, generated = self._counts(new)
        prompts = cast(PromptSet, self._prompts)
        rows = given[todo] + generated[todo] * share
        if self._per_document is not None:
            rows = np.minimum(np.bincount(prompts.owners()[todo], rows), self._per_document)
        return round(float(rows.sum()))

    def _counts(self, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eligible positions of each prompt, and of its `new` tokens (int64 [n]): int64 [n], int64 [n]."""
        prompts = cast(PromptSet, self._prompts)
        sizes = prompts.sizes
        known, which = np.unique(sizes, return_inverse=True)
        begin = np.array([self.keep.first(int(size)) for size in known], np.int64)[which]
        begin = np.maximum(begin, self._min_position)
        end = sizes + (new if self.keep.touches_replies else 0)
        stop = np.minimum(end, sizes)
        given = self._multiples(begin, stop)
        generated = self._multiples(np.maximum(begin, sizes), end)
        if self.tokens is not None:
            done = 0
            for ids, size in prompts.blocks():
                here = slice(done, done + len(size))
                owner = np.repeat(np.arange(len(size)), size)
                position = np.arange(len(ids)) - (np.cumsum(size) - size)[owner]
                inside = (position >= begin[here][owner]) & (position < stop[here][owner])
                inside &= self.allows(position, ids)
                given[here] = np.bincount(owner[inside], minlength=len(size))
                done += len(size)
        return given, generated

    def _multiples(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How many positions of [begin, end) `every` divides, int64 [n]."""
        return np.maximum(-(-end // self.every) + (-begin // self.every), 0)


def _tokens(options: CaptureOptions, lm: LanguageModel, vocabulary: Sequence[bytes]) -> np.ndarray | None:
    """bool [V]: the tokens that --tokens and --skip-special leave; None if neither is given."""
    allowed = None
    if options.tokens is not None:
        allowed = matching_tokens(vocabulary, options.tokens)
        if not allowed.any():
            raise RequestError(f"--tokens {options.tokens!r} matches no token of {lm.name}")
    if options.skip_special:
        ordinary = ~special_tokens(lm.tokenizer, lm.vocab_size)
        allowed = ordinary if allowed is None else allowed & ordinary
        if options.tokens is not None and not allowed.any():
            raise RequestError(
                f"--tokens {options.tokens!r} matches special tokens alone: leave --skip-special out"
            )
    return allowed
