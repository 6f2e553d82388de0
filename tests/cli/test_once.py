"""No option given twice loses a value: of every command, each option is repeated or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import call, capture, check_refused, shell

from nla_engine import cli
from nla_engine.bench.__main__ import app as bench
from nla_engine.cli.app import app


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below this one, with the words that name it."""
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


def options(command: Any) -> list[Any]:
    return [each for each in command.params if each.param_type_name == "option"]


EVERY = [
    pytest.param(tree, words, option, id=" ".join((tree.info.name or "bench", *words, option.opts[0])))
    for tree in (app, bench)
    for words, command in commands(typer.main.get_command(tree))
    for option in options(command)
    if not option.multiple and not option.is_eager and not (option.is_flag and not option.secondary_opts)
]


def refusal(tree: Any, words: tuple[str, ...], option: Any) -> str:
    """The message of a command whose option is given twice, in two ways where it has two names."""
    names = [option.opts[0], (option.secondary_opts or option.opts)[-1]]
    given = [word for name in names for word in ([name] if option.is_flag else [name, "7"])]
    with pytest.raises(Exception) as told:
        typer.main.get_command(tree).main([*words, *given], standalone_mode=False)
    return told.value.format_message()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("tree", "words", "option"), EVERY)
def test_an_option_of_one_value_is_refused_twice(tree: Any, words: tuple[str, ...], option: Any) -> None:
    names = "/".join([*option.opts, *option.secondary_opts])
    assert refusal(tree, words, option) == f"{names} is given 2 times, and takes one value: leave one out"


def test_every_command_is_looked_at() -> None:
    named = {" ".join(words) for words, _ in commands(typer.main.get_command(app))}
    assert {"capture", "roundtrip", "export", "study multiplication"} <= named and len(EVERY) > 120
    assert cli.main


def test_in_one_line_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    twice = [*capture(root, tmp_path / "x.zarr", seed=1), "--seed=2"]
    check_refused(call(*twice), "--seed is given 2 times, and takes one value: leave one out$")
    both = [*capture(root, tmp_path / "x.zarr", chat=True), "--raw"]
    check_refused(call(*both), "--chat/--raw is given 2 times")
    assert not (tmp_path / "x.zarr").exists()


def test_a_flag_twice_says_the_same(root: Path, tmp_path: Path) -> None:
    command = capture(root, tmp_path / "x.zarr", corpus=True, skip_bad=True, max_new_tokens=None)
    ran = call(*command, "--skip-bad")
    assert ran.code == 0, ran.err


def test_the_benchmarks_too() -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "nla_engine.bench", "--repeats", "1", "--repeats", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 2 and "--repeats is given 2 times" in ran.stderr
    assert shell("--version", "--version").code == 0
