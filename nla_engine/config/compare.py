"""The options of compare, crossplay and card: pairs side by side over the same rows, and one pair summed up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nla_engine import fields, options
from nla_engine.options import AT_LEAST_1, Must, Options, check_ending, check_local, option


@dataclass(frozen=True)
class CompareOptions(Options):
    """`compare`. See each field's help."""

    tables: tuple[str, ...] = option(
        "Two or more sides: the tables of each, joined by commas (roundtrip or score, patch, controls, claims), with "
        "NAME= before them for a name of its own.",
        argument=True,
        typed=list[str],
        parse=options.texts,
        must=Must(bool, "one or several tables"),
    )
    out: Path | None = option(
        "Directory for the page, compare.json, the tables as CSV and the figures. [default: print the table only]",
        None,
    )
    by_sample: bool = option("One side per sample of the one table that is given.", False)
    across_layers: bool = option("Match rows of different layers by sequence and position.", False)
    seed: int = fields.seed("Seed of the intervals.")
    page_rows: int = option("Most rows on the page: those that differ most.", 1000, must=AT_LEAST_1)
    store: str | None = option(
        "The store, for the text around each token. [default: where the tables say, if it is there]", None
    )
    title: str | None = option("Heading of the page. [default: the names]", None)
    overwrite: bool = option("Replace a comparison that exists.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:
            check_local(self.out)


@dataclass(frozen=True)
class CrossplayOptions(Options):
    """`crossplay`. See each field's help."""

    store: str = fields.store()
    texts: tuple[Path, ...] = option(
        "Texts of one AV: the table of explain, roundtrip or score. Repeat for several.",
        typed=list[str],
        parse=options.paths,
        must=Must(bool, "one or several tables"),
    )
    ar: tuple[str, ...] = option(
        "Reconstructor (AR): a local directory or a Hub id. Repeat for several.",
        typed=list[str],
        parse=options.texts,
        must=Must(bool, "one or several reconstructors"),
    )
    out: Path = option("Directory for the scored tables and their comparison.")
    seed: int = fields.seed("Seed of the controls and of the intervals.")
    variance: float | None = fields.store_variance()
    page_rows: int = option("Most rows on the page: those that differ most.", 1000, must=AT_LEAST_1)
    precision: str = fields.precision("the ARs")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = fields.kernels()
    resume: bool = fields.resume("grid")
    overwrite: bool = option("Replace a grid that exists.", False)
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(self.out, *self.texts)


@dataclass(frozen=True)
class CardOptions(Options):
    """`card`. See each field's help."""

    tables: tuple[str, ...] = option(
        "The tables of one pair over the same texts: roundtrip or score, and any of patch, controls and claims.",
        argument=True,
        typed=list[str],
        parse=options.texts,
        must=Must(bool, "one or several tables"),
    )
    out: Path = option("The JSON file to write; the Markdown stands beside it, with the ending .md.")
    seed: int = fields.seed("Seed of the intervals.")
    overwrite: bool = option("Replace a card that exists.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(self.out)
        check_ending(self.out, "the card is JSON", ".json")
