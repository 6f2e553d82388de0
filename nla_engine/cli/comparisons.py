"""Commands that put pairs side by side: compare, crossplay, card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nla_engine.cli.app import command
from nla_engine.cli.output import finish, print_json, results, say
from nla_engine.cli.progress import progress_bar
from nla_engine.config import CardOptions, CompareOptions, CrossplayOptions

if TYPE_CHECKING:
    from nla_engine.comparison.compared import Compared


@command(CompareOptions)
def compare_command(options: CompareOptions, as_json: bool) -> None:
    """Put verbalizers, reconstructors, layers, precisions or samples side by side, over the same rows."""
    from nla_engine.comparison.compared import to_dict
    from nla_engine.comparison.files import PAGE
    from nla_engine.comparison.run import run_compare

    compared = run_compare(options)
    show_comparison(compared, as_json)
    if options.out is not None:
        say(f"{options.out / PAGE}: the texts side by side; open it in a browser")
    if as_json:
        print_json(to_dict(compared))


@command(CrossplayOptions)
def crossplay_command(options: CrossplayOptions, as_json: bool) -> None:
    """Read the texts of several AVs with several ARs, and compare all: does a text need its own reader?"""
    from nla_engine.comparison.crossplay import grid, run_crossplay

    with progress_bar("texts") as progress:
        summary = run_crossplay(options, announce=say, progress=progress)
    shown, out = grid(summary), results(as_json)
    table = Table(title="FVE: texts down, readers across", title_justify="left", box=None)
    for column in shown[0]:
        table.add_column(escape(column))
    for row in shown[1:]:
        table.add_row(*map(escape, row))
    out.print(table)
    show_comparison(summary.compared, as_json)
    if as_json:
        print_json(summary.to_dict())


@command(CardOptions)
def card_command(options: CardOptions, as_json: bool) -> None:
    """Sum a pair up as card.json and Markdown, from tables alone: what was not measured stays empty."""
    from nla_engine.comparison.card import run_card, told

    card = run_card(options)
    finish("card", card, as_json, told=told(card))


def show_comparison(compared: Compared, as_json: bool) -> None:
    """Measures down, sides across, each with its control and its difference from the first side."""
    from nla_engine.studies.tables import show

    names = compared.names
    table = Table(box=None, title_justify="left", title_style="bold")
    for column in ("measure", *names, "controls", *(f"{name} − {names[0]}" for name in names[1:])):
        table.add_column(escape(column))
    for line in compared.lines:
        controls = ", ".join("–" if each is None else show(each.value) for each in line.controls)
        over = (show(line.over[0, at]) for at in range(1, len(names)))
        cells = (line.measure.label, *map(show, line.values), controls, *over)
        table.add_row(*map(escape, cells))
    out = results(as_json)
    rows = f"{compared.size:,} rows of {compared.sequences:,} sequences that all sides have"
    out.print(escape(rows), style="bold", highlight=False, soft_wrap=True)
    out.print(table)
    for name, left in zip(names, compared.left_out, strict=True):
        if left:
            say(f"{name}: {left:,} rows are left out, since another side lacks them")
    for key, why in compared.absent.items():
        say(f"{key} is not compared: {why}")
    for note in compared.notes:
        say(note)
