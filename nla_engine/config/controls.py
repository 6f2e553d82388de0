"""The options of controls: texts that know the words around a row and not its vector, read by the same AR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine import fields, pair_fields
from nla_engine.errors import RequestError
from nla_engine.fields import check_table
from nla_engine.options import AT_LEAST_0, AT_LEAST_1, Options, block_numbers, check_local, option

#: Instead of a reader: there is to be none.
NO_READER = "none"
#: The longest copy of a text's end that makes sense beside a reader's context, in tokens.
_MOST_TOKENS = 100_000


def _counts(name: str, given: Any) -> tuple[int, ...]:
    found = block_numbers(name, given)
    if isinstance(found, str) or not 0 < found[0] <= found[-1] <= _MOST_TOKENS:
        raise RequestError(f"--last-k must be numbers of tokens from 1 to {_MOST_TOKENS:,}, joined by commas")
    return found


@dataclass(frozen=True)
class ControlsOptions(Options):
    """`controls`. See each field's help."""

    store: str = fields.store()
    explained: Path = option(
        "The explanations: the table of roundtrip, score or explain, or .parquet or .jsonl with fields row and text."
    )
    out: Path = fields.table()
    ar: str | None = option(
        "Reconstructor (AR): a local directory or a Hub id. [default: the one that the table names]", None
    )
    layer: int | None = fields.layer("AR")
    where: str | None = fields.where("compare")
    limit: int | None = fields.limit()
    last_k: tuple[int, ...] = option(
        "The last so many tokens as a text: one control for each number. Join them with commas.",
        (1, 5, 20),
        typed=list[str] | None,
        parse=lambda name, given: _counts(name, given) if given else (1, 5, 20),
    )
    reader: str | None = option(
        "Language model that explains the text alone: a local directory or a Hub id; none: no such control. "
        "[default: the AV's base, or else the captured model]",
        None,
    )
    reader_context: int = option(
        "Tokens of the text that the reader reads, up to the row's own.", 1024, must=AT_LEAST_1
    )
    reader_examples: int = option(
        "Explanations of the table that the reader is shown, of other sequences.", 4, must=AT_LEAST_0
    )
    reader_base: str | None = fields.base("the reader")
    seed: int = fields.seed("Seed of every draw.")
    variance: float | None = fields.store_variance()
    template_value: tuple[tuple[str, str], ...] = pair_fields.template_value()
    ar_map: Path | None = pair_fields.vector_map("AR", "after")
    whitening: Path | None = pair_fields.whitening()
    ar_base: str | None = fields.base("the AR")
    batch_size: int | None = fields.batch_size("Texts that the reader writes at once.")
    precision: str = fields.precision("the reader and the AR")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = fields.kernels()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        object.__setattr__(self, "last_k", _counts("last_k", self.last_k))
        super().__post_init__()
        check_table(self)
        check_local(self.explained)
