"""Commands that ask a model a question: study multiplication."""

from __future__ import annotations

import textwrap

from rich.markup import escape

from nla_engine.cli.app import app, command
from nla_engine.cli.output import print_json, results, say, show, show_facts
from nla_engine.cli.progress import progress_bar
from nla_engine.once import Application
from nla_engine.studies.multiplication.options import MultiplicationOptions

#: Left out of the printed summary: people find them in the tables and the reading, programs in the JSON line.
_LONG = ("measures", "agreement", "clauses", "reading")

studies = Application(no_args_is_help=True, rich_markup_mode=None)
_HELP = "Ask a model a question, and answer it with numbers and controls."
app.add_typer(studies, name="study", help=_HELP, short_help=_HELP)


@command(MultiplicationOptions, within=studies)
def multiplication_command(options: MultiplicationOptions, as_json: bool) -> None:
    """Study how a model multiplies and what its explanations really say: the bundled models, or any others."""
    from nla_engine.studies.multiplication.run import run_multiplication

    summary = run_multiplication(options, announce=say, progress=progress_bar)
    out = results(as_json)
    for paragraph in summary.reading:
        text = textwrap.fill(paragraph, 110, initial_indent="- ", subsequent_indent="  ")
        out.print(escape(text), highlight=False, soft_wrap=True)
    out.print()
    shown = summary.to_dict()
    value, low, high = (show(number) for number in summary.product_accuracy)
    told = {**shown, "product_accuracy": f"{value} (95% interval {low} to {high})"}
    show_facts("study", {key: value for key, value in told.items() if key not in _LONG}, as_json)
    if as_json:
        print_json(shown)
