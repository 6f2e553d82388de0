"""What a reader gets of a study: tables as CSV, one Markdown file, figures, and the page."""

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
from nla_engine.studies.directory import CLAIMS, EXPLAINED, FIGURES, PAGE, PATCHED, STORE, TABLES
from nla_engine.studies.figures import Figure, draw
from nla_engine.studies.tables import Table

#: The study's place on the page (`report.html#tab=study`).
SECTION = "study"
TOO_FEW = "This figure is not drawn: there are too few cases for it."
BARS = "Bars are 95% intervals; where none shows, it is narrower than its point."


@dataclass(frozen=True)
class Writeup:
    """A study, ready to be written. markdown: the name of that file; heading: its first line.

    page_title, area: titles of the page and of the study's area on it. reading: paragraphs. tables: those of the
    Markdown file and the page; files: those written as CSV.
    """

    markdown: str
    heading: str
    page_title: str
    area: str
    reading: list[str]
    tables: list[Table]
    files: list[Table]
    figures: list[Figure]

    def write(self, out: Path) -> ReportSummary:
        """Write everything into the directory `out`, replacing files of an earlier run. WriteError if that fails.

        The page also reads the tables of patch and claims that are there.
        """
        try:
            for name in (TABLES, FIGURES):
                shutil.rmtree(out / name, ignore_errors=True)
                (out / name).mkdir()
            for table in self.files:
                (out / TABLES / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
            for figure in self.figures:
                draw(figure, out / FIGURES)
            (out / self.markdown).write_text(self._as_markdown(), encoding="utf-8")
        except OSError as error:
            raise WriteError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
        markup = section_html(self.reading, self.tables, self.figures, out / FIGURES)
        return write_report(
            CaptureStore.open(out / STORE),
            out / EXPLAINED,
            out / PAGE,
            title=self.page_title,
            sections=[Section(SECTION, self.area, markup)],
            also=[out / name for name in (PATCHED, CLAIMS) if (out / name).exists()],
            overwrite=True,
        )

    def _as_markdown(self) -> str:
        lines = [f"# {self.heading}", "", "## Reading", "", "Written by the study from its own numbers.", ""]
        lines += [f"- {paragraph}" for paragraph in self.reading]
        lines += [
            "",
            f"Every explanation beside its token: [{PAGE}]({PAGE}).",
            "",
            "## Figures",
            "",
            BARS,
            "",
        ]
        for figure in self.figures:
            picture = f"![{figure.caption}]({FIGURES}/{figure.name}.png)" if figure.panels else TOO_FEW
            lines += [figure.caption, "", picture, ""]
        lines += ["## Tables", "", f"As CSV, with every digit, in [{TABLES}]({TABLES}).", ""]
        return "\n".join(lines) + "\n".join(table.markdown() for table in self.tables)


def section_html(
    reading: Sequence[str], tables: Sequence[Table], figures: Sequence[Figure], directory: Path
) -> str:
    """The study as markup for the report page: reading, figures (inside the markup), tables; every text escaped."""
    parts = ["<p>Written by the study from its own numbers.</p><ul>"]
    parts += [f"<li>{html.escape(paragraph)}</li>" for paragraph in reading]
    parts.append(f"</ul><p>{html.escape(BARS)}</p>")
    for figure in figures:
        if not figure.panels:
            parts.append(f"<p>{html.escape(figure.caption)} <em>{TOO_FEW}</em></p>")
            continue
        data = base64.b64encode((directory / f"{figure.name}.svg").read_bytes()).decode()
        caption = html.escape(figure.caption)
        parts.append(
            f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts += [table.html() for table in tables]
    return "".join(parts)
