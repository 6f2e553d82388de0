"""The options of patch: what a model makes of reconstructed vectors in place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nla_engine import fields, pair_fields
from nla_engine.fields import check_table
from nla_engine.options import AT_LEAST_0, Must, Options, check_local, option

#: Norms in words: that of the row itself; that which the AR gives.
ROW, RAW = "row", "raw"


@dataclass(frozen=True)
class PatchOptions(Options):
    """`patch`. See each field's help."""

    store: str = fields.store()
    model: str = option("The captured model: a local directory or a Hub id.")
    explained: Path = option(
        "The texts: the table of roundtrip, score or explain, or .parquet or .jsonl with fields row and text."
    )
    out: Path = fields.table()
    ar: str | None = option(
        "Reconstructor (AR): a local directory or a Hub id. [default: the one that the table names]", None
    )
    layer: int | None = fields.layer("AR")
    where: str | None = fields.where("patch")
    limit: int | None = fields.limit()
    norm: str = option(
        "Norm of the reconstructions: row (that of the row itself), raw (as the AR gives it) or a number.",
        ROW,
        must=Must(lambda value: value == ROW or _is_norm(value), "row, raw or a positive number"),
    )
    horizon: int = option(
        "Also measure so many later positions, with the patched one kept and the later tokens as they are.",
        0,
        must=AT_LEAST_0,
    )
    seed: int = fields.seed("Seed of the controls.")
    template_value: tuple[tuple[str, str], ...] = pair_fields.template_value()
    ar_map: Path | None = pair_fields.vector_map("AR", "after")
    whitening: Path | None = pair_fields.whitening()
    ar_base: str | None = fields.base("the AR")
    base: str | None = fields.base("the captured model")
    precision: str = fields.precision("the AR")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = fields.kernels()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_table(self)
        check_local(self.explained)


def _is_norm(value: str) -> bool:
    return value == RAW or (value not in pair_fields.SCALES and pair_fields.is_scale(value))
