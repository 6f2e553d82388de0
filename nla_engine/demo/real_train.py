"""The recipe of the real pair: `python -m nla_engine.demo.real_train --out DIR`.

Captures what SmolLM2-135M-Instruct thinks while it reads its own replies and documentation, and trains an AV and an AR
on that with `nla-engine train`. Holds the order of steps and the sizes. `--scale 0.004` runs everything small, on a CPU
too, and learns nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions, TrainOptions
from nla_engine.demo import smollm2
from nla_engine.demo.real_corpus import documentation, prompts
from nla_engine.demo.told import Told
from nla_engine.errors import NLAError, RequestError
from nla_engine.store import CaptureStore
from nla_engine.train.checkpoint import read_place
from nla_engine.train.run import CHECKPOINT, run_train

#: Layers that --sweep captures and compares; the one that the pair is for.
LAYERS, LAYER = (12, 16, 20, 24), 20
PROMPTS, REPLIES, DOCUMENTS = 4000, 2, 1500
REPLY_TOKENS, WINDOW_TOKENS, ROWS_PER_TEXT = 160, 224, 30
#: The chat template's system message, which is the same in every text, has fewer tokens.
MIN_POSITION = 24
STEPS = {"ar": 1050, "av": 1300, "rl": 210}
SWEEP_STEPS, SWEEP_MINUTES = 400, 1.0
RATE, RL_RATE = 4e-3, 6e-4
#: Tokens of a text with its tags: those by rule have about 42.
MOST_TOKENS = 64
RANKS = {"av": 16, "ar": 12}
#: Minutes of the budget that are kept for loading models and writing the pair, and the least for training.
KEPT, LEAST = 0.5, 0.5
#: Below this scale, batches and steps are small too.
SMALL = 0.1


def write_corpus(out: Path, base: Path, scale: float, seed: int, device: str | None, told: Told) -> Path:
    """The texts, as JSON lines: sampled replies in the chat template with their prompts, and documentation."""
    count = max(20, round(PROMPTS * scale))
    file = out / "prompts.jsonl"
    _write(file, iter(prompts(count, seed)))
    replies = CaptureOptions(
        model=str(base),
        prompts=(file,),
        layer=(LAYER,),
        out=str(out / "replies.zarr"),
        positions="last",
        max_new_tokens=REPLY_TOKENS if scale >= SMALL else 24,
        replies=REPLIES,
        temperature=0.8,
        seed=seed,
        device=device,
        overwrite=True,
    )
    run_capture(replies, announce=told.say, progress=told)
    store = CaptureStore.open(out / "replies.zarr")
    told.phase("documentation")
    texts = documentation()
    draw = np.random.default_rng([seed, 2])
    chosen = draw.permutation(len(texts))[: max(10, round(DOCUMENTS * scale))]
    corpus = out / "corpus.jsonl"
    said = ({"id": each.source["id"], "text": each.text()} for each in store.iter_sequences())
    _write(corpus, [*said, *(texts[place] for place in chosen.tolist())])
    return corpus


def capture_rows(
    out: Path, base: Path, corpus: Path, layers: tuple[int, ...], seed: int, device: str | None, told: Told
) -> Path:
    """The store of rows: some of each text."""
    options = CaptureOptions(
        model=str(base),
        prompts=(corpus,),
        layer=layers,
        out=str(out / "rows.zarr"),
        corpus=True,
        text_column="text",
        max_tokens=WINDOW_TOKENS,
        long="windows",
        per_document=ROWS_PER_TEXT,
        min_position=MIN_POSITION,
        next_token=3,
        seed=seed,
        device=device,
        overwrite=True,
    )
    run_capture(options, announce=told.say, progress=told)
    return out / "rows.zarr"


def train_options(
    out: Path,
    store: Path,
    base: Path,
    layer: int,
    steps: dict[str, int],
    minutes: float | None,
    arguments: argparse.Namespace,
    resume: bool = False,
) -> TrainOptions:
    """What the recipe asks `train` for. minutes: of training"""
    small = arguments.scale < SMALL
    return TrainOptions(
        store=str(store),
        out=out,
        model=str(base),
        layer=layer,
        av_rank=RANKS["av"],
        ar_rank=RANKS["ar"],
        ar_steps=steps["ar"],
        av_steps=steps["av"],
        rl_steps=steps["rl"],
        batch_size=8 if small else 256,
        vectors=4 if small else 128,
        samples=4 if small else 8,
        rate=RATE,
        rl_rate=RL_RATE,
        measured_rows=8 if small else 512,
        max_new_tokens=MOST_TOKENS,
        tokens_at_once=2048 if small else 32768,
        slots=16 if small else 1024,
        budget=minutes,
        seed=arguments.seed,
        device=arguments.device,
        checkpoint_steps=100,
        resume=resume,
        overwrite=not resume,
    )


def sweep(out: Path, store: Path, base: Path, arguments: argparse.Namespace, told: Told) -> dict[int, float]:
    """By layer, the FVE that an AR reaches in a few steps on texts by rule: how much of a vector such texts can say."""
    found = {}
    for layer in LAYERS:
        steps = {"ar": SWEEP_STEPS if arguments.scale >= SMALL else 2, "av": 0, "rl": 0}
        options = train_options(out / f"sweep_{layer}", store, base, layer, steps, SWEEP_MINUTES, arguments)
        found[layer] = run_train(options, told.say, told).last["fve_given"]
        told.say(f"layer {layer}: FVE {found[layer]:.3f} of texts by rule")
    return found


def left(budget: float | None, told: Told) -> float | None:
    """Minutes that are left for training. RequestError if they are too few."""
    if budget is None:
        return None
    minutes = budget - told.seconds / 60 - KEPT
    if minutes < LEAST:
        raise RequestError(
            f"--budget {budget:g}: {told.seconds / 60:.1f} minutes went before training: raise it, or lower --scale"
        )
    return minutes


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; the last line printed is its report, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_engine.demo.real_train", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for the texts, the store and the pair"
    )
    parser.add_argument("--base", type=Path, help="checkpoint of SmolLM2 [default: made from its package]")
    parser.add_argument("--device", help="cuda, cuda:N or cpu [default: cuda if available]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="scales the texts and, below 0.1, the steps")
    parser.add_argument(
        "--budget",
        type=float,
        help="minutes of the whole recipe: training has what the rest leaves [default: until the steps are done]",
    )
    parser.add_argument("--layer", type=int, default=LAYER, choices=LAYERS)
    parser.add_argument("--sweep", action="store_true", help="compare the layers first")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take rows that were captured to the end, and go on with a training that was cut off",
    )
    parser.add_argument("--no-train", action="store_true", help="end before the pair is trained")
    options = parser.parse_args(arguments)
    told = Told()
    out: Path = options.out
    try:
        base = options.base or smollm2.cached()
        out.mkdir(parents=True, exist_ok=True)
        store, begun = out / "rows.zarr", out / "pair" / CHECKPOINT
        resume = options.resume and begun.exists()
        captured = store.exists() and CaptureStore.open(store).complete  # else it was cut off
        if not (resume or (options.resume and captured)):
            corpus = write_corpus(out, base, options.scale, options.seed, options.device, told)
            layers = LAYERS if options.sweep else (options.layer,)
            store = capture_rows(out, base, corpus, layers, options.seed, options.device, told)
        report: dict[str, Any] = {"capture_seconds": round(told.seconds, 1)}
        if options.sweep and not resume:
            report["sweep"] = sweep(out, store, base, options, told)
        if not options.no_train:
            share = 1.0 if options.scale >= SMALL else options.scale
            steps = {name: max(2, round(count * share)) for name, count in STEPS.items()}
            minutes = read_place(begun).options["budget"] if resume else left(options.budget, told)
            asked = train_options(out / "pair", store, base, options.layer, steps, minutes, options, resume)
            report |= run_train(asked, told.say, told).to_dict()
    except NLAError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    report["total_seconds"] = round(told.seconds, 1)
    print(json.dumps(report, ensure_ascii=False), flush=True)
    return 0


def _write(file: Path, records: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    sys.exit(main())
