"""Commands on a store: info, verify, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nla_engine.cli.app import app
from nla_engine.cli.output import Json, console, finish, print_json, progress_bar

if TYPE_CHECKING:
    from nla_engine.store.verify import Check

StorePath = Annotated[str, typer.Argument(help="A store that capture wrote, or s3://...", metavar="STORE")]


@app.command()
def info(store: StorePath, as_json: Json = False) -> None:
    """What a store holds, and which run made it."""
    from nla_engine.store import CaptureStore

    opened = CaptureStore.open(store)
    facts = {
        "store": str(store),
        "complete": opened.complete,
        "rows": opened.rows,
        "sequences": opened.sequences,
        "layers": list(opened.layers),
        "d_model": opened.d_model,
        "codec": opened.codec.name,
        "row_bytes": opened.codec.row_bytes,
        "codec_error": opened.attributes.get("codec_error"),
        "sink_norm": opened.attributes.get("sink_norm"),
        **opened.provenance,
    }
    finish("store", facts, as_json)


@app.command()
def verify(
    store: StorePath,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Also read a sample again with this model, by plain transformers."),
    ] = None,
    sample: Annotated[int, typer.Option("--sample", help="Sequences that --model reads again.", min=1)] = 32,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:N or cpu, for --model.")] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Rewrite a damaged store: drop the sequences that lost something."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a store's structure, every checksum, and its commit. Exit code 1 if anything is wrong (and stays so)."""
    from nla_engine.store.repair import repair as run_repair
    from nla_engine.store.verify import verify as run_checks

    checks, repaired = run_repair(store) if repair else (run_checks(store), None)
    if model is not None and all(check.ok for check in checks):
        checks += _audit(store, model, sample, device)
    table = Table("check", "", "detail", box=None)
    for check in checks:
        table.add_row(escape(check.name), "ok" if check.ok else "FAILED", escape(check.detail))
    console.print(table)
    if repaired is not None:
        console.print(escape(str(repaired)))
    good = all(check.ok for check in checks)
    if as_json:
        outcome = {"ok": good or repaired is not None, "repair": repaired and repaired.to_dict()}
        print_json({**outcome, "checks": [dataclasses.asdict(check) for check in checks]})
    if not good and repaired is None:
        raise typer.Exit(1)


def _audit(store: str, model: str, sample: int, device: str | None) -> list[Check]:
    from nla_engine.audit import audit
    from nla_engine.models import load_model, pick_device, pick_dtype
    from nla_engine.store import CaptureStore

    opened, chosen = CaptureStore.open(store), pick_device(device)
    lm = load_model(model, device=chosen, dtype=pick_dtype(opened.provenance.get("dtype"), chosen))
    with progress_bar("sequences") as progress:
        return audit(opened, lm, sample=sample, progress=progress)


@app.command()
def export(
    store: StorePath,
    to: Annotated[str, typer.Option("--to", help="parquet, safetensors or npy.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    layer: Annotated[
        int | None, typer.Option("--layer", help="Layer. [default: the store's only one]")
    ] = None,
    where: Annotated[str | None, typer.Option("--where", help="Which rows, as an expression.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a store's rows as Parquet, safetensors or npy, decoded to float32."""
    from nla_engine.store import CaptureStore
    from nla_engine.store.export import export as run_export

    opened = CaptureStore.open(store)
    rows = run_export(opened, to, out, layer=layer, where=where, overwrite=overwrite)
    finish("exported", {"out": str(out), "to": to, "rows": rows}, as_json)
