"""The figures of the multiplication study: those of any study, naming, trust and agreement."""

from __future__ import annotations

from nla_engine.studies.figures import (
    BLUE,
    GREEN,
    GREY,
    SHARE,
    UNNAMED,
    VERMILLION,
    Figure,
    Panel,
    Series,
    own,
    shuffled,
)
from nla_engine.studies.findings import ALL
from nla_engine.studies.multiplication.answers import PLACES
from nla_engine.studies.multiplication.naming import MEASURES
from nla_engine.studies.multiplication.outcome import Outcome
from nla_engine.studies.shown import clauses_figure, patch_figure, points, scores_figure


def figures_of(outcome: Outcome) -> list[Figure]:
    """Every figure; one without panels where there were too few cases. Agreement only if samples were drawn."""
    figures = [
        scores_figure(outcome.findings, outcome.places, outcome.control_vectors),
        _naming(outcome),
        patch_figure(outcome.findings, outcome.places),
        clauses_figure(outcome.by_number, outcome.places),
        _detection(outcome),
    ]
    return [*figures, _agreement(outcome)] if outcome.setup.samples else figures


def _naming(outcome: Outcome) -> Figure:
    panels = [
        Panel(
            title,
            "share of explanations",
            [
                own(points(outcome.findings, measure, "own")),
                shuffled(points(outcome.findings, measure, "shuffled")),
                Series(
                    "of other problems, any place", GREY, "^", points(outcome.findings, measure, "text_only")
                ),
            ],
            SHARE,
        )
        for measure, title in MEASURES.items()
    ]
    caption = "How often an explanation names what is true of its problem, and how often one of another problem does."
    return Figure("naming", caption, outcome.places, panels)


def _detection(outcome: Outcome) -> Figure:
    caption = "Whether a high FVE means that the numbers in the text are true."
    if not outcome.detection:
        return Figure("trust", caption, {}, [])
    sound = {contrast.place: contrast.first for contrast, _ in outcome.detection}
    false = {contrast.place: contrast.second for contrast, _ in outcome.detection}
    told = {contrast.place: chance for contrast, chance in outcome.detection}
    panels = [
        Panel(
            "FVE by what is named",
            "FVE",
            [
                Series("true operands, no other number", BLUE, "o", sound),
                Series("another number", VERMILLION, "s", false),
            ],
        ),
        Panel(
            "does FVE tell them apart?",
            "AUC (0.5: not at all)",
            [Series(UNNAMED, GREEN, "D", told)],
            (0.0, 1.04),
            mark=0.5,
        ),
    ]
    places = {ALL: ALL, **{place: title for place, title in outcome.places.items() if place in sound}}
    return Figure("trust", caption, places, panels)


def _agreement(outcome: Outcome) -> Figure:
    caption = "Whether samples of one explanation agree, and are then right."
    if not outcome.agreement:
        return Figure("agreement", caption, {}, [])
    of = {entry.place: entry for entry in outcome.agreement}
    panels = [
        Panel(
            "two samples state the same operands",
            "share of pairs of samples",
            [
                own({place: entry.same_pair for place, entry in of.items()}, "samples of one row"),
                shuffled({place: entry.chance for place, entry in of.items()}),
            ],
            SHARE,
        ),
        Panel(
            "the stated operands are true",
            "share of samples",
            [
                Series(
                    "all samples agree",
                    GREEN,
                    "D",
                    {place: entry.right_unanimous for place, entry in of.items()},
                ),
                Series(
                    "samples differ", GREY, "^", {place: entry.right_divided for place, entry in of.items()}
                ),
            ],
            SHARE,
        ),
    ]
    places = {place: PLACES.get(place, place) for place in of}
    return Figure("agreement", caption, places, panels)
