"""The beginnings of a text, sentence by sentence: how much of a vector has come back after each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from nla_engine.roundtrip import score

#: Columns that a table of prefixes has besides. of_text: the number of the text among those of its row, its `sample`
#: in the file; sentences: how many the prefix has; whole: whether it is the text itself.
COLUMNS = (pa.field("of_text", pa.int32()), pa.field("sentences", pa.int32()), pa.field("whole", pa.bool_()))
#: Where a sentence ends: at the end of a line, or behind a stop (and what closes behind it) before a space.
_END = re.compile(r"(?:\s*\n\s*)+|(?<=[.!?…])[\"')\]”’»]*\s+|(?<=[。！？])")


def prefixes_of(text: str) -> list[str]:
    """The text up to the end of each sentence, without spaces behind it; the last is the text itself."""
    ends = [len(text[: found.end()].rstrip()) for found in _END.finditer(text)]
    kept = [end for end in dict.fromkeys(ends) if 0 < end < len(text.rstrip())]
    return [*(text[:end] for end in kept), text]


def with_prefixes(table: pa.Table) -> pa.Table:
    """A table of texts (row, sample, explanation, n_tokens and others, sorted) with a line for each of their prefixes.

    `sample` counts the lines of a row; `n_tokens` is null but for whole texts.
    """
    parts = [prefixes_of(text) for text in table["explanation"].to_pylist()]
    counts = np.array([len(part) for part in parts])
    lines = np.repeat(np.arange(len(table)), counts)
    made = table.take(pa.array(lines))
    ends = np.cumsum(counts)
    sentences = np.arange(len(lines)) - np.repeat(ends - counts, counts) + 1
    whole = np.zeros(len(lines), bool)
    whole[ends - 1] = True
    row = made["row"].to_numpy()
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    first = np.repeat(begins, np.diff(np.append(begins, len(row))))
    tokens = [
        told if kept else None
        for told, kept in zip(made["n_tokens"].to_pylist(), whole.tolist(), strict=True)
    ]
    columns = dict(zip(made.column_names, made.columns, strict=True)) | {
        "explanation": pa.array([text for part in parts for text in part], pa.string()),
        "sample": pa.array((np.arange(len(lines)) - first).astype(np.int32)),
        "n_tokens": pa.array(tokens, pa.int32()),
        "of_text": made["sample"].cast(pa.int32()),
        "sentences": pa.array(sentences.astype(np.int32)),
        "whole": pa.array(whole),
    }
    return pa.table(columns)


def fve_by_sentences(columns: Mapping[str, np.ndarray], variance: float) -> dict[str, float]:
    """Mean FVE after 1, 2, 3 ... sentences, over all texts that are scored: one that has fewer stays as it ended.

    columns: row, of_text, sentences, whole and cos of a table of prefixes
    """
    order = np.lexsort((columns["sentences"], columns["of_text"], columns["row"]))
    fve = score.fve_nrm(score.mse_nrm(columns["cos"].astype(np.float64)), variance)[order]
    ends = np.flatnonzero(columns["whole"].astype(bool)[order])
    starts = np.append(0, ends[:-1] + 1)
    scored = np.isfinite(fve[ends])
    starts, ends = starts[scored], ends[scored]
    longest = int((ends - starts).max(initial=-1)) + 1
    return {
        str(count): round(float(fve[np.minimum(starts + count - 1, ends)].mean()), 6)
        for count in range(1, longest + 1)
    }
