"""What the page shows, as plain columns: the explained rows of a store, the text around them, their explanations."""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_engine.errors import RequestError
from nla_engine.referee.added import CONTROLS
from nla_engine.roundtrip.results import ANSWERS, PARTS_SUFFIX, SCHEMA, ranked_among, read_metadata
from nla_engine.roundtrip.score import fve_nrm, mse_nrm
from nla_engine.sites import Site
from nla_engine.store import CaptureStore, StoredSequence
from nla_engine.store.format import EARLY_POSITIONS, IMPORTED

#: Classes of tokens in the order in which the page lists them.
TOKEN_CLASSES = ("digits", "word", "part of a word", "punctuation", "space", "line break", "special", "other")
#: Longest text of a prompt record's field on the page, and the most fields.
FIELD_CHARACTERS, FIELDS = 200, 40
#: Larger integers lose digits in a browser, where numbers are float64.
LARGEST_EXACT = (1 << 53) - 1
#: Beginning of the names of the pairs whose training left the first EARLY_POSITIONS positions out.
RELEASED = "kitft/nla-"
#: Most rows of a prompt that are listed by number.
LISTED_ROWS = 12
#: Fields of a prompt record that the text of the sequence already shows.
SHOWN_AS_TEXT = ("prompt", "messages", "text")

_SPECIAL = re.compile(r"<\|.*\|>|</?[A-Za-z_]+>|\[[A-Z]+\]", re.DOTALL)


@dataclass(frozen=True)
class Explained:
    """The table of a round trip, of a half of it, or of ask: R explained rows, E explanations, those of a row together.

    rows: int64 [R], those of a sequence together and ascending, sequences by number
    start: int64 [R + 1], explanations of row i are start[i]:start[i + 1]
    columns: the table's columns as arrays [E]; scores and n_tokens are float64, NaN where there is none. An answer of
    an oracle is an explanation of the first row in its prompt; it also has question, rows and sample.
    """

    metadata: dict[str, Any]
    rows: np.ndarray
    start: np.ndarray
    columns: dict[str, np.ndarray]

    @property
    def site(self) -> Site:
        """What was read of the store."""
        return Site.parse(self.metadata["layer"])

    @classmethod
    def read(cls, store: CaptureStore, path: Path) -> Explained:
        """Raises RequestError when `path` is not the result of a round trip on this store."""
        if not path.exists():
            begun = path.with_name(path.name + PARTS_SUFFIX).exists()
            mend = (
                "its command with --resume finishes it"
                if begun
                else "give the table that roundtrip, explain, score or ask wrote"
            )
            raise RequestError(f"{path}: no such file: {mend}")
        metadata = read_metadata(path)
        if not {"explanation", "answer"} & set(pq.read_schema(path).names):
            raise RequestError(
                f"{path}: has no explanations: give the table that roundtrip, explain, score or ask wrote"
            )
        if metadata.get("options", {}).get("store") != store.attributes["store_id"]:
            raise RequestError(f"{path}: explains another store than {store.path}: give the two of one run")
        if metadata.get("made_by") == CONTROLS:
            raise RequestError(
                f"{path}: is the table of controls: give it with --also, and the explanations that it was made of"
            )
        if (made_by := metadata.get("made_by")) is not None:
            raise RequestError(
                f"{path}: is the table of {made_by}, which the page does not show: give the table that it was made of"
            )
        if metadata["run"].get("prefixes"):
            raise RequestError(
                f"{path}: holds the beginnings of texts (score --prefixes), which no page shows: score them without it"
            )
        asked = "oracle" in metadata
        names = ["row", "best", "explanation", "status", "n_tokens", "cos", "cos_shuffled", "retrieval_rank"]
        try:
            if asked:
                table = _as_explanations(pq.read_table(path, schema=ANSWERS))
                names += ["question", "rows", "sample"]
            else:
                table = pq.read_table(path, schema=SCHEMA, columns=names)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RequestError(f"{path}: is damaged ({error}): make it again") from error
        columns = {name: table.column(name).to_numpy() for name in names}
        for name in ("n_tokens", "cos", "cos_shuffled", "retrieval_rank"):
            columns[name] = columns[name].astype(np.float64)
        columns["best"] = columns["best"].astype(bool)  # null without scores
        row = columns["row"]
        if not len(row) or row.min() < 0 or row.max() >= store.rows:
            raise RequestError(f"{path}: its rows are not those of {store.path}: make it again")
        return cls.of(store, metadata, columns)

    @classmethod
    def of(cls, store: CaptureStore, metadata: dict[str, Any], columns: dict[str, np.ndarray]) -> Explained:
        """The same from columns in any order: here they are by sequence and position, those of a row in their order."""
        sequence, position = (store.column(name)[columns["row"]] for name in ("sequence", "position"))
        order = np.lexsort((position, sequence))
        columns = {name: values[order] for name, values in columns.items()}
        first = np.flatnonzero(np.diff(columns["row"], prepend=-1))
        return cls(metadata, columns["row"][first], np.append(first, len(order)), columns)

    @property
    def explanations(self) -> int:
        return len(self.columns["row"])

    @property
    def asked(self) -> bool:
        """Whether the texts are answers to questions."""
        return "oracle" in self.metadata

    @property
    def noun(self) -> str:
        """What a text is called."""
        return "answer" if self.asked else "explanation"

    @property
    def scored(self) -> bool:
        """Whether an AR read the texts."""
        return "variance" in self.metadata

    @property
    def written_by(self) -> dict[str, Any] | None:
        """The options of the run whose AV or oracle wrote the texts; None if they come from elsewhere."""
        run: dict[str, Any] = self.metadata["run"]
        return self.metadata.get("explained") or (run if "max_new_tokens" in run else None)

    @property
    def trained_from(self) -> int | None:
        """The first position that all models of this table were trained on; None if one does not say it."""
        names = {
            role: str(self.metadata[role]) for role in ("av", "ar") if self.metadata.get(role) is not None
        }
        known: list[int] = []
        for role, name in names.items():
            if (stated := self.metadata.get(f"{role}_min_position")) is not None:
                known.append(int(stated))
            elif name.startswith(RELEASED):
                known.append(EARLY_POSITIONS)
        return max(known) if known and len(known) == len(names) else None

    @property
    def early_before(self) -> int:
        """Rows before this position are early: `trained_from`, or that of released pairs where it is not known."""
        return EARLY_POSITIONS if self.trained_from is None else self.trained_from

    @property
    def ranked_among(self) -> int:
        """Among how many vectors a rank is; 0 without scores."""
        return ranked_among(self.metadata) if self.scored else 0

    @property
    def variance(self) -> float:
        """Var, which scales FVE; NaN without scores."""
        return float(self.metadata.get("variance", math.nan))

    @property
    def fve(self) -> np.ndarray:
        """float64 [E]: fve_nrm of every explanation."""
        return fve_nrm(mse_nrm(self.columns["cos"]), self.variance)

    @property
    def fve_shuffled(self) -> np.ndarray:
        """float64 [E]: fve_nrm of the shuffled control, against the vector of another row."""
        return fve_nrm(mse_nrm(self.columns["cos_shuffled"]), self.variance)


def positions_known(store: CaptureStore) -> bool:
    """False for vectors of another tool that came without positions."""
    return IMPORTED not in store.options or bool(store.column("position").any())


def page_data(store: CaptureStore, explained: Explained) -> dict[str, Any]:
    """The page's data, ready for JSON: columns of rows, explanations and sequences, and the texts of tokens."""
    names = _Names()
    columns = explained.columns
    position = store.column("position")[explained.rows]
    sequence = store.column("sequence")[explained.rows]
    numbers, first = np.unique(sequence, return_index=True)
    bounds = [*first.tolist(), len(sequence)]
    tokens, following, classes, gaps, records, finish = [], [], [], [], [], []
    for sequences, begin, end in zip(store.some_sequences(numbers), bounds[:-1], bounds[1:], strict=True):
        texts = token_pieces(sequences)
        places = position[begin:end].tolist()
        tokens += [names.number(texts[place]) for place in places]
        following += [names.number(texts[place + 1]) if place + 1 < len(texts) else None for place in places]
        classes += [TOKEN_CLASSES.index(token_class(texts[place])) for place in places]
        gaps.append(_gaps(texts, places, sequences.prompt_size))
        records.append(dict(_fields(sequences.source)))
        finish.append(int(sequences.finish))
    return {
        "scored": explained.scored,
        "asked": explained.asked,
        "samples": explained.metadata["run"].get("samples"),
        "variance": explained.variance if math.isfinite(explained.variance) else None,
        "control_vectors": explained.ranked_among,
        "rows_in_store": store.rows,
        "early": {
            "below": explained.early_before if positions_known(store) else 0,
            "known": explained.trained_from is not None,
        },
        "classes": TOKEN_CLASSES,
        "texts": names.texts,
        "sequences": {
            "number": numbers.tolist(),
            "first": bounds,
            "finish": finish,
            "gaps": gaps,
            "fields": _columns_of(records),
        },
        "rows": {
            "row": explained.rows.tolist(),
            "position": position.tolist(),
            "token": tokens,
            "next": following,
            "class": classes,
            "flags": store.column("flags")[explained.rows].tolist(),
            "norm": _numbers(store.layer(explained.site).norm()[explained.rows], 5),
            "first": explained.start.tolist(),
        },
        "explanations": {
            "text": columns["explanation"].tolist(),
            "status": columns["status"].tolist(),
            "tokens": _numbers(columns["n_tokens"], 12),
            "best": np.flatnonzero(columns["best"]).tolist(),
            "cos": _numbers(columns["cos"], 5),
            "cos_shuffled": _numbers(columns["cos_shuffled"], 5),
            "rank": _numbers(columns["retrieval_rank"], 12),
            **(_asked(store, columns) if explained.asked else {}),
        },
    }


def _as_explanations(answers: pa.Table) -> pa.Table:
    """The table of ask with the columns of one without scores."""
    table = answers.rename_columns(["explanation" if n == "answer" else n for n in answers.column_names])
    for name in ("best", "cos", "cos_shuffled", "retrieval_rank"):
        table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    return table


def _asked(store: CaptureStore, columns: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """Of each answer: its question, its sample, and in words the rows of its prompt if there are several."""
    position, sequence = store.column("position"), store.column("sequence")
    about = []
    for rows in columns["rows"]:
        if len(rows) == 1:
            about.append("")
        elif np.all(np.diff(rows) > 0) and sequence[rows[0]] == sequence[rows[-1]]:
            about.append(f"{len(rows)} rows, positions {position[rows[0]]} to {position[rows[-1]]}")
        else:
            more = f" and {len(rows) - LISTED_ROWS} more" if len(rows) > LISTED_ROWS else ""
            about.append(f"rows {', '.join(map(str, rows[:LISTED_ROWS]))}{more}")
    return {
        "question": columns["question"].tolist(),
        "sample": columns["sample"].tolist(),
        "about": about,
    }


def token_pieces(sequence: StoredSequence) -> list[str]:
    """The text of each token; joined, they are the sequence's text.

    A character that spans several tokens belongs to the last of them; the others are empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    raw = [sequence.vocabulary.raw(int(token)) for token in sequence.tokens]
    return [decoder.decode(part, final=i == len(raw) - 1) for i, part in enumerate(raw)]


def token_class(text: str) -> str:
    """One of TOKEN_CLASSES. A word starts with a space or a capital, a part of a word with neither."""
    bare = text.strip()
    if not bare:
        return "line break" if "\n" in text else "space" if text else "other"
    if bare.isdecimal():
        return "digits"
    if _SPECIAL.fullmatch(bare):
        return "special"
    if all(c.isalpha() or c in "'’-" for c in bare) and any(map(str.isalpha, bare)):
        return "word" if text[0].isspace() or bare[0].isupper() else "part of a word"
    if not any(map(str.isalnum, bare)) and "\ufffd" not in bare:
        return "punctuation"
    return "other"


class _Names:
    """Numbers the texts of tokens in order of appearance, so that the page holds each text once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    @property
    def texts(self) -> list[str]:
        return list(self._numbers)


def _gaps(texts: Sequence[str], places: Sequence[int], prompt_size: int) -> list[list[Any]]:
    """The text between explained tokens: [before which of them, text, tokens, 1 if generated].

    A gap is split where the prompt ends, so each is all prompt or all generated.
    """
    gaps: list[list[Any]] = []
    start = 0
    for index, place in enumerate([*places, len(texts)]):
        cuts = [start, *([prompt_size] if start < prompt_size < place else []), place]
        gaps += [
            [index, "".join(texts[a:b]), b - a, int(a >= prompt_size)] for a, b in pairwise(cuts) if a < b
        ]
        start = place + 1
    return gaps


def _fields(source: Any, prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """The scalar fields of a prompt record, nested ones as `outer.inner`, as in `--where record.outer.inner`."""
    if not isinstance(source, dict):
        return
    for key, value in source.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            if prefix or key not in SHOWN_AS_TEXT:
                short = len(value) <= FIELD_CHARACTERS
                yield prefix + key, value if short else value[:FIELD_CHARACTERS] + "…"
        elif isinstance(value, bool | int | float):
            exact = abs(value) <= LARGEST_EXACT if isinstance(value, int) else math.isfinite(value)
            yield prefix + key, value if exact else str(value)


def _columns_of(records: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Field -> its value in each record, None where it is missing. Only the FIELDS commonest fields are kept."""
    counts = Counter(name for record in records for name in record)
    kept = {name for name, _ in counts.most_common(FIELDS)}
    return {name: [record.get(name) for record in records] for name in counts if name in kept}


def _numbers(values: np.ndarray, digits: int) -> list[float | int | None]:
    """For JSON: rounded to `digits` significant digits, None for NaN and infinity."""
    return [
        None
        if not np.isfinite(value)
        else int(value)
        if value == int(value)
        else float(f"{value:.{digits}g}")
        for value in values.tolist()
    ]
