"""Which of the rows that the tap keeps are stored: those of each document that a draw, a first position and the kind
of token leave.

Chosen on the host when a sequence has ended. A choice depends on the document and the options alone, never on batches,
order or an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nla_engine.capture.tap import RowRange
from nla_engine.config import CaptureOptions
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.tokens import special_tokens

#: Sets these random numbers apart from others of the same seed.
_DRAW = 0x6472_6177 << 64


class RowChoice:
    """Chooses rows of the sequences of a run.

    keep: the rows that the tap keeps; special: bool [V], tokens whose rows are left out; None: no token
    """

    def __init__(
        self,
        prompts: PromptSet,
        keep: RowRange,
        *,
        per_document: int | None = None,
        min_position: int = 0,
        special: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.keep, self.special = keep, special
        self._prompts, self._per_document, self._min_position = prompts, per_document, min_position
        self._seed = seed
        self._held: tuple[int, list[np.ndarray]] = (-1, [])

    @classmethod
    def of(cls, options: CaptureOptions, lm: LanguageModel, prompts: PromptSet) -> RowChoice:
        """The choice that the options ask for."""
        return cls(
            prompts,
            RowRange.parse(str(options.positions)),
            per_document=options.per_document,
            min_position=options.min_position,
            special=special_tokens(lm.tokenizer, lm.vocab_size) if options.skip_special else None,
            seed=options.seed,
        )

    @property
    def takes_all(self) -> bool:
        """Whether every row that the tap keeps is stored."""
        return self._per_document is None and not self._min_position and self.special is None

    def positions(self, number: int, tokens: np.ndarray) -> np.ndarray:
        """The positions to store, int64 [n], ascending.

        number: of the prompt; tokens: int [t], all of its sequence
        """
        size, document = len(self._prompts.token_ids(number)), self._prompts.document(number)
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
        first = max(self.keep.first(prompt_size), self._min_position)
        position = np.arange(first, self.keep.end(prompt_size, len(tokens)))
        return position if self.special is None else position[~self.special[tokens[position]]]

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

    def most_rows(self, first: int, new: int, special_share: float = 0.0) -> int:
        """Rows of the prompts from number `first` on, each continued by `new` tokens.

        special_share: part of the new tokens that are special. If 0, an upper bound; exact if nothing is generated
        """
        given, generated = self._counts(first, new)
        rows = given + generated * (1 - special_share if self.special is not None else 1.0)
        if self._per_document is not None and len(rows):
            owner = self._prompts.owners()[first:]
            rows = np.minimum(np.bincount(owner - owner[0], rows), self._per_document)
        return round(float(rows.sum()))

    def _counts(self, first: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        """Eligible positions of each prompt from `first` on, and of its `new` tokens: int64 [n], int64 [n]."""
        sizes = self._prompts.sizes[first:]
        known, which = np.unique(sizes, return_inverse=True)
        begin = np.array([self.keep.first(int(size)) for size in known], np.int64)[which]
        begin = np.maximum(begin, self._min_position)
        end = np.array([self.keep.end(int(size), int(size) + new) for size in known], np.int64)[which]
        stop = np.minimum(end, sizes)
        given = np.maximum(stop - begin, 0)
        generated = np.maximum(end - np.maximum(begin, sizes), 0)
        if self.special is not None:
            done = 0
            for ids, size in self._prompts.blocks(first):
                here = slice(done, done + len(size))
                owner = np.repeat(np.arange(len(size)), size)
                position = np.arange(len(ids)) - (np.cumsum(size) - size)[owner]
                inside = (position >= begin[here][owner]) & (position < stop[here][owner])
                given[here] -= np.bincount(owner[inside & self.special[ids]], minlength=len(size))
                done += len(size)
        return given, generated
