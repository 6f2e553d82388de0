"""The application: its options, parameters made from the dataclasses of `config`, errors and exit codes."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from nla_engine.cli.interrupted import what_is_left
from nla_engine.cli.output import Json, say
from nla_engine.cli.progress import progress_bar
from nla_engine.cli.streams import watch_streams
from nla_engine.errors import NLAError
from nla_engine.models import hub
from nla_engine.once import Application
from nla_engine.options import Options, flag

app = Application(
    name="nla-engine",
    help="Capture a language model's activations, explain them in words, and measure how far the words can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_DEBUG = "--debug"
#: The exit code that typer gives for Ctrl-C, without a message.
TYPER_INTERRUPTED = 130


#: The commands as --help lists them: as a user comes to need them.
_ORDER = (
    *("demo", "capture", "roundtrip", "explain", "score", "report"),
    *("ask", "lens", "patch", "controls", "clauses", "claims", "compare", "crossplay", "card", "train"),
    *("info", "verify", "export", "import", "merge", "variance"),
)


def _print_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import version

    import torch

    from nla_engine import extension
    from nla_engine.ops.backends import shortfall
    from nla_engine.ops.cards import card_of

    typer.echo(f"nla_engine {version('nla_engine')}")
    missing = extension.why_missing()
    if missing:
        typer.echo(missing)
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        lines = shortfall(device) or [f"{card_of(device)}: runs the CUDA part and the Triton kernels"]
        for line in lines:
            if line != missing:
                typer.echo(line)
    raise typer.Exit


_VERSION_HELP = "Print the version, what is missing and what each GPU cannot run, then stop."


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show a traceback with an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help=_VERSION_HELP, is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del debug, version  # `_fail` reads --debug itself; --version has printed by now


def command(
    options: type[Options], *, within: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(options, as_json)` as a command whose parameters are the fields of a dataclass.

    within: the application, or a group of its commands
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints, fields = typing.get_type_hints(options), dataclasses.fields(options)
        parameters = [_parameter(field, hints[field.name]) for field in fields]
        parameters.append(
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
        )

        def run(**values: Any) -> None:
            as_json = values.pop("as_json")
            for field in fields:
                if parse := field.metadata["parse"]:
                    values[field.name] = parse(field.name, values[field.name])
            asked = options(**values)
            with what_is_left(asked):
                function(asked, as_json)

        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        within.command(function.__name__.removesuffix("_command"))(run)
        return function

    return register


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    about = field.metadata
    if about["argument"]:
        marker: Any = typer.Argument(help=about["help"], metavar=field.name.upper())
    else:
        marker = typer.Option(about["flags"] or flag(field.name), help=about["help"])
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    hint = about["typed"] or hint
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, marker]
    )


def main() -> None:
    """Entry point of `nla-engine`: runs a command and turns every error into one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # use all cores, without a warning about forks
    watch_streams()
    hub.tell(say, progress_bar)
    app.registered_commands.sort(key=lambda command: _ORDER.index(str(command.name)))
    arguments = [word for word in sys.argv[1:] if word != _DEBUG]  # it may also follow the command
    try:
        code = app(arguments, standalone_mode=False, prog_name="nla-engine")
        if code == TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        print(end="", flush=True)  # flush stdout here, so that a failure is reported as an error
    except NLAError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _fail("interrupted", 1)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's errors about a wrong command line have it
        if usage is None:
            code = _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
        elif type(error).__name__ == "NoArgsIsHelpError":
            code = 2
            print(usage(), file=sys.stderr)
        else:
            code = _fail(usage(), 2, traced=False)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, traced: bool = True) -> int:
    if traced and _DEBUG in sys.argv:
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
