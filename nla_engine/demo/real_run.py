"""A trained pair on its real model: `python -m nla_engine.demo.real_run --out DIR`, or `make demo-real`.

Captures natural replies to questions that the recipe's prompts do not have, explains and reconstructs them, asks the
referee what the words add to the text and what the model makes of them, and writes the page. Calls the stages as any
user does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions, ControlsOptions, PatchOptions, RoundtripOptions
from nla_engine.demo import smollm2
from nla_engine.demo.told import Told
from nla_engine.errors import CheckpointError, NLAError
from nla_engine.models.sidecar import read_sidecar
from nla_engine.referee.controls import run_controls
from nla_engine.referee.run import run_patch
from nla_engine.report import write_report
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.store import CaptureStore
from nla_engine.store.shards import make_directory, write_file_atomically

#: The pair that comes with the package; docs/training.md says how it was trained.
PAIR = Path(__file__).parent / "smollm2_pair"
#: The model of that pair, as the page calls it.
_BASE = "SmolLM2-135M-Instruct"
#: None of them names a topic of the recipe's prompts.
QUESTIONS = (
    "How do elevators know which floor to stop at first?",
    "Write four lines about a ferry that arrives too late.",
    "What is the capital of Portugal, and what is it known for?",
    "Explain what a budget deficit is, in two sentences.",
    "My bread knife is blunt. What can I do?",
    "Name three instruments in a string quartet.",
    "Why is the sky dark at night although there are so many stars?",
    "Write a Python function that returns the longest word of a sentence.",
    "What is 17 times 23? Show your work.",
    "Give me two reasons to keep a notebook.",
    "How is glass made?",
    "Write a short apology for missing a meeting.",
    "What is the difference between a lake and a lagoon?",
    "Who painted the ceiling of the Sistine Chapel?",
    "Describe the smell of a bakery to someone who has never been in one.",
    "List the planets in order of their distance from the sun.",
    "What should I pack for three days in Norway in March?",
    "Tell me about a dog that wanted to become a judge.",
    "How do I remove an ink stain from a white shirt?",
    "What does a notary do?",
    "Write a haiku about a ladder.",
    "Is zero an even number? Why?",
    "How long should I boil an egg?",
    "What is a good title for a talk about road safety?",
)
#: Rows begin there, or where the pair's training began: behind what is the same in every reply.
_LEAST_POSITION = 10
FILES = (
    "questions.jsonl",
    "run.zarr",
    "explained.parquet",
    "controls.parquet",
    "patched.parquet",
    "report.html",
)


def run(
    pair: Path,
    base: Path,
    out: Path,
    *,
    name: str,
    questions: int,
    rows: int,
    tokens: int,
    reader: str,
    device: str | None,
) -> dict[str, Any]:
    """The demo's summary: of the round trip, and what the referee says. rows: of each reply; tokens: of a reply

    name: of the base, in the page's title; reader: of the controls; none: no such control

    Replaces what an earlier run left in `out`. Raises what the stages raise.
    """
    sidecar = read_sidecar(pair / "ar", "ar")
    if sidecar.layer is None:
        raise CheckpointError(f"{pair / 'ar'}: does not say its layer: give a pair that train wrote")
    make_directory(out)
    prompts, store, explained, controls, patched, page = (out / file for file in FILES)
    told = Told()
    records = [{"prompt": question} for question in QUESTIONS[:questions]]
    write_file_atomically(prompts, "".join(json.dumps(each) + "\n" for each in records).encode())
    run_capture(
        CaptureOptions(
            model=str(base),
            prompts=(prompts,),
            layer=(sidecar.layer,),
            out=str(store),
            max_new_tokens=tokens,
            per_document=rows,
            min_position=max(_LEAST_POSITION, sidecar.min_position or 0),
            device=device,
            overwrite=True,
        ),
        announce=told.say,
        progress=told,
    )
    scored = run_roundtrip(
        RoundtripOptions(
            store=str(store),
            av=str(pair / "av"),
            ar=str(pair / "ar"),
            av_base=str(base),
            ar_base=str(base),
            out=explained,
            max_new_tokens=96,
            device=device,
            overwrite=True,
        ),
        announce=told.say,
        progress=told,
    )
    added = run_controls(
        ControlsOptions(
            store=str(store), explained=explained, out=controls, reader=reader, device=device, overwrite=True
        ),
        announce=told.say,
        progress=told,
    )
    believed = run_patch(
        PatchOptions(
            store=str(store), model=str(base), explained=explained, out=patched, device=device, overwrite=True
        ),
        announce=told.say,
        progress=told,
    )
    told.phase("page")
    written = write_report(
        CaptureStore.open(store),
        explained,
        page,
        title=f"{len(records)} replies of {name}, put into words",
        also=(controls, patched),
        overwrite=True,
    )
    return {
        "round_trip": scored.to_dict(),
        "controls": added.to_dict(),
        "patch": believed.to_dict(),
        "report": written.out,
        "seconds": round(told.seconds, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the last line printed is its summary, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_engine.demo.real_run", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--pair",
        type=Path,
        default=PAIR,
        help="directory with av and ar, as train writes them [default: bundled]",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for the store, the tables and the page"
    )
    parser.add_argument(
        "--base", type=Path, help="model of the pair [default: SmolLM2, made from its package]"
    )
    parser.add_argument("--device", help="cuda, cuda:N or cpu [default: cuda if available]")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many questions")
    parser.add_argument("--rows", type=int, default=8, help="rows of each reply")
    parser.add_argument("--tokens", type=int, default=48, help="longest reply")
    parser.add_argument(
        "--reader", default="none", help="also compare with what this model writes of the text alone; or none"
    )
    options = parser.parse_args(arguments)
    try:
        summary = run(
            options.pair,
            options.base or smollm2.cached(),
            options.out,
            name=options.base.name if options.base else _BASE,
            questions=options.questions,
            rows=options.rows,
            tokens=options.tokens,
            reader=options.reader,
            device=options.device,
        )
    except NLAError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(summary, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
