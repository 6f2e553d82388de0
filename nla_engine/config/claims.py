"""The options of clauses and of claims: which words of an explanation carry the vector, and which are true."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nla_engine import fields, pair_fields
from nla_engine.errors import RequestError
from nla_engine.fields import check_table
from nla_engine.options import AT_LEAST_1, Options, check_local, flag, option

_TEXTS = (
    "The texts: the table of roundtrip, score or explain, or .parquet or .jsonl with fields row and text."
)


@dataclass(frozen=True)
class ClausesOptions(Options):
    """`clauses`. See each field's help."""

    store: str = fields.store()
    explained: Path = option(_TEXTS)
    out: Path = fields.table()
    ar: str | None = option(
        "Reconstructor (AR): a local directory or a Hub id. [default: the one that the table names]", None
    )
    model: str | None = option(
        "The captured model, to measure KL as well: a local directory or a Hub id.", None
    )
    layer: int | None = fields.layer("AR")
    where: str | None = fields.where("read again")
    limit: int | None = fields.limit()
    variance: float | None = fields.store_variance()
    seed: int = fields.seed("Seed of the other rows and the random words.")
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
        if self.base is not None and self.model is None:
            raise RequestError("--base: belongs to --model: give both, or leave --base out")


@dataclass(frozen=True)
class ClaimsOptions(Options):
    """`claims`. See each field's help."""

    store: str = fields.store()
    explained: Path = option(_TEXTS)
    out: Path = fields.table()
    where: str | None = fields.where("check")
    limit: int | None = fields.limit()
    recent: int = option(
        "Recall asks for the numbers, names and words of so many last tokens.", 32, must=AT_LEAST_1
    )
    judge: str | None = option("A language model to judge each clause: a local directory or a Hub id.", None)
    judge_context: int = option("Tokens of context that the judge reads.", 256, must=AT_LEAST_1)
    judge_base: str | None = fields.base("the judge")
    seed: int = fields.seed("Seed of the other rows.")
    batch_size: int | None = fields.batch_size("Prompts of the judge run at once.")
    precision: str = fields.precision("the judge")
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
        if self.judge is None:
            of_judge = {"judge_base": None, "judge_context": 256, "batch_size": None}
            if given := [name for name, usual in of_judge.items() if getattr(self, name) != usual]:
                raise RequestError(f"{flag(given[0])}: belongs to --judge: give both, or leave it out")
