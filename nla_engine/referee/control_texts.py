"""The texts that controls compares: of each row its explanations, and texts that know the words and not the vector."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np

from nla_engine.config import ControlsOptions
from nla_engine.config.controls import NO_READER
from nla_engine.referee.partners import drawn_sequences, partners
from nla_engine.referee.quantities import EXPLAINED
from nla_engine.referee.reader import EXAMPLE_CONTEXT, Example, Reader
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.roundtrip.texts import GIVEN, Vectors
from nla_engine.roundtrip.verbalize import Explanation
from nla_engine.store import CaptureStore

#: The column that says which control a text is of, in the table of controls and in tables made of it.
CONTROL = "control"
#: In the metadata of such tables: that they are.
OF_CONTROLS = "of_controls"
#: Names in the column `control`, besides EXPLAINED and, for each k, `last_k`.
READER, OTHER_PLACE, OTHER_TEXT = "reader", "other_place", "other_text"


def of_controls(metadata: Mapping[str, Any]) -> bool:
    """Whether a table is the one of controls, or was made of it."""
    return bool(metadata.get(OF_CONTROLS))


class ControlTexts:
    """The texts of all selected rows: a `Texts`. Every row of `texts` has a direction."""

    unit = "texts"

    def __init__(self, options: ControlsOptions, store: CaptureStore, texts: TextFile) -> None:
        self.options, self.store, self.texts = options, store, texts
        rows = texts.selected
        self.sequence = store.column("sequence")[rows].astype(np.int64)
        self.position = store.column("position")[rows].astype(np.int64)
        token = store.column("token_id")[rows].astype(np.int64)
        how = (self.position, self.sequence, options.seed)
        self._other_place = partners(self.sequence, self.position, *how)
        self._other_text = partners(token, self.sequence, *how)
        counts = np.diff([texts.up_to_row(place) for place in range(len(rows) + 1)])
        fixed = len(options.last_k) + (self.has_reader)
        each = counts + fixed + (self._other_place >= 0) + (self._other_text >= 0)
        self._start = np.concatenate([[0], np.cumsum(each)])
        self.reader: Reader | None = None
        self.examples: list[list[Example]] = [[], []]

    @property
    def has_reader(self) -> bool:
        """Whether a reader is to write."""
        return self.options.reader != NO_READER

    def lengths(self) -> tuple[int, list[str]]:
        """The mean number of words of the explanations, and all of them."""
        every = self.texts.all()
        return max(round(float(np.mean([len(text.split()) for text in every]))), 1), every

    def read_with(self, reader: Reader) -> None:
        """Let this model write, shown as many examples as there is room for, in two sets of other sequences each."""
        self.reader = reader
        drawn = drawn_sequences(
            self.sequence, self.position, 2 * self.options.reader_examples, self.options.seed
        )
        half = len(drawn) // 2
        sets = [
            [self._example(int(place)) for place in part] for part in (drawn[:half], drawn[half : 2 * half])
        ]
        count = min(reader.fitting(examples) for examples in sets)
        self.examples = [examples[:count] for examples in sets]

    def _example(self, place: int) -> Example:
        pieces = self._context(place, min(EXAMPLE_CONTEXT, self.options.reader_context))
        text = self.texts.text(self.texts.up_to_row(place))
        return Example("".join(pieces), text, int(self.sequence[place]))

    def _context(self, place: int, count: int) -> list[str]:
        """The last tokens up to a row's own; characters that span tokens are with the last of them."""
        tokens = self.store.sequence(int(self.sequence[place])).tokens
        end = int(self.position[place]) + 1
        part, vocabulary = tokens[max(end - count, 0) : end], self.store.vocabulary
        whole = vocabulary.join(part)
        pieces = [vocabulary.text(int(token)) for token in part]
        return pieces if "".join(pieces) == whole else list(whole)

    def _last(self, place: int, count: int) -> tuple[str, int]:
        tokens = self.store.sequence(int(self.sequence[place])).tokens
        end = int(self.position[place]) + 1
        part = tokens[max(end - count, 0) : end]
        return self.store.vocabulary.join(part), len(part)

    def _read(self, first: int, count: int) -> Generator[tuple[str, str, int], None, None]:
        """The reader's text of each of these places. Rows of the examples' own sequences are shown the other set."""
        assert self.reader is not None
        reader, places = self.reader, range(first, first + count)
        own = {each.sequence for each in self.examples[0]}
        sets = [int(self.sequence[place] in own) for place in places]

        def prompts(wanted: int) -> Iterator[list[int]]:
            for place, which in zip(places, sets, strict=True):
                if which == wanted:
                    context = self._context(place, self.options.reader_context)
                    yield reader.prompt(context, self.examples[which])

        batch = self.options.batch_size
        with closing(reader.write(lambda: prompts(1), batch)) as written:
            held = iter(list(written))
        with closing(reader.write(lambda: prompts(0), batch)) as written:
            for which in sets:
                yield next(held) if which else next(written)

    def of_rows(
        self, reader: Vectors, rows: np.ndarray, first: int
    ) -> Generator[list[Explanation], None, None]:
        """See `Texts`."""
        texts = self.texts
        own = texts.of_rows(reader, rows, first)
        read = self._read(first, len(rows)) if self.has_reader else iter(())
        for place, explained in enumerate(own, first):
            number = int(self._start[place]) + len(explained)
            out = [
                Explanation(int(self._start[place]) + i, e.text, e.status, 0) for i, e in enumerate(explained)
            ]
            for k in self.options.last_k:
                text, size = self._last(place, k)
                out.append(Explanation(number, text, GIVEN, size))
                number += 1
            if self.has_reader:
                out.append(Explanation(number, *next(iter(read))))
                number += 1
            for others in (self._other_place, self._other_text):
                if others[place] >= 0:
                    out.append(Explanation(number, texts.text(texts.up_to_row(int(others[place]))), GIVEN, 0))
                    number += 1
            yield out

    def columns(self, texts: list[Explanation]) -> dict[str, Any]:
        """See `Texts`; the control and the row that each text was written for, too."""
        out: dict[str, list[Any]] = {name: [] for name in ("sample", "control", "of_row", "n_tokens")}
        for text in texts:
            place = self.rows_of(text.id)
            sample = text.id - int(self._start[place])
            control, of = self._named(place, sample)
            out["sample"].append(sample)
            out["control"].append(control)
            out["of_row"].append(int(self.texts.selected[of]))
            shown = control in (EXPLAINED, OTHER_PLACE, OTHER_TEXT)
            at = self.texts.up_to_row(of) + (sample if control == EXPLAINED else 0)
            out["n_tokens"].append(self.texts.tokens(at) if shown else text.n_tokens)
        return out | {"explanation": [e.text for e in texts], "status": [e.status for e in texts]}

    def _named(self, place: int, sample: int) -> tuple[str, int]:
        """The name of a row's text by its number, and the place of the row that it was written for."""
        sample -= self.texts.up_to_row(place + 1) - self.texts.up_to_row(place)
        if sample < 0:
            return EXPLAINED, place
        names = [(f"last_{k}", place) for k in self.options.last_k]
        names += [(READER, place)] if self.has_reader else []
        others = ((OTHER_PLACE, self._other_place), (OTHER_TEXT, self._other_text))
        names += [(name, int(found[place])) for name, found in others if found[place] >= 0]
        return names[sample]

    def up_to_row(self, rows: int) -> int:
        """See `Texts`."""
        return int(self._start[rows])

    def rows_of(self, texts: int) -> int:
        """See `Texts`."""
        return int(np.searchsorted(self._start, texts, side="right")) - 1

    def each(self, rows: int) -> str:
        """See `Texts`."""
        return f"{self.up_to_row(rows):,} texts with their controls"
