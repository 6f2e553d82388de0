"""Writes the README's table of measured results, between its two markers, from results/*.csv.

    python benchmarks/readme_table.py [--check] [--readme README.md] [--results benchmarks/results]

Of a case that was measured several times on one GPU, the last run counts. Measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nla_engine.bench.report import format_number, read_csv

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
ROOT = Path(__file__).resolve().parent.parent


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


def model_of(line: dict[str, Any]) -> str:
    """With which a case begins."""
    return str(line["case"]).partition(": ")[0]


def markdown(lines: list[dict[str, Any]]) -> str:
    """One table a GPU and model; its heading says the dates and versions that are in it."""
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
        parts += [f"{gpu}; {model}; {dates}; {versions}", ""]
        parts += ["| suite | case | median | of limit | times the baseline | commit |"]
        parts += ["|---|---|---:|---:|---|---|"]
        for line in mine:
            part = "" if line["limit_fraction"] is None else f"{line['limit_fraction']:.0%}"
            ratio = "" if line["ratio"] is None else f"{line['ratio']:.1f} ({line['baseline']})"
            value = f"{format_number(line['p50'])} {line['unit']}"
            case = line["case"].removeprefix(f"{model}: ")
            parts.append(f"| {line['suite']} | {case} | {value} | {part} | {ratio} | {line['commit']} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """0 done, or nothing to do; 1 with --check if the README is stale; 2 if it has no markers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the table is stale"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    before, found, rest = text.partition(START)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        print(f"error: {options.readme}: has no {START} ... {END}", file=sys.stderr)
        return 2
    fresh = f"{before}{START}\n{markdown(latest(options.results))}\n{END}{after}"
    if fresh == text:
        return 0
    if options.check:
        print(f"error: {options.readme}: its table is stale: run benchmarks/readme_table.py", file=sys.stderr)
        return 1
    options.readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
