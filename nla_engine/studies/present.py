"""Writes what a study found: tables as CSV, one Markdown file, figures, and the page. Computes nothing."""

from __future__ import annotations

import base64
import html
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nla_engine.errors import WriteError
from nla_engine.report import ReportSummary, Section, write_report
from nla_engine.store import CaptureStore
from nla_engine.studies.analysis import ALL, SCORES, Finding
from nla_engine.studies.answers import PLACE_TITLES
from nla_engine.studies.clauses import Clause
from nla_engine.studies.figures import Figure, draw, figures_of
from nla_engine.studies.intervals import Estimate
from nla_engine.studies.naming import MEASURES
from nla_engine.studies.outcome import Outcome
from nla_engine.studies.reading import read_outcome
from nla_engine.studies.tables import Cell, Table

TITLE = "How a model multiplies, and what its explanations say"
#: What is written into the directory of a study.
MARKDOWN, PAGE, TABLES, FIGURES = "multiplication.md", "report.html", "tables", "figures"
#: The study's place on the page (`report.html#tab=study`).
SECTION = "study"
INTERVALS = (
    "In brackets: 95% intervals by a bootstrap over operand pairs (2,000 resamples), or Wilson's where every value is "
    "alike."
)

BARS = "Bars are 95% intervals; where none shows, it is narrower than its point."


@dataclass(frozen=True)
class Written:
    """What a reader is told, and the page."""

    reading: list[str]
    page: ReportSummary


def write_outcome(outcome: Outcome, out: Path, store: CaptureStore, explained: Path) -> Written:
    """Write everything into the directory `out`; files of an earlier run are replaced. WriteError if it cannot be."""
    reading = read_outcome(outcome)
    shown, files = shown_tables(outcome), csv_tables(outcome)
    figures = figures_of(outcome)
    try:
        for name in (TABLES, FIGURES):
            shutil.rmtree(out / name, ignore_errors=True)
            (out / name).mkdir()
        for table in files:
            (out / TABLES / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
        for figure in figures:
            draw(figure, out / FIGURES)
        (out / MARKDOWN).write_text(_markdown(reading, shown, figures), encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    section = Section(SECTION, "Multiplication", section_html(reading, shown, figures, out / FIGURES))
    title = f"{outcome.problems:,} multiplications, and what is said of them"
    page = write_report(store, explained, out / PAGE, title=title, sections=[section], overwrite=True)
    return Written(reading, page)


def csv_tables(outcome: Outcome) -> list[Table]:
    """Every number, one fact a line."""
    measures = Table(
        "measures",
        "Every measure at every place",
        INTERVALS,
        ("place", "measure", "rows", "pairs", "own", "shuffled", "text only", "margin"),
        [
            (f.place, f.measure, f.own.rows, f.own.clusters, f.own, f.shuffled, f.text_only, f.margin)
            for f in outcome.findings
        ],
    )
    return [measures, *(table for table in shown_tables(outcome) if not table.name.startswith("measures"))]


def shown_tables(outcome: Outcome) -> list[Table]:
    """The tables of the Markdown file and of the page."""
    tables = [
        Table(
            "accuracy",
            "Right products",
            "Share of replies whose last stated result is the product; Wilson's 95% interval.",
            ("by", "group", "problems", "right"),
            [(kind, group, share.rows, share) for kind, group, share in outcome.accuracy],
        ),
        Table(
            "tokenisation",
            "How the answer is cut into tokens",
            "1+1+1+1: four tokens of one digit each. Share: among answers of as many digits; Wilson's 95% interval.",
            ("digits", "cut", "replies", "share", "digits glued to other characters"),
            list(outcome.tokenisation),
        ),
        _wide(outcome, "measures_own", "The explanation of the row itself", INTERVALS, "own"),
        _wide(
            outcome,
            "measures_shuffled",
            "Control: explanations of other problems at the same place",
            "The same measures. Naming: mean over every explanation of another operand pair; FVE: one such; "
            "retrieval: chance.",
            "shuffled",
        ),
        _wide(
            outcome,
            "measures_text_only",
            "Control: explanations of other problems at any place",
            "The same regular expressions on texts that know neither the problem nor the place.",
            "text_only",
            list(MEASURES),
        ),
        Table(
            "trust",
            "Does FVE tell true numbers from false ones?",
            "FVE of explanations that name the true operands and no other number, and of those that name another "
            "number. AUC: "
            "chance that one of the former has the higher FVE. " + INTERVALS,
            ("place", "true", "another number", "difference", "AUC"),
            [
                (_title(contrast.place), contrast.first, contrast.second, contrast.difference, chance)
                for contrast, chance in outcome.detection
            ],
        ),
        Table(
            "origin",
            "Where a named product comes from",
            "Explanations that state an operand pair, by whether it is the true one. " + INTERVALS,
            ("stated pair", "explanations", "names the true product", "names the product of the stated pair"),
            [
                (entry.pair, entry.texts, entry.true_product, entry.stated_product)
                for entry in outcome.origins
            ],
        ),
        Table(
            "correctness",
            "Where the model answered right, and where wrong",
            "The same measures on the rows of right and of wrong replies. " + INTERVALS,
            ("place", "measure", "right", "wrong", "difference"),
            [
                (
                    _title(entry.place),
                    _measure_title(entry.measure),
                    entry.first,
                    entry.second,
                    entry.difference,
                )
                for entry in outcome.correctness
            ],
        ),
        Table(
            "agreement",
            f"Agreement of {outcome.setup.samples} samples at temperature {outcome.setup.temperature:g}",
            "Stated operands are compared as unordered pairs; overlap is the Jaccard index of all numbers named. "
            + INTERVALS,
            (
                "place",
                "rows",
                "same operands",
                "by chance",
                "overlap",
                "all agree",
                "right",
                "right if all agree",
                "right if not",
            ),
            [
                (
                    _title(entry.place),
                    entry.rows,
                    entry.same_pair,
                    entry.chance,
                    entry.overlap,
                    entry.unanimous,
                    entry.right,
                    entry.right_unanimous,
                    entry.right_divided,
                )
                for entry in outcome.agreement
            ],
        ),
        _clause_table("clauses", "FVE lost without a clause", "clause", outcome.by_number),
        _clause_table(
            "clause_kinds", "FVE lost, by what the clause is about", "clauses", outcome.by_kind, ALL
        ),
    ]
    return [table for table in tables if table.rows]


def _wide(
    outcome: Outcome, name: str, title: str, note: str, field: str, measures: Sequence[str] | None = None
) -> Table:
    """Measures down, places across."""
    places = outcome.places
    rows: list[tuple[Cell, ...]] = []
    for measure in measures or [*SCORES, *MEASURES]:
        found = [outcome.finding(place, measure) for place in places]
        if any(found):
            rows.append((_measure_title(measure), *(_cell(entry, field) for entry in found)))
    return Table(name, title, note, ("", *(_title(place) for place in places)), rows)


def _cell(finding: Finding | None, field: str) -> Estimate | None:
    return None if finding is None else getattr(finding, field)


def _clause_table(
    name: str, title: str, column: str, clauses: Sequence[Clause], place: str | None = None
) -> Table:
    return Table(
        name,
        title,
        "Lost when the clause is left out; when the same clause of another problem's explanation stands there; "
        "and the FVE of the clause alone. About: what most of these clauses name. " + INTERVALS,
        (
            "place",
            column,
            "about",
            "rows",
            "untouched FVE",
            "lost if left out",
            "lost if swapped",
            "FVE alone",
        ),
        [
            (
                _title(entry.place),
                entry.clause,
                entry.about,
                entry.rows,
                entry.whole,
                entry.removed,
                entry.swapped,
                entry.alone,
            )
            for entry in clauses
            if place in (None, entry.place)
        ],
    )


def _title(place: str) -> str:
    return PLACE_TITLES.get(place, place)


def _measure_title(measure: str) -> str:
    return {**SCORES, **MEASURES}[measure]


def _markdown(reading: Sequence[str], tables: Sequence[Table], figures: Sequence[Figure]) -> str:
    lines = [f"# {TITLE}", "", "## Reading", "", "Written by the study from its own numbers.", ""]
    lines += [f"- {paragraph}" for paragraph in reading]
    lines += ["", f"Every explanation beside its token: [{PAGE}]({PAGE}).", "", "## Figures", "", BARS, ""]
    for figure in figures:
        lines += [figure.caption, "", f"![{figure.caption}]({FIGURES}/{figure.name}.png)", ""]
    lines += ["## Tables", "", f"As CSV, with every digit, in [{TABLES}]({TABLES}).", ""]
    return "\n".join(lines) + "\n".join(table.markdown() for table in tables)


def section_html(
    reading: Sequence[str], tables: Sequence[Table], figures: Sequence[Figure], directory: Path
) -> str:
    """The study as markup for the report page: reading, figures (inside the markup), tables; every text escaped."""
    parts = ["<p>Written by the study from its own numbers.</p><ul>"]
    parts += [f"<li>{html.escape(paragraph)}</li>" for paragraph in reading]
    parts.append(f"</ul><p>{html.escape(BARS)}</p>")
    for figure in figures:
        data = base64.b64encode((directory / f"{figure.name}.svg").read_bytes()).decode()
        caption = html.escape(figure.caption)
        parts.append(
            f'<figure class="plate"><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts += [table.html() for table in tables]
    return "".join(parts)
