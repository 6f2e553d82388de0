"""What is shown of the multiplication study: its tables, and the whole writeup."""

from __future__ import annotations

from collections.abc import Mapping

from nla_engine.referee.intervals import interval_note
from nla_engine.studies.findings import ALL, SCORES
from nla_engine.studies.multiplication.answers import PLACES
from nla_engine.studies.multiplication.figures import figures_of
from nla_engine.studies.multiplication.naming import MEASURES
from nla_engine.studies.multiplication.outcome import Outcome
from nla_engine.studies.multiplication.reading import read_outcome
from nla_engine.studies.patched import PATCHES
from nla_engine.studies.shown import clauses_tables, findings_table, patch_table
from nla_engine.studies.tables import Table
from nla_engine.studies.writeup import Writeup

MARKDOWN = "multiplication.md"
INTERVALS = interval_note("operand pairs")
_TITLES = {ALL: ALL, **PLACES}
_MEASURES = {**SCORES, **PATCHES, **MEASURES}


def writeup_of(outcome: Outcome) -> Writeup:
    """Reading, tables and figures of an outcome."""
    return Writeup(
        markdown=MARKDOWN,
        heading="How a model multiplies, and what its explanations say",
        page_title=f"{outcome.problems:,} multiplications, and what is said of them",
        area="Multiplication",
        reading=read_outcome(outcome),
        tables=shown_tables(outcome),
        files=csv_tables(outcome),
        figures=figures_of(outcome),
    )


def csv_tables(outcome: Outcome) -> list[Table]:
    """Every number, one fact per line."""
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
            "The same measures. Naming: mean over every explanation of another operand pair; FVE and what the model "
            "makes of the vector: one such; retrieval: chance.",
            "shuffled",
        ),
        _wide(
            outcome,
            "measures_text_only",
            "Control: explanations of other problems at any place",
            "The same regular expressions on texts that know neither the problem nor the place.",
            "text_only",
            MEASURES,
        ),
        Table(
            "trust",
            "Does FVE tell true numbers from false ones?",
            "FVE of explanations that name the true operands and no other number, and of those that name another "
            "number. AUC: "
            "chance that one of the former has the higher FVE. " + INTERVALS,
            ("place", "true", "another number", "difference", "AUC"),
            [
                (_TITLES[contrast.place], contrast.first, contrast.second, contrast.difference, chance)
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
                    _TITLES[entry.place],
                    _MEASURES[entry.measure],
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
                    _TITLES[entry.place],
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
        *([patch_table(outcome.patched, outcome.places, INTERVALS)] if outcome.patched else []),
        *clauses_tables(outcome.by_number, "clause", PLACES, "clauses", "", INTERVALS),
        *clauses_tables(
            [clause for clause in outcome.by_kind if clause.place == ALL],
            "clauses",
            PLACES,
            "clause_kinds",
            ", by what it is about",
            INTERVALS,
        ),
    ]
    return [table for table in tables if table.rows]


def _wide(
    outcome: Outcome, name: str, title: str, note: str, field: str, measures: Mapping[str, str] = _MEASURES
) -> Table:
    return findings_table(outcome.findings, field, outcome.places, measures, name, title, note)
