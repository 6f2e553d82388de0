"""lens: any vectors through a model's own final norm and head. Nothing is written; `run_lens` is for a store's rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nla_engine.errors import RequestError
from nla_engine.interactive.vectors import as_vectors
from nla_engine.interactive.words import python_words
from nla_engine.models.load import LanguageModel, load_model
from nla_engine.models.logits import logit_pieces
from nla_engine.models.readout import Readout
from nla_engine.models.tokens import token_bytes
from nla_engine.roundtrip.lens import LOGIT_BYTES, numbers_of
from nla_engine.store.shown import plural, table_html
from nla_engine.store.views.frames import library

if TYPE_CHECKING:
    import pandas
    import polars

#: Vectors that are shown of many, and the most tokens of each.
_SHOWN, _TOKENS = 10, 6


@dataclass(frozen=True, repr=False, eq=False)
class Lens:
    """The next tokens that n vectors stand for, by a model's final norm and head. Its length is n.

    top_id: int64 [n, k], likeliest first; top_token: n lists of k texts; top_logprob: float32 [n, k]
    entropy: float32 [n], in nats
    next_logprob: float32 [n], NaN where no token was given; next_rank: int64 [n], 1 for the likeliest, 0 where none was
    given. Both are None if no tokens were given.
    Logarithms are natural. What a vector with NaN or Inf stands for is NaN.
    """

    top_id: np.ndarray
    top_token: list[list[str]]
    top_logprob: np.ndarray
    entropy: np.ndarray
    next_logprob: np.ndarray | None = None
    next_rank: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.top_id)

    def _columns(self) -> dict[str, Any]:
        """The names are those of the table of `lens`."""
        columns: dict[str, Any] = {
            "entropy": self.entropy,
            "top_id": list(self.top_id),
            "top_token": self.top_token,
            "top_logprob": list(self.top_logprob),
        }
        if self.next_logprob is not None:
            columns = {"next_logprob": self.next_logprob, "next_rank": self.next_rank, **columns}
        return columns

    def to_pandas(self) -> pandas.DataFrame:
        """A row per vector. RequestError without pandas."""
        return library("pandas").DataFrame(self._columns())

    def to_polars(self) -> polars.DataFrame:
        """A row per vector. RequestError without polars."""
        return library("polars").DataFrame(self._columns())

    def _shown(self, place: int) -> str:
        pairs = zip(self.top_token[place], np.exp(self.top_logprob[place]), strict=True)
        return "  ".join(f"{token!r} {p:.3f}" for token, p in list(pairs)[:_TOKENS])

    def _title(self) -> str:
        return f"Lens of {plural(len(self), 'vector')}: likeliest next tokens and their probabilities"

    def __repr__(self) -> str:
        lines = [self._title()]
        lines += [f"  {place}  {self._shown(place)}" for place in range(min(len(self), _SHOWN))]
        if len(self) > _SHOWN:
            lines.append(f"  and {len(self) - _SHOWN:,} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [[place, self._shown(place)] for place in range(min(len(self), 2 * _SHOWN))]
        more = f", the first {len(rows)} here" if len(rows) < len(self) else ""
        return table_html(self._title() + more, ["vector", "next tokens"], rows)


@python_words()
def lens(
    vectors: Any,
    model: str | os.PathLike[str] | LanguageModel,
    *,
    next_ids: Sequence[int] | np.ndarray | None = None,
    top_k: int = 10,
    device: str | None = None,
    dtype: str | None = None,
) -> Lens:
    """The logit lens of vectors: the model's final norm and head in float32, with the scales and caps of its family.

    vectors: floating-point [d] or [n, d] of numpy or torch, of any origin: rows of a layer, a difference of means
    model: a directory, a Hub id, or a loaded model (`load_model`)
    next_ids: int [n], the token that truly followed each, -1 for none, as the column `next_token_id` has them
    top_k: tokens listed of each vector; device, dtype: of a model that is loaded here
    Raises the errors of `nla_engine.errors`.
    """
    array = as_vectors(vectors)
    loaded = isinstance(model, LanguageModel)
    if loaded and (device is not None or dtype is not None):
        raise RequestError("device and dtype are for a model that is loaded here: leave them out")
    lm = model if isinstance(model, LanguageModel) else load_model(model, device=device, dtype=dtype)
    if lm.d_model != array.shape[1]:
        raise RequestError(f"{lm.name} has width {lm.d_model}, these vectors have width {array.shape[1]}")
    readout = Readout(lm)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= readout.columns:
        raise RequestError(
            f"top_k is {top_k!r}: it must be 1 to {readout.columns:,}, the tokens of {lm.name}"
        )
    token = _tokens(next_ids, len(array), readout.columns)
    found: list[dict[str, np.ndarray]] = []
    for some in logit_pieces(len(array), readout.columns, LOGIT_BYTES[lm.device.type]):
        logits = readout(torch.from_numpy(array[some]).to(lm.device))
        given = torch.from_numpy(token[some]).to(lm.device)
        found.append(numbers_of(logits, given, top_k))
    joined = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
    texts = token_bytes(lm.tokenizer, lm.vocab_size)
    return Lens(
        top_id=joined["top_id"],
        top_token=[[texts[id_].decode(errors="replace") for id_ in ids] for ids in joined["top_id"]],
        top_logprob=joined["top_logprob"],
        entropy=joined["entropy"],
        next_logprob=None if next_ids is None else joined["next_logprob"],
        next_rank=None if next_ids is None else joined["next_rank"],
    )


def _tokens(given: Any, vectors: int, columns: int) -> np.ndarray:
    """int64 [n], -1 for none. RequestError for other shapes and for ids that are none."""
    if given is None:
        return np.full(vectors, -1, np.int64)
    ids = np.asarray(given)
    if ids.dtype.kind not in "iu" or ids.shape != (vectors,):
        raise RequestError(
            f"next_ids is {ids.dtype} {list(ids.shape)}: give a whole number for each of {vectors} vectors"
        )
    if len(wrong := ids[(ids < -1) | (ids >= columns)]):
        raise RequestError(f"next_ids holds {wrong[0]}: ids are 0 to {columns - 1}, or -1 for none")
    return ids.astype(np.int64)
