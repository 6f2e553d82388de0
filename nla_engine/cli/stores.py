"""Commands on stores and files of vectors: info, verify, export, import, merge, variance."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nla_engine.cli.app import app
from nla_engine.cli.output import Json, finish, print_json, results, say
from nla_engine.cli.progress import progress_bar
from nla_engine.options import check_local
from nla_engine.sites import PARTS
from nla_engine.store.shown import plural

if TYPE_CHECKING:
    from nla_engine.store.care.verify import Check

StorePath = Annotated[str, typer.Argument(help="A store that capture wrote, or s3://...", metavar="STORE")]

SiteName = Annotated[
    str | None,
    typer.Option("--site", help=f"Site of the layer: {', '.join(PARTS)}. [default: resid_post, if there]"),
]


@app.command()
def info(store: StorePath, as_json: Json = False) -> None:
    """Show what a store holds and which run made it."""
    from nla_engine.cli.page import counted, facts, show_page
    from nla_engine.store import CaptureStore

    opened = CaptureStore.open(store)
    counts = counted(opened)
    show_page(opened, counts, results(as_json))
    if as_json:
        print_json(facts(opened, counts))


@app.command()
def verify(
    store: StorePath,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Also read a sample again with this model in plain transformers, and compare."
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", help="Number of sequences that --model reads again.", min=1)
    ] = 32,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:N or cpu, for --model.")] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Rewrite a damaged store without the sequences that lost data."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="List every check of a sound store, not one line per group.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a store's structure, every checksum and its commit. Exit code 1 if something is wrong and not repaired."""
    from nla_engine.store.care.repair import repair as run_repair
    from nla_engine.store.care.verify import verify as run_checks

    checks, repaired = run_repair(store) if repair else (run_checks(store), None)
    sound = repaired is not None or all(check.ok for check in checks)
    audited = _audit(store, model, sample, device) if model is not None and sound else []
    listed = checks if verbose or not all(check.ok for check in checks) else _by_group(checks)
    listed = [*listed, *audited]
    checks += audited
    table = Table(box=None)
    for heading in ("check", "", "detail"):
        table.add_column(heading, overflow="fold")
    for check in listed:
        table.add_row(escape(check.name), "ok" if check.ok else "FAILED", escape(check.detail))
    good = sound and all(check.ok for check in audited)
    failed = sum(not check.ok for check in checks)
    verdict = f"{failed} of {len(checks)} checks failed" if failed else f"sound: {len(checks)} checks"
    if repaired is not None:
        verdict += f"; {repaired}"
    elif repair:
        verdict += "; nothing to repair"
    shown = results(as_json)
    shown.print(table)
    shown.print(escape(f"{store}: {verdict}"), highlight=False, soft_wrap=True)
    for check in checks:
        if not check.ok:  # once more, where the eye is when a long table has run by
            shown.print(escape(f"FAILED {check.name}: {check.detail}"), highlight=False, soft_wrap=True)
    if as_json:
        outcome = {"ok": good, "repair": repaired and repaired.to_dict()}
        print_json({**outcome, "checks": [dataclasses.asdict(check) for check in checks]})
    if not good:
        raise typer.Exit(1)


def _by_group(checks: list[Check]) -> list[Check]:
    """What a sound store's checks say: a line per group of arrays, and one for the relations between arrays."""
    arrays: dict[str, set[str]] = {}
    others = []
    for check in checks:
        name, what = check.name.rpartition(" ")[::2]
        if "/" in name and what in ("metadata", "data"):
            arrays.setdefault(name.split("/")[0], set()).add(name)
        else:
            others.append(check)
    relations = len(others) - 1
    return [
        others[0],
        *(
            replace(others[0], name=group, detail=f"{plural(len(names), 'array')}, every checksum matches")
            for group, names in arrays.items()
        ),
        replace(others[0], name="structure", detail=f"{relations} relations between files and arrays hold"),
    ]


def _audit(store: str, model: str, sample: int, device: str | None) -> list[Check]:
    from nla_engine.capture.audit import audit
    from nla_engine.models.captured import load_captured
    from nla_engine.models.load import pick_device
    from nla_engine.store import CaptureStore

    opened = CaptureStore.open(store)
    lm = load_captured(model, opened.provenance, pick_device(device))
    with progress_bar("sequences") as progress:
        progress.phase("reading again", "sequences")
        return audit(opened, lm, sample=sample, progress=progress)


@app.command()
def export(
    store: StorePath,
    to: Annotated[str, typer.Option("--to", help="parquet, nla, datasets, safetensors or npy.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, or the directory of shards.")],
    layer: Annotated[
        int | None, typer.Option("--layer", help="Layer. [default: the store's only one]")
    ] = None,
    site: SiteName = None,
    where: Annotated[str | None, typer.Option("--where", help="Rows to export, as an expression.")] = None,
    shard_rows: Annotated[
        int | None, typer.Option("--shard-rows", help="Rows per file; OUT is then a directory.", min=1)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists; never a directory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a store's rows, decoded to float32, for other tools. nla is the Parquet format of NLA training data."""
    from nla_engine.store import CaptureStore
    from nla_engine.store.exchange.export import export as run_export

    check_local(out)
    opened = CaptureStore.open(store)
    rows = run_export(
        opened,
        to,
        out,
        layer=layer,
        site=site,
        where=where,
        overwrite=overwrite,
        shard_rows=shard_rows,
        announce=say,
    )
    facts = {"out": str(out), "to": to, "layer": opened.chosen_layer(layer, site).key, "rows": rows}
    finish("exported", facts, as_json)


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="Parquet, safetensors or npy; or a directory of shards.", metavar="SOURCE")
    ],
    out: Annotated[Path, typer.Option("--out", help="The Zarr store to write.")],
    layer: Annotated[
        int | None, typer.Option("--layer", help="Layer of the vectors. [default: what the file says]")
    ] = None,
    site: SiteName = None,
    codec: Annotated[str, typer.Option("--codec", help="How rows are stored: int8, int4 or bf16.")] = "bf16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Make a store from vectors of another tool. Rows of one number in a column sequence become one sequence."""
    from nla_engine.store.exchange.importing import import_rows

    check_local(source, out)
    made = import_rows(source, out, layer=layer, site=site, codec=codec, overwrite=overwrite)
    finish("imported", {"store": str(out), **dataclasses.asdict(made)}, as_json)


@app.command()
def merge(
    stores: Annotated[
        list[str],
        typer.Argument(help="Two or more stores, or all parts of a run, in any order.", metavar="STORE..."),
    ],
    out: Annotated[str, typer.Option("--out", help="The Zarr store to write, or s3://...")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Join stores with the same run parameters, one after the other, or the parts that capture --shard made."""
    from nla_engine.store.exchange.merge import merge as run_merge

    with progress_bar("sequences") as progress:
        merged = run_merge(stores, out, overwrite=overwrite, progress=progress)
    facts = {
        "store": out,
        "complete": merged.complete,
        "rows": merged.rows,
        "sequences": merged.sequences,
        "layers": [site.key for site in merged.sites],
    }
    finish("merged", facts, as_json)


@app.command()
def variance(
    file: Annotated[Path, typer.Argument(help="A Parquet file with a column of vectors.", metavar="FILE")],
    column: Annotated[
        str, typer.Option("--column", help="Name of the column that holds the vectors.")
    ] = "activation_vector",
    as_json: Json = False,
) -> None:
    """Measure Var (--variance of roundtrip) of the vectors in a Parquet file, without zero and non-finite ones."""
    from nla_engine.roundtrip.variance import measure_variance

    check_local(file)
    with progress_bar("rows") as progress:
        measured = measure_variance(file, column, progress)
    finish("variance", measured.to_dict(), as_json)
