"""The command line: options from the dataclasses of `config`, progress bars, one-line errors, exit codes.

Exit codes: 0 done; 1 the work failed; 2 the request is wrong. Holds no logic of a stage.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from nla_engine.config import CaptureOptions, Options, RoundtripOptions
from nla_engine.errors import NLAError

if TYPE_CHECKING:
    from nla_engine.store.verify import Check

app = typer.Typer(
    name="nla-engine",
    help="Capture a language model's activations, explain them in words, and measure how far the words can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
#: Everything for people goes to stderr; stdout carries results.
console = Console(stderr=True)

#: What typer makes of Ctrl-C, without a word.
TYPER_INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON line, last on stdout.")]


def _print_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import version

    from nla_engine import extension

    typer.echo(f"nla_engine {version('nla_engine')}")
    if missing := extension.why_missing():
        typer.echo(missing)
    raise typer.Exit


_VERSION_HELP = "Print the version and what is missing, then stop."


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help=_VERSION_HELP, is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del debug, version  # the first is read when an error is told, the second has done its work


def _command(options: type[Options], *arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(options, as_json)` as a command whose parameters are the fields of a dataclass."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(options)
        parameters = [
            _parameter(field, hints[field.name], arguments) for field in dataclasses.fields(options)
        ]
        parameters.append(
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
        )

        def command(**values: Any) -> None:
            as_json = values.pop("as_json")
            values = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
            }
            function(options(**values), as_json)

        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(function.__name__.removesuffix("_command"))(command)
        return function

    return register


def _parameter(field: dataclasses.Field[Any], hint: Any, arguments: tuple[str, ...]) -> inspect.Parameter:
    help = field.metadata["help"]
    if hint == tuple[int, ...]:
        hint = list[int]
    if field.name in arguments:
        marker: Any = typer.Argument(help=help, metavar=field.name.upper())
    else:
        flag = "--" + field.name.replace("_", "-")
        if typing.get_origin(hint) is types.UnionType and bool in typing.get_args(hint):
            flag += "/--raw"
        marker = typer.Option(flag, help=help)
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, marker]
    )


@_command(CaptureOptions, "model")
def capture_command(options: CaptureOptions, as_json: bool) -> None:
    """Stage 1: run prompts through a model and store one layer's (or several layers') activations."""
    from nla_engine.capture import run_capture

    with _progress("sequences") as progress:
        summary = run_capture(options, announce=_say, progress=progress)
    _finish("captured", summary.to_dict(), as_json)


@_command(RoundtripOptions, "store")
def roundtrip_command(options: RoundtripOptions, as_json: bool) -> None:
    """Stage 2: explain stored activations with an AV, read the words back with an AR, and score them."""
    from nla_engine.roundtrip import run_roundtrip

    with _progress("explanations") as progress:
        summary = run_roundtrip(options, announce=_say, progress=progress)
    _finish("round trip", summary.to_dict(), as_json)


StorePath = Annotated[Path, typer.Argument(help="A store that capture wrote.", metavar="STORE")]


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
    _finish("store", facts, as_json)


@app.command()
def verify(
    store: StorePath,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Also read a sample again with this model, by plain transformers."),
    ] = None,
    sample: Annotated[int, typer.Option("--sample", help="Sequences that --model reads again.", min=1)] = 32,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:N or cpu, for --model.")] = None,
    as_json: Json = False,
) -> None:
    """Check a store's structure, every checksum, and its commit. Exit code 1 if anything is wrong."""
    from nla_engine.store.verify import verify as run_checks

    checks = run_checks(store)
    if model is not None and all(check.ok for check in checks):
        checks += _audit(store, model, sample, device)
    table = Table("check", "", "detail", box=None)
    for check in checks:
        table.add_row(escape(check.name), "ok" if check.ok else "FAILED", escape(check.detail))
    console.print(table)
    good = all(check.ok for check in checks)
    if as_json:
        _print_json({"ok": good, "checks": [dataclasses.asdict(check) for check in checks]})
    if not good:
        raise typer.Exit(1)


def _audit(store: Path, model: str, sample: int, device: str | None) -> list[Check]:
    from nla_engine.audit import audit
    from nla_engine.models import load_model, pick_device, pick_dtype
    from nla_engine.store import CaptureStore

    opened, chosen = CaptureStore.open(store), pick_device(device)
    lm = load_model(model, device=chosen, dtype=pick_dtype(opened.provenance.get("dtype"), chosen))
    with _progress("sequences") as progress:
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
    _finish("exported", {"out": str(out), "to": to, "rows": rows}, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the store and the table.")] = Path(
        "nla-demo"
    ),
    problems: Annotated[
        int, typer.Option("--problems", help="Held-out multiplication problems.", min=2)
    ] = 64,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:N or cpu.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which problems.")] = 0,
    as_json: Json = False,
) -> None:
    """The whole job on the bundled models: capture, explain, reconstruct, score. A CPU is enough."""
    from nla_engine.demo.run import run_demo

    summary, samples = run_demo(
        out, problems=problems, device=device, seed=seed, announce=_say, progress=_progress
    )
    for sample in samples:
        text = textwrap.indent(sample.explanation, "  ")
        console.print(
            f"\n[bold]{escape(sample.heading)}[/bold]\n{escape(text)}", soft_wrap=True, highlight=False
        )
    console.print()
    _finish("demo", summary, as_json)


def _say(text: str) -> None:
    console.print(escape(text), highlight=False)


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with count, rate and time left; yields progress(done, total)."""
    bar = Progress(
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(unit, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:,.1f}/s" if speed else "")

        yield update


def _finish(title: str, facts: dict[str, Any], as_json: bool) -> None:
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    for key, value in facts.items():
        table.add_row(key, escape(_show(value)))
    console.print(table)
    if as_json:
        _print_json(facts)


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_show(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return str(value)


def _print_json(facts: dict[str, Any]) -> None:
    typer.echo(json.dumps(facts, allow_nan=False, default=str))


def main() -> None:
    """Entry point of `nla-engine`: runs a command and turns every error into one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False)
        if code == TYPER_INTERRUPTED:
            raise KeyboardInterrupt
    except NLAError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _fail("interrupted; what is finished is committed, and --resume goes on after it", 1)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # how typer reports a wrong command line
        if usage is not None:
            code = _fail(usage(), 2)
        else:
            code = _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    if "--debug" in sys.argv:
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
