"""Commands that run models: capture, roundtrip and its halves explain and score, ask, lens, the referee's, demo."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from nla_engine.cli.app import app, command
from nla_engine.cli.output import Json, finish, print_json, results, say
from nla_engine.cli.progress import progress_bar
from nla_engine.config import (
    AskOptions,
    CaptureOptions,
    ClaimsOptions,
    ClausesOptions,
    ControlsOptions,
    ExplainOptions,
    LensOptions,
    PatchOptions,
    RoundtripOptions,
    ScoreOptions,
    StageTwoOptions,
    TrainOptions,
)
from nla_engine.store.format import EARLY_POSITIONS


def _estimate(options: StageTwoOptions, as_json: bool) -> None:
    from nla_engine.roundtrip.estimate import estimate_stage_two

    finish("dry run: nothing was written", estimate_stage_two(options, announce=say).to_dict(), as_json)


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    """Of a summary, what people are shown: rows at early positions only if the models may not know such rows."""
    from nla_engine.roundtrip.results import read_metadata

    metadata = read_metadata(Path(facts["out"]))
    roles = [role for role in ("av", "ar") if metadata.get(role) is not None]
    known = bool(roles) and all(metadata.get(f"{role}_min_position") == 0 for role in roles)
    words = {"early_rows": f"early_rows (positions below {EARLY_POSITIONS})"}
    left_out = known or not facts["early_rows"]
    return {
        words.get(name, name): value
        for name, value in facts.items()
        if not (name == "early_rows" and left_out)
    }


@command(CaptureOptions)
def capture_command(options: CaptureOptions, as_json: bool) -> None:
    """Stage 1: run prompts through a model and store one layer's (or several layers') activations."""
    if options.dry_run:
        from nla_engine.capture.estimate import estimate_capture

        finish("dry run: nothing was written", estimate_capture(options, announce=say).to_dict(), as_json)
        return
    if options.ray:
        from nla_engine.cluster.ray_run import run_on_ray as run
    else:
        from nla_engine.capture.run import run_capture as run

    with progress_bar("sequences") as progress:
        summary = run(options, announce=say, progress=progress)
    facts = summary.to_dict()
    if not summary.seconds_by_phase:  # a part that was finished before: one line has said so
        if as_json:
            print_json(facts)
        return
    of_several = ("workers", "workers_lost", "sequences_again", "workers_waited")
    alone = of_several if summary.workers == 1 else ()
    words = {"codec_error": "codec_error (relative L2)"}
    told = {words.get(key, key): facts[key] for key in facts if key not in alone}
    finish("captured", facts, as_json, told=told)


@command(RoundtripOptions)
def roundtrip_command(options: RoundtripOptions, as_json: bool) -> None:
    """Stage 2: explain stored activations with an AV, read the words back with an AR, and score them."""
    if options.dry_run:
        _estimate(options, as_json)
        return
    from nla_engine.roundtrip.run import run_roundtrip

    with progress_bar("explanations") as progress:
        summary = run_roundtrip(options, announce=say, progress=progress)
    facts = summary.to_dict()
    one_each = summary.rows == summary.explanations
    told = {key: value for key, value in _told(facts).items() if not (one_each and "_best" in key)}
    finish("round trip", facts, as_json, told=told)


@command(ExplainOptions)
def explain_command(options: ExplainOptions, as_json: bool) -> None:
    """The first half of roundtrip: explain stored activations with an AV. Nothing is scored."""
    if options.dry_run:
        _estimate(options, as_json)
        return
    from nla_engine.roundtrip.run import run_explain

    with progress_bar("explanations") as progress:
        summary = run_explain(options, announce=say, progress=progress)
    finish("explained", summary.to_dict(), as_json, told=_told(summary.to_dict()))


@command(ScoreOptions)
def score_command(options: ScoreOptions, as_json: bool) -> None:
    """The second half of roundtrip: read the texts of a file with an AR, and score them against stored activations."""
    if options.dry_run:
        _estimate(options, as_json)
        return
    from nla_engine.roundtrip.run import run_score

    with progress_bar("texts") as progress:
        summary = run_score(options, announce=say, progress=progress)
    finish("scored", summary.to_dict(), as_json, told=_told(summary.to_dict()))


@command(AskOptions)
def ask_command(options: AskOptions, as_json: bool) -> None:
    """Ask an activation oracle or a LatentQA decoder questions about stored activations."""
    if options.dry_run:
        from nla_engine.roundtrip.ask_estimate import estimate_ask

        finish("dry run: nothing was written", estimate_ask(options, announce=say).to_dict(), as_json)
        return
    from nla_engine.roundtrip.ask import run_ask

    with progress_bar("answers") as progress:
        summary = run_ask(options, announce=say, progress=progress)
    finish("asked", summary.to_dict(), as_json)


@command(PatchOptions)
def patch_command(options: PatchOptions, as_json: bool) -> None:
    """Put reconstructed vectors in the place of a model's own, and measure how its next token changes."""
    from nla_engine.referee.run import run_patch

    with progress_bar("texts") as progress:
        summary = run_patch(options, announce=say, progress=progress)
    finish("patched", summary.to_dict(), as_json, told=summary.told())


@command(ClausesOptions)
def clauses_command(options: ClausesOptions, as_json: bool) -> None:
    """Leave out, swap and negate each clause of explanations, and measure what their vectors lose."""
    from nla_engine.referee.clause_run import run_clauses

    with progress_bar("texts") as progress:
        summary = run_clauses(options, announce=say, progress=progress)
    finish("clauses", summary.to_dict(), as_json)


@command(ClaimsOptions)
def claims_command(options: ClaimsOptions, as_json: bool) -> None:
    """Compare what explanations say with the text that the model had read, by rules or with a judge."""
    from nla_engine.referee.claim_run import run_claims

    with progress_bar("texts") as progress:
        summary = run_claims(options, announce=say, progress=progress)
    finish("claims", summary.to_dict(), as_json)


@command(ControlsOptions)
def controls_command(options: ControlsOptions, as_json: bool) -> None:
    """What explanations add to the text: their scores over those of texts that never saw the vector."""
    from nla_engine.referee.controls import run_controls

    with progress_bar("texts") as progress:
        summary = run_controls(options, announce=say, progress=progress)
    finish("controls", summary.to_dict(), as_json, told=summary.told())


@command(LensOptions)
def lens_command(options: LensOptions, as_json: bool) -> None:
    """The logit lens: read stored activations with the captured model's own final norm and head, as next tokens."""
    from nla_engine.roundtrip.lens import run_lens

    with progress_bar("rows") as progress:
        summary = run_lens(options, announce=say, progress=progress)
    finish("lens", summary.to_dict(), as_json)


@command(TrainOptions)
def train_command(options: TrainOptions, as_json: bool) -> None:
    """Train a pair for a model: an AV and an AR by supervised steps, then both by reinforcement."""
    from nla_engine.train.run import run_train

    with progress_bar("steps") as progress:
        summary = run_train(options, announce=say, progress=progress)
    facts = summary.to_dict()
    short = {key: value for key, value in facts.items() if key not in ("warm", "last")}
    measured = {f"{key} (held out)": value for key, value in facts["last"].items() if key != "samples"}
    finish("trained", facts, as_json, told=short | measured)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Directory for the store, the table and the page.")
    ] = Path("nla-demo"),
    problems: Annotated[
        int, typer.Option("--problems", help="Held-out multiplication problems.", min=2)
    ] = 64,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:N or cpu.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which problems.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a demo that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Run everything on the bundled models: capture, explain, reconstruct, score, write the page. A CPU is enough."""
    from nla_engine.demo.run import run_demo, told

    summary, samples = run_demo(
        out,
        problems=problems,
        device=device,
        seed=seed,
        overwrite=overwrite,
        announce=say,
        progress=progress_bar,
    )
    shown = results(as_json)
    for sample in samples:
        text = textwrap.indent(f"{sample.truth}\n{sample.explanation}", "  ")
        shown.print(
            f"\n[bold]{escape(sample.heading)}[/bold]\n{escape(text)}", soft_wrap=True, highlight=False
        )
    shown.print()
    finish("demo", summary, as_json, told=told(summary))
