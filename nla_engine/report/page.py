"""One HTML file from a template, style, script and data. It needs no network.

Everything that a model or a user wrote is untrusted. What Python puts into the markup is escaped. The rest is base64 of
compressed JSON, which has no character with a meaning in HTML; the script inserts it as text, never as markup.
A content security policy lets the page run only its own script, and load nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from nla_engine.errors import RequestError
from nla_engine.options import check_ending
from nla_engine.referee.added import Added
from nla_engine.referee.evidence import CONTROLS, PATCHED_CONTROLS, Evidence, kind_of
from nla_engine.referee.reading import Finding, findings
from nla_engine.referee.table import summarise
from nla_engine.report.data import Explained, page_data
from nla_engine.report.facts import Figure, facts, figures, lead, warnings
from nla_engine.report.text_only import AREA, area, headline
from nla_engine.store import CaptureStore
from nla_engine.store.directory import check_parents
from nla_engine.store.lease import Lease
from nla_engine.store.shards import write_file_atomically

#: Parts of the page in the order in which they are joined.
STYLES = ("page.css", "text.css", "hits.css", "charts.css")
SCRIPTS = (
    "tools.js",
    "data.js",
    "marks.js",
    "filter.js",
    "text.js",
    "panel.js",
    "hits.js",
    "hover.js",
    "charts.js",
    "main.js",
)
#: The page's own areas: no section may take their names.
AREAS = ("text", "distributions", "run")
_SECTION_ID = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Section:
    """A further area of the page.

    id: lower-case letters, digits and hyphens; the end of its link (`#tab=ID`)
    title: plain text, on the tab
    html: trusted markup, escaped by its maker: tables, inline SVG, images as data URIs. Scripts in it do not run.
    """

    id: str
    title: str
    html: str


@dataclass(frozen=True)
class ReportSummary:
    """What was written; its keys are those of `--json`."""

    out: str
    bytes: int
    sequences: int
    rows: int
    explanations: int
    sections: tuple[str, ...]
    warnings: tuple[str, ...]
    reading: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def write_report(
    store: CaptureStore | str | os.PathLike[str],
    explained: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    title: str | None = None,
    sections: Sequence[Section] = (),
    also: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> ReportSummary:
    """Write the page of a store and the table that `roundtrip` made of it.

    title: None for one that names the store; sections: further areas, after the distributions
    also: tables of controls, patch and claims about the same texts, for what the page says of the run. With those of
    controls it begins with what the explanations add to the text
    Raises RequestError (`out` exists, is the table, or is not named .html; store and table do not belong together; a
    section's id is unfit or taken), StoreError, WriteError. After an error `out` is as it was.
    """
    store = store if isinstance(store, CaptureStore) else CaptureStore.open(store)
    explained, out = Path(explained), Path(out)
    if out.is_dir() or (out.exists() and not overwrite):
        mend = (
            "is a directory: choose another name"
            if out.is_dir()
            else "exists: pass --overwrite to replace it"
        )
        raise RequestError(f"{out}: {mend}")
    if out.exists() and explained.exists() and out.samefile(explained):
        raise RequestError(f"{out}: is the table that the page is made of: choose another name")
    check_ending(out, "the page is HTML", ".html", ".htm")
    check_parents(out)
    table = Explained.read(store, explained)
    others = [Path(path) for path in also]
    if clash := next(
        (path for path in others if path.exists() and out.exists() and out.samefile(path)), None
    ):
        raise RequestError(f"{out}: is {clash}, of which the page is made: choose another name")
    if table.asked and others:
        raise RequestError(
            f"{explained}: holds answers of an oracle, which no other table measures: leave --also out"
        )
    reading: list[Finding] = []
    if not table.asked:
        evidence = Evidence.read([explained, *others], explained.stem)
        reading = findings(evidence.quantities, evidence.rows["sequence"])
    kinds = {kind_of(path): path for path in others}
    added = None
    if CONTROLS in kinds:
        added = Added.read(kinds[CONTROLS])
        losses = None if PATCHED_CONTROLS not in kinds else summarise(kinds[PATCHED_CONTROLS], {}, 0, 0.0)
        sections = (Section(*AREA, area(added, losses)), *sections)
    page = render(store, table, title, sections, added, reading)
    with Lease.beside(out):  # two writers of one page would share a temporary file
        write_file_atomically(out, page.html)
    return ReportSummary(
        out=str(out),
        bytes=len(page.html),
        sequences=len(page.data["sequences"]["number"]),
        rows=len(page.data["rows"]["row"]),
        explanations=len(page.data["explanations"]["text"]),
        sections=tuple(section.id for section in sections),
        warnings=tuple(page.warnings),
        reading=tuple(finding.says for finding in reading),
    )


@dataclass(frozen=True)
class RenderedPage:
    """A page in UTF-8, the data in it, and the warnings at its head."""

    html: bytes
    data: dict[str, Any]
    warnings: list[str]


def render(
    store: CaptureStore,
    table: Explained,
    title: str | None = None,
    sections: Sequence[Section] = (),
    added: Added | None = None,
    reading: Sequence[Finding] = (),
) -> RenderedPage:
    """The page of a store and its explained rows. RequestError if a section's id is unfit or taken.

    added: what these add to the text, if that was measured; reading: what the run's numbers show, in words
    """
    taken = list(AREAS)
    for section in sections:
        if not _SECTION_ID.fullmatch(section.id) or section.id in taken:
            raise RequestError(
                f"section id {section.id!r} is taken or unfit: use lower-case letters, digits and hyphens, each id once"
            )
        taken.append(section.id)
    data, caveats = page_data(store, table), warnings(store, table)
    title = title or f"{store.path.name}: {table.site.label} in words"
    shown = figures(table) if added is None else [headline(added), *figures(table)]
    html = _assemble(store, table, data, title, caveats, sections, shown, reading)
    return RenderedPage(html.encode("utf-8", "replace"), data, caveats)


def _assemble(
    store: CaptureStore,
    table: Explained,
    data: Mapping[str, Any],
    title: str,
    caveats: Sequence[str],
    sections: Sequence[Section],
    shown: Sequence[Figure],
    reading: Sequence[Finding],
) -> str:
    parts = {
        "title": escape(title),
        "brief": _brief(shown, caveats),
        "lead": escape(lead(store, table)),
        "search": "Search answers and questions" if table.asked else "Search the explanations",
        "figures": "".join(
            f"<div><dt>{escape(f.label)}</dt><dd><b>{escape(f.value)}</b> <span>{escape(f.says)}</span>"
            + (f" <small>{escape(f.control)}</small>" if f.control else "")
            + "</dd></div>"
            for f in shown
        ),
        "reading": _reading(reading),
        "caveats": _caveats(caveats),
        "tabs": "".join(
            f'<button role="tab" id="tab-{s.id}" aria-controls="area-{s.id}">{escape(s.title)}</button>'
            for s in sections
        ),
        "sections": "".join(
            f'<section role="tabpanel" class="area prose" id="area-{s.id}" aria-labelledby="tab-{s.id}" hidden>'
            f"{s.html}</section>"
            for s in sections
        ),
        "facts": "".join(
            f"<section><h3>{escape(heading)}</h3><dl>"
            + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
            + "</dl></section>"
            for heading, pairs in facts(store, table).items()
        ),
    }
    return assemble("page.html", STYLES, SCRIPTS, parts, data)


def assemble(
    template: str,
    styles: Sequence[str],
    scripts: Sequence[str],
    parts: Mapping[str, str],
    data: Mapping[str, Any],
) -> str:
    """A page from files of `static/`. parts: markup for the template's other holes, escaped by its maker.

    The policy lets the page run its own script alone and load nothing.
    """
    script = _joined(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        "style": _joined(styles),
        "data": packed(data),
        "script": script,
    }
    whole = {**parts, **own}
    # One pass: inserted text is not searched for holes again.
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda match: whole[match[1]], _joined([template]))


def packed(data: Mapping[str, Any]) -> str:
    """Base64 of gzip of JSON; the same data gives the same text."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(text, mtime=0)).decode()


def _brief(shown: Sequence[Figure], caveats: Sequence[str]) -> str:
    """The figures and the names of the warnings on a line each: what is visible while the masthead is closed."""
    numbers = "".join(f"<span>{escape(f.label)} <b>{escape(f.value)}</b></span> " for f in shown)
    names = "; ".join(escape(text.partition(":")[0]) for text in caveats)
    care = f'<p class="care"><b>Read with care:</b> {names}</p>' if names else ""
    return f'<p class="numbers">{numbers}<span class="open"></span></p>{care}'


def _reading(found: Sequence[Finding]) -> str:
    """The answers to the four questions about a run, each with its numbers."""
    items = "".join(f"<li><b>{escape(each.question)}</b> {escape(each.says)}</li>" for each in found)
    return f'<div class="caveats"><h2>What the numbers show</h2><ul>{items}</ul></div>' if found else ""


def _caveats(texts: Sequence[str]) -> str:
    """Warnings, each of them `name, how many: what it means`."""
    if not texts:
        return ""
    parts = [text.partition(":") for text in texts]
    items = "".join(f"<li><b>{escape(name)}:</b>{escape(rest)}</li>" for name, _, rest in parts)
    return f'<div class="caveats"><h2>Read with care</h2><ul>{items}</ul></div>'


def _joined(names: Sequence[str]) -> str:
    static = files("nla_engine.report") / "static"
    return "\n".join((static / name).read_text("utf-8") for name in names)
