"""The command line of the benchmarks: options, the order of suites, and where results go."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nla_engine.bench.plot import plot_batches, plot_growth
from nla_engine.bench.report import append_csv, check_csv, read_csv, table, to_json
from nla_engine.bench.session import Session, check_plot
from nla_engine.bench.settings import IF_NAMED, OF_A_MODEL, SUITES, Settings
from nla_engine.bench.shapes import find_shape
from nla_engine.errors import NLAError, RequestError
from nla_engine.models.load import pick_device, pick_dtype
from nla_engine.once import Application

#: The exit code that typer returns for Ctrl-C; it prints nothing.
_TYPER_INTERRUPTED = 130
#: Columns of the table when stderr is not a terminal.
_LOG_WIDTH = 180

app = Application(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def bench(
    suites: Annotated[list[str], typer.Argument(help=f"Any of {', '.join(SUITES)}; or all.")] = ["all"],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="A checkpoint directory or Hub id.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this shape: qwen2.5-7b, llama3-8b, gemma3-12b, gpt-oss-20b, qwen3-30b-a3b, "
            "qwen3.6-27b, deepseek-v2-lite or tiny; llama3-70b, qwen2.5-72b or gemma3-27b for suite tensor-parallel. "
            "[default: qwen2.5-7b on a GPU, else tiny]"
        ),
    ] = None,
    batch_size: Annotated[
        list[int], typer.Option(help="Sequences decoded at once. Repeat for several.")
    ] = [],  # noqa: B006
    join_rows: Annotated[
        list[int], typer.Option(help="Rows that suite join joins. Repeat for several.")
    ] = [],  # noqa: B006
    scaling_rows: Annotated[
        list[int],
        typer.Option(help="Rows of the stores of suite scaling, and nothing but these. Repeat for several."),
    ] = [],  # noqa: B006
    requests: Annotated[int | None, typer.Option(help="Requests, documents or vectors per case.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Prompt length of suite generate.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate for each request.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Block to capture. [default: that of the shape's NLA; of --model, at 5/7 of its depth]"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each case.")] = 3,
    baseline: Annotated[
        str, typer.Option(help="hf: also measure plain Hugging Face code. Or none.")
    ] = "none",
    vllm: Annotated[
        str | None, typer.Option(help="A Python interpreter with vLLM: also measure vLLM, without capture.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Directory for a trace and a table of each case.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the JSON object to.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to append the results to.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Directory for decode.png, codec.png and growth.png.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="A store of bf16 rows for suite codec. [default: made-up rows]")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Directory for captured data, removed at the end. [default: a temporary one]"),
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Start no case after this many seconds.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:N or cpu. [default: cuda if there is one]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 or float32. [default: bfloat16 on a GPU that computes in it, else float32]"
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="GPUs of suites tensor-parallel and parallel. [default: all; on a CPU two processes]"
        ),
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show a traceback with an error.")] = False,
) -> None:
    """Measure how fast each part is, and compare it with the hardware's limit.

    A table goes to stderr; the last line on stdout is one JSON object.
    """
    where = pick_device(device)
    if model is not None and shape is not None:
        raise RequestError("--model and --shape exclude each other")
    shape = shape or ("qwen2.5-7b" if where.type == "cuda" else "tiny")
    find_shape(shape)
    check_plot(plot)
    for flag, file in (("--csv", csv), ("--json", json_file)):
        _check_file(flag, file)
    for flag, place in (("--plot", plot), ("--profile", profile), ("--store", store)):
        _check_directory(flag, place)
    if csv is not None:
        check_csv(csv)
    settings = Settings(
        suites=tuple(
            name for name in SUITES if name not in IF_NAMED and (name not in OF_A_MODEL or model is not None)
        )
        if "all" in suites
        else tuple(dict.fromkeys(suites)),
        device=where,
        dtype=pick_dtype(dtype, where),
        model=model,
        shape=shape,
        batch_sizes=tuple(batch_size),
        join_rows=tuple(join_rows),
        scaling_rows=tuple(scaling_rows),
        requests=requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        layer=layer,
        repeats=repeats,
        baseline=baseline,
        vllm=vllm,
        profile=profile,
        json=json_file,
        csv=csv,
        plot=plot,
        store=store,
        rows=rows,
        time_limit=time_limit,
        gpus=gpus,
        debug=debug,
    )
    with tempfile.TemporaryDirectory(prefix="nla-bench-", dir=store) as directory:
        result = run_suites(settings, Path(directory))
    print(json.dumps(result))
    if result["failed"] or result["interrupted"]:
        raise typer.Exit(1)


def _check_file(flag: str, path: Path | None) -> None:
    """RequestError if no result could be written to this file."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise RequestError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def _check_directory(flag: str, path: Path | None) -> None:
    """RequestError if nothing could be written to this directory. Makes it."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise RequestError(f"{flag} {path}: no directory to write to: {error.strerror}") from error


def run_suites(settings: Settings, directory: Path) -> dict[str, Any]:
    """Run the suites in turn. The JSON file is written after each case, the CSV file after each suite, when its cases
    have been compared. Returns the JSON object.

    Ctrl-C ends the running suite and skips the others. What was measured is kept.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    session = Session.start(settings, directory, console)
    if settings.vllm is not None:
        from nla_engine.bench.vllm_peer import measure_vllm

        measure_vllm(session, settings.vllm)
    written, interrupted = 0, False

    def result() -> dict[str, Any]:
        return to_json(
            session.machine,
            session.lines,
            model=settings.model or settings.shape,
            dtype=str(settings.dtype).removeprefix("torch."),
            hardware={"copy_bytes_per_second": session.hardware.copy, "flops": session.hardware.flops},
            seconds=round(time.monotonic() - session.started, 1),
            interrupted=interrupted,
            skipped=session.skipped,
            failed=session.failed,
        )

    def write() -> dict[str, Any]:
        now = result()
        if settings.json is not None:
            settings.json.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return now

    session.recorded = write
    for name in settings.suites:
        if interrupted:
            session.skipped.append(name)
            continue
        try:
            importlib.import_module(f"nla_engine.bench.suites.{name.replace('-', '_')}").run(session)
        except KeyboardInterrupt:
            interrupted = True
            session.skipped.append(f"{name}: what was not measured when it was interrupted")
        if settings.csv is not None:
            append_csv(settings.csv, session.machine, session.model_name, session.lines[written:])
        written = len(session.lines)
        write()
    console.print(table(session.machine, session.lines))
    if settings.plot is not None and "generate" in settings.suites:
        plot_batches(settings.plot, session.machine, session.lines, session.size, session.hardware)
    if settings.plot is not None and "scaling" in settings.suites:
        measured = (
            [line.to_dict() for line in session.lines] if settings.csv is None else read_csv(settings.csv)
        )
        plot_growth(settings.plot, measured)
    return write()


def main(arguments: list[str] | None = None) -> int:
    """0 done; 1 a case failed, or interrupted; 2 the request is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments, standalone_mode=False, prog_name="python -m nla_engine.bench")
        if code == _TYPER_INTERRUPTED:
            print("error: interrupted before anything was measured", file=sys.stderr)
        return int(bool(code))
    except NLAError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        usage = getattr(error, "format_message", None)  # how typer reports a wrong command line
        if usage is None and "--debug" in arguments:
            traceback.print_exc()
        message = f"{type(error).__name__}: {error} (--debug shows where)" if usage is None else usage()
        print(f"error: {message}", file=sys.stderr)
        return 1 if usage is None else 2


if __name__ == "__main__":
    # SIGTERM, as a time limit from outside sends it, ends a run as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
