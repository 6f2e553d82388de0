"""Writes the tables of measured results from results/*.csv: six figures into README.md, all into docs/benchmarks.md.

    python benchmarks/tables.py [--check] [--root DIR]

Each table stands between two markers of its page. A case that was measured several times on one GPU counts with its
last run. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.bench.report import format_number, read_csv

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """A line of the README's table. Every case is named by suite and by its name in the CSV file.

    peers: what the figure is compared with: in words, its suite, its case.
    """

    what: str
    gpu: str
    suite: str
    case: str
    peers: tuple[tuple[str, str, str], ...] = ()


_H200, _H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
FIGURES = (
    Figure(
        "Capture, 512 requests (64 prompt, 128 new tokens), layer 20, to disk",
        _H200,
        "generate",
        "qwen2.5-7b: 512 x 64+128 layer 20 to disk",
        peers=(
            (
                "vLLM 0.22.1, no capture",
                "generate",
                "qwen2.5-7b: vLLM 0.22.1 512 x 64+128 B=512, no capture",
            ),
            (
                "Hugging Face `generate` with hidden states",
                "generate",
                "qwen2.5-7b: HF generate output_hidden_states B=256 64+128",
            ),
        ),
    ),
    Figure(
        "Cost of tapping one layer, decode steps of 64 sequences",
        _H200,
        "generate",
        "qwen2.5-7b: tap cost B=64 layer 20",
        peers=(("all 28 layers", "generate", "qwen2.5-7b: tap cost B=64 all layers"),),
    ),
    Figure(
        "Round trip, AV (120 tokens per vector) and AR on one GPU",
        _H200,
        "roundtrip",
        "qwen2.5-7b: 2048 vectors 125+120 and 137",
        peers=(
            ("Hugging Face, AV alone", "verbalize", "qwen2.5-7b: HF generate inputs_embeds B=256 125+120"),
            ("Hugging Face, AR alone", "reconstruct", "qwen2.5-7b: HF dense B=64 140 tokens"),
        ),
    ),
    Figure(
        "Row encoder on the GPU, int8, 65,536 rows of 3,584 channels",
        _H200,
        "kernels",
        "qwen2.5-7b: encode int8 65536 x 3584 (cuda)",
    ),
    Figure(
        "Store writer, the same rows, synced to disk",
        _H200,
        "store",
        "qwen2.5-7b: write int8 65536 x 3584",
        peers=(
            (
                "zarr-python, equal chunks, not synced",
                "store",
                "qwen2.5-7b: zarr-python write int8 65536 x 3584",
            ),
        ),
    ),
    Figure(
        "Capture, SmolLM2-135M, 2,048 chats, every position of layer 21, to disk",
        _H100,
        "real",
        "smollm2: 2048 chats, up to 256 new tokens, all positions, layer 21 to disk",
        peers=(
            (
                "Hugging Face `generate`, no capture",
                "real",
                "smollm2: HF generate, no capture B=1024 up to 256",
            ),
        ),
    ),
)


def latest(results: Path) -> list[dict[str, Any]]:
    """The last line of every (gpu, suite, case, unit), suite by suite, in the order in which they first appear."""
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(results.glob("*.csv")):
        for line in read_csv(path):
            key = (line["gpu"], line["suite"], line["case"], line["unit"])
            if key not in lines or line["date"] >= lines[key]["date"]:
                lines[key] = line
    suites = list(dict.fromkeys(line["suite"] for line in lines.values()))
    return sorted(lines.values(), key=lambda line: suites.index(line["suite"]))


def value_of(line: dict[str, Any]) -> str:
    """The median with its unit."""
    return f"{format_number(line['p50'])} {line['unit']}"


def part_of(line: dict[str, Any]) -> str:
    """How much of the hardware's limit the median reaches; empty where none is known."""
    return "" if line["limit_fraction"] is None else f"{line['limit_fraction']:.0%}"


def figures(lines: list[dict[str, Any]]) -> str:
    """The README's table. LookupError if a case has no result."""
    by_name = {(line["gpu"], line["suite"], line["case"]): line for line in lines}

    def find(gpu: str, suite: str, case: str) -> dict[str, Any]:
        if (gpu, suite, case) not in by_name:
            raise LookupError(f"no result of suite {suite} on {gpu} is called {case!r}")
        return by_name[gpu, suite, case]

    out = ["| what | GPU | median | of limit | for comparison |", "|---|---|---:|---:|---|"]
    for figure in FIGURES:
        line = find(figure.gpu, figure.suite, figure.case)
        peers = "; ".join(
            f"{words}: {value_of(find(figure.gpu, suite, case))}" for words, suite, case in figure.peers
        )
        gpu = figure.gpu.removeprefix("NVIDIA ").split()[0]
        out.append(f"| {figure.what} | {gpu} | {value_of(line)} | {part_of(line)} | {peers} |")
    return "\n".join(out)


def model_of(line: dict[str, Any]) -> str:
    """With which a case begins."""
    return str(line["case"]).partition(": ")[0]


def full(lines: list[dict[str, Any]]) -> str:
    """One table per GPU and model; its heading names the dates and versions that are in it."""
    parts = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["gpu"], model_of(line)), []).append(line)
    # What is measured most comes first.
    for (gpu, model), mine in sorted(groups.items(), key=lambda group: -len(group[1])):
        dates, versions = (
            ", ".join(sorted({line[name][:10] if name == "date" else line[name] for line in mine}))
            for name in ("date", "versions")
        )
        parts += [f"## {model}, {gpu}", "", f"Measured {dates}; {versions}", ""]
        parts += ["| suite | case | median | of limit | ratio (baseline) | commit |"]
        parts += ["|---|---|---:|---:|---|---|"]
        for line in mine:
            ratio = "" if line["ratio"] is None else f"{line['ratio']:.3g} ({line['baseline']})"
            case = line["case"].removeprefix(f"{model}: ")
            parts.append(
                f"| {line['suite']} | {case} | {value_of(line)} | {part_of(line)} | {ratio} | {line['commit']} |"
            )
        parts.append("")
    return "\n".join(parts).rstrip()


def replaced(path: Path, table: str) -> tuple[str, str]:
    """The text of a page, and the same with this table between the markers. LookupError if it has no markers."""
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(START)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise LookupError(f"{path} has no {START} ... {END}")
    return text, f"{before}{START}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """0 done, or nothing to do; 1 with --check if a table is stale; 2 if markers or a result are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    root = options.root
    lines = latest(root / "benchmarks" / "results")
    try:
        pages = {
            path: replaced(path, table)
            for path, table in (
                (root / "README.md", figures(lines)),
                (root / "docs" / "benchmarks.md", full(lines)),
            )
        }
    except LookupError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    stale = [path for path, (text, fresh) in pages.items() if text != fresh]
    if options.check:
        for path in stale:
            print(f"error: {path}: its table is stale: run benchmarks/tables.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(pages[path][1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
