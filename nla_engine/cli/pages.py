"""Commands that write a page: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nla_engine.cli.app import app
from nla_engine.cli.output import Json, print_json, say, show_facts
from nla_engine.cli.stores import StorePath


@app.command()
def report(
    store: StorePath,
    explained: Annotated[
        Path,
        typer.Option(
            "--explained", help="The table that roundtrip, explain, score or ask made of the store."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
    also: Annotated[
        list[Path] | None,
        typer.Option(
            "--also",
            help="A table of controls, patch or claims about the same texts, for what the page says of the run; which "
            "of them it is, its columns say. With controls the page begins with what the explanations add to the text. "
            "Repeat for several.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading. [default: store and layer]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a store and its explanations as one HTML page to read, search and share; it needs no network."""
    from nla_engine.report import write_report
    from nla_engine.store import CaptureStore

    summary = write_report(
        CaptureStore.open(store),
        explained,
        out,
        title=title,
        also=also or (),
        overwrite=overwrite,
    )
    for sentence in summary.reading:
        say(sentence)
    if summary.warnings:
        say(f"the page warns of {len(summary.warnings)} thing{'s' * (len(summary.warnings) > 1)}:")
    for warning in summary.warnings:
        say(f"- {warning}")
    facts = summary.to_dict()
    told = {name: value for name, value in facts.items() if name != "reading"}
    told = {name: value for name, value in told.items() if name not in ("warnings", "sections") or value}
    show_facts("report: open it in a browser", told | {"warnings": len(summary.warnings)}, as_json)
    if as_json:
        print_json(facts)
