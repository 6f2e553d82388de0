"""Every command line of the documentation is one that the program takes: known commands and options, values that fit.

Nothing runs: a command stops once its options are checked. Which files there are is not looked at.
"""

from __future__ import annotations

import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from nla_engine.options import Options

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
#: What ends a command in a shell.
_ENDS = {"&&", "||", "|", ";", "&", ">", "2>"}


def command_lines() -> list[tuple[str, str]]:
    """(page, the line without nla-engine) of every command in a code block."""
    pages = (*(ROOT / name for name in PAGES), *sorted((ROOT / "docs").glob("*.md")))
    blocks = re.compile(r"^```(?:sh|bash|slurm)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
    lines = [
        (page.name, line)
        for page in pages
        for block in blocks.findall(page.read_text())
        for line in block.replace("\\\n", " ").splitlines()
    ]
    commands = [(page, re.search(r"(?:^|[ ;&|])nla-engine +([a-z].*)", line)) for page, line in lines]
    return [(page, re.sub(r"  +", " ", found[1])) for page, found in commands if found]


LINES = command_lines()


class Fits(Exception):
    """The options have been checked."""


def test_there_are_commands() -> None:
    assert len(LINES) > 40 and len({page for page, _ in LINES}) > 15


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, whose commands stop once their options are checked."""
    module = import_module("nla_engine.cli.app")

    def stop(options: Options) -> None:
        raise Fits

    monkeypatch.setattr(module, "what_is_left", stop)
    return get_command(module.app)


def check(line: str, app: Any) -> None:
    """Raises what the command line would, before anything runs."""
    line = re.sub(r"\[(--[^\]]*)\]|\$\{\w+:-\}", r"\1", line)  # what may be left out
    line = re.sub(r"\$'(?:[^'\\]|\\.)*'", lambda text: shlex.quote(text[0].replace("'", "")), line)
    line = re.sub(r"\$SLURM_ARRAY_TASK_(\w+)", lambda name: {"ID": "1"}.get(name[1], "2"), line)
    words = shlex.split(line.replace("$LAYER", "20"), comments=True)
    words = words[: next((n for n, word in enumerate(words) if word in _ENDS), len(words))]
    command, context = app, app.make_context("nla-engine", list(words))
    while getattr(command, "commands", None):
        command = command.commands[words.pop(0)]
        context = command.make_context("", list(words), parent=context)
    if inspect.unwrap(command.callback).__globals__.get("Options") is Options:  # a dataclass checks more
        with pytest.raises(Fits):
            command.invoke(context)


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda text: text[:60])
def test_the_command_is_one(page: str, line: str, app: Any) -> None:
    check(line, app)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("capture MODEL --prompts p.txt --layer five --out run.zarr", "--layer is 'five'"),
        ("capture MODEL --prompts p.txt --layer 5 --out run.zarr --top-p 0.5", "--temperature"),
        ("roundtrip run.zarr --av AV --ar AR --out x.parquet --wher a", "No such option"),
        ("narrate run.zarr", "narrate"),
        ("info", "Missing"),
    ],
)
def test_others_are_not(line: str, message: str, app: Any) -> None:
    with pytest.raises(Exception, match=message):
        check(line, app)
