"""`nla-engine demo`: both stages on the bundled models, the facts that explanations get right, and the page.

Calls the stages as any user does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions, RoundtripOptions
from nla_engine.demo.claims import operands_named
from nla_engine.demo.explanations import answer_correct, token_named
from nla_engine.demo.problems import held_out_problems, prompt_record
from nla_engine.errors import RequestError
from nla_engine.report import write_report
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.store import CaptureStore
from nla_engine.store.directory import check_directory
from nla_engine.store.lease import Lease
from nla_engine.store.shards import make_directory, write_file_atomically, writing

TRIO = Path(__file__).parent / "trio"
LAYER = 5
#: Files that a demo writes.
FILES = ("problems.jsonl", "run.zarr", "explained.parquet", "report.html")


class DemoModels(NamedTuple):
    """The bundled models: directories as text, and the layer that AV and AR were made for."""

    base: str
    av: str
    ar: str
    layer: int


def demo_models() -> DemoModels:
    """The bundled base model, AV and AR, for examples that need no download."""
    return DemoModels(str(TRIO / "base"), str(TRIO / "av"), str(TRIO / "ar"), LAYER)


@dataclass(frozen=True)
class Sample:
    """One explanation to show. heading: the token, its place and its scores; truth: the problem of its sequence."""

    heading: str
    truth: str
    explanation: str


#: What the printed summary says of each figure.
MEANINGS = {
    "rows": "vectors captured, each put into words and rebuilt from them",
    "cos": "between vector and rebuilt vector, on average; 1 is perfect",
    "fve_nrm": "part of the vectors' variance that the words carried; 1 is perfect",
    "cos_shuffled": "the same as cos against a vector of another problem: what chance gives",
    "retrieval_top1": "how often no other vector is nearer to the rebuilt one",
    "base_accuracy": "of the base model's answers are right",
    "operand_accuracy": "of the explanations name both numbers of the problem",
    "token_accuracy": "of the explanations name the token that was read",
    "seconds": "for capture and round trip together",
    "store": "",
    "explained": "",
    "report": "open this one",
}


def told(summary: dict[str, Any]) -> dict[str, str]:
    """The summary for people: a figure and what it means."""
    facts = {}
    for key, meaning in MEANINGS.items():
        value = summary[key]
        figure = (
            f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
        )
        facts[key] = f"{figure:<6}   {meaning}".rstrip()
    return facts


def run_demo(
    out: Path,
    *,
    problems: int,
    device: str | None,
    seed: int,
    overwrite: bool,
    announce: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> tuple[dict[str, Any], list[Sample]]:
    """Capture and round-trip `problems` held-out multiplications into the directory `out`.

    Returns the summary (keys of `--json`) and three sample explanations. RequestError if one of the demo's files
    exists and `overwrite` is false.
    """
    _check_out(out, overwrite)
    with writing(out):
        make_directory(out)
    with Lease.of_directory(out):
        _check_out(out, overwrite)  # again: another run may have just ended
        return _run(out, problems, device, seed, announce, progress)


def _run(
    out: Path,
    problems: int,
    device: str | None,
    seed: int,
    announce: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> tuple[dict[str, Any], list[Sample]]:
    prompts = out / "problems.jsonl"
    records = [prompt_record(problem) for problem in held_out_problems(problems, seed)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file_atomically(prompts, lines.encode())
    announce(f"1  capture: {problems} multiplications that verbalizer and reconstructor never saw")
    capture_options = CaptureOptions(
        model=str(TRIO / "base"),
        prompts=(prompts,),
        layer=(LAYER,),
        out=str(out / "run.zarr"),
        max_new_tokens=32,
        device=device,
        overwrite=True,
    )
    with progress("sequences") as update:
        captured = run_capture(capture_options, announce=announce, progress=update)
    announce("2  round trip: every captured row into words and back")
    roundtrip_options = RoundtripOptions(
        store=str(out / "run.zarr"),
        av=str(TRIO / "av"),
        ar=str(TRIO / "ar"),
        out=out / "explained.parquet",
        device=device,
        overwrite=True,
    )
    with progress("explanations") as update:
        scored = run_roundtrip(roundtrip_options, announce=announce, progress=update)
    announce("3  page: every explanation beside its token")
    page = write_report(
        CaptureStore.open(out / "run.zarr"),
        out / "explained.parquet",
        out / "report.html",
        title=f"{problems} multiplications, put into words",
        overwrite=True,
    )
    summary = {
        "capture_rows_per_second": captured.rows_per_second,
        **{key: value for key, value in scored.to_dict().items() if key not in ("out", "layer")},
        "sequences": captured.sequences,
        "seconds": round(captured.seconds + scored.seconds, 1),
        **check_facts(out / "run.zarr", out / "explained.parquet"),
        "store": captured.store,
        "explained": scored.out,
        "report": page.out,
    }
    return summary, choose_samples(out / "run.zarr", out / "explained.parquet")


def _check_out(out: Path, overwrite: bool) -> None:
    check_directory(out)
    there = [name for name in FILES if (out / name).exists()]
    if there and not overwrite:
        raise RequestError(
            f"{out / there[0]}: exists; choose another --out, or pass --overwrite to replace {', '.join(FILES)} there"
        )


def check_facts(store_path: Path, explained: Path) -> dict[str, float]:
    """Shares of right answers among sequences, and of right operands and right tokens among explanations."""
    store = CaptureStore.open(store_path)
    sequences = list(store.iter_sequences())
    records = [sequence.source for sequence in sequences]
    right = [answer_correct(sequence.generated_text(), sequence.source["product"]) for sequence in sequences]
    rows = pq.read_table(explained, columns=["sequence", "token", "explanation"]).to_pylist()
    operands = [
        operands_named(row["explanation"]) == (records[row["sequence"]]["a"], records[row["sequence"]]["b"])
        for row in rows
    ]
    tokens = [token_named(row["explanation"]) == row["token"] for row in rows]
    return {
        "base_accuracy": round(sum(right) / len(right), 4),
        "operand_accuracy": round(sum(operands) / len(operands), 4),
        "token_accuracy": round(sum(tokens) / len(tokens), 4),
    }


def choose_samples(store_path: Path, explained: Path) -> list[Sample]:
    """The best, the middle and the worst explanation by cos: not only the flattering one."""
    store = CaptureStore.open(store_path)
    rows = pq.read_table(explained).to_pylist()
    ordered = sorted((row for row in rows if row["cos"] is not None), key=lambda row: -row["cos"])
    chosen = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]}
    return [
        Sample(
            f"{name}: sequence {row['sequence']}, position {row['position']}, read {row['token']!r}, next "
            f"{row['next_token']!r}   cos {row['cos']:.3f}  fve {row['fve_nrm']:.3f}  rank {row['retrieval_rank']}",
            f"(The problem was {_problem(store.sequence(row['sequence']).source)}.)",
            row["explanation"],
        )
        for name, row in chosen.items()
    ]


def _problem(record: Any) -> str:
    """The multiplication of a sequence."""
    return f"{record['a']} × {record['b']} = {record['product']}"
