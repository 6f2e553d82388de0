"""The options of stage 2: the round trip, and each half of it alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine import fields, pair_fields
from nla_engine.errors import RequestError
from nla_engine.fields import check_cuts, check_samples, check_split, check_table
from nla_engine.options import Options, check_local, one_of, option

#: Where AV and AR live: together on the GPU, or one at a time.
RESIDENCIES = ("auto", "both", "turns")


@dataclass(frozen=True)
class RoundtripOptions(Options):
    """Stage 2. See each field's help."""

    store: str = fields.store()
    av: str = pair_fields.av()
    ar: str = pair_fields.ar()
    out: Path = fields.table()
    layer: int | None = fields.layer("AV")
    site: str = fields.site()
    where: str | None = fields.where()
    limit: int | None = fields.limit()
    samples: int = fields.samples("Explanations per row; the best by cos is marked.")
    temperature: float = fields.temperature()
    top_p: float | None = fields.top_p()
    top_k: int | None = fields.top_k()
    min_p: float | None = fields.min_p()
    seed: int = fields.seed("Seed of the sampling and of the controls.")
    max_new_tokens: int = fields.explanation_tokens()
    variance: float | None = fields.store_variance()
    injection_scale: str | None = pair_fields.injection_scale()
    injection: str | None = pair_fields.injection()
    norm_match: bool = pair_fields.norm_match()
    slots: str | None = pair_fields.slots()
    prompt: str | None = pair_fields.prompt("the AV")
    system: str | None = pair_fields.system()
    template_option: dict[str, Any] | None = pair_fields.template_option()
    prefill: str = pair_fields.prefill()
    template_value: tuple[tuple[str, str], ...] = pair_fields.template_value()
    av_map: Path | None = pair_fields.vector_map("AV", "before")
    ar_map: Path | None = pair_fields.vector_map("AR", "after")
    whitening: Path | None = pair_fields.whitening()
    av_base: str | None = fields.base("the AV")
    ar_base: str | None = fields.base("the AR")
    batch_size: int | None = fields.batch_size("Explanations generated at once.")
    follow: bool = fields.follow()
    residency: str = option(
        "AV and AR on the GPU: both (at once), turns (one at a time), or auto (both if they fit).",
        "auto",
        must=one_of(RESIDENCIES),
    )
    precision: str = fields.precision("AV and AR")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    tensor_parallel: int = fields.tensor_parallel("AV and AR")
    gpus: str | None = fields.gpus()
    workers: int = fields.workers()
    kernels: str = fields.kernels()
    resume: bool = fields.resume("round trip")
    overwrite: bool = fields.replace()
    dry_run: bool = fields.dry_run("follow")
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_table(self)
        check_split(self)
        _check_words(self)
        _check_processes(self, self.follow)


@dataclass(frozen=True)
class ExplainOptions(Options):
    """The first half of stage 2: an AV alone. See each field's help."""

    store: str = fields.store()
    av: str = pair_fields.av()
    out: Path = fields.table()
    layer: int | None = fields.layer("AV")
    site: str = fields.site()
    where: str | None = fields.where()
    limit: int | None = fields.limit()
    samples: int = fields.samples("Explanations per row.")
    temperature: float = fields.temperature()
    top_p: float | None = fields.top_p()
    top_k: int | None = fields.top_k()
    min_p: float | None = fields.min_p()
    seed: int = fields.seed("Seed of the sampling.")
    max_new_tokens: int = fields.explanation_tokens()
    injection_scale: str | None = pair_fields.injection_scale()
    injection: str | None = pair_fields.injection()
    norm_match: bool = pair_fields.norm_match()
    slots: str | None = pair_fields.slots()
    prompt: str | None = pair_fields.prompt("the AV")
    system: str | None = pair_fields.system()
    template_option: dict[str, Any] | None = pair_fields.template_option()
    prefill: str = pair_fields.prefill()
    template_value: tuple[tuple[str, str], ...] = pair_fields.template_value()
    av_map: Path | None = pair_fields.vector_map("AV", "before")
    whitening: Path | None = pair_fields.whitening()
    av_base: str | None = fields.base("the AV")
    batch_size: int | None = fields.batch_size("Explanations generated at once.")
    follow: bool = fields.follow()
    precision: str = fields.precision("the AV")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    tensor_parallel: int = fields.tensor_parallel("the AV")
    gpus: str | None = fields.gpus()
    workers: int = fields.workers()
    kernels: str = fields.kernels()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    dry_run: bool = fields.dry_run("follow")
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_table(self)
        check_split(self)
        _check_words(self)
        _check_processes(self, self.follow)


@dataclass(frozen=True)
class ScoreOptions(Options):
    """The second half of stage 2: an AR alone, on given texts. See each field's help."""

    store: str = fields.store()
    ar: str = pair_fields.ar()
    texts: Path = option(
        "The texts: .parquet or .jsonl with fields row and text, or the table of explain or roundtrip."
    )
    out: Path = fields.table()
    prefixes: bool = option(
        "Score every text after each of its sentences too: a line for each beginning, and the mean FVE after 1, 2, 3 "
        "and more sentences.",
        False,
    )
    layer: int | None = option(
        "Layer of the store to read. [default: the one that the texts are about, or else that of the AR]",
        None,
    )
    site: str = fields.site()
    seed: int = fields.seed("Seed of the controls.")
    variance: float | None = fields.store_variance()
    template_value: tuple[tuple[str, str], ...] = pair_fields.template_value()
    ar_map: Path | None = pair_fields.vector_map("AR", "after")
    whitening: Path | None = pair_fields.whitening()
    ar_base: str | None = fields.base("the AR")
    precision: str = fields.precision("the AR")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    tensor_parallel: int = fields.tensor_parallel("the AR")
    gpus: str | None = fields.gpus()
    workers: int = fields.workers()
    kernels: str = fields.kernels()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    dry_run: bool = fields.dry_run()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_table(self)
        check_split(self)
        check_local(self.texts)
        _check_processes(self)


#: Options of the commands of stage 2: of those that write texts, of those that score them, of all.
WritingOptions = ExplainOptions | RoundtripOptions
ScoringOptions = ScoreOptions | RoundtripOptions
StageTwoOptions = ExplainOptions | ScoreOptions | RoundtripOptions


def _check_words(options: WritingOptions) -> None:
    if options.norm_match and options.injection is None:
        raise RequestError("--norm-match goes with --injection, such as add@1: give it too, or leave it out")
    if options.system is not None and options.prompt is None:
        raise RequestError("--system goes with --prompt: the AV's own prompt has none")
    if options.follow and options.limit is not None:
        raise RequestError(
            "--limit spreads over all rows, and --follow does not know them yet: leave one of the two out"
        )
    check_samples(options)
    check_cuts(options)


def _check_processes(options: StageTwoOptions, follow: bool = False) -> None:
    for name, given in (("--gpus", options.gpus is not None), ("--workers", options.workers > 1)):
        if given and follow:
            raise RequestError(
                f"{name} shares known rows out, and --follow waits for rows: leave one of the two out"
            )
        if given and options.dry_run:
            raise RequestError(f"{name} and --dry-run exclude each other: it measures on one GPU, or the CPU")
