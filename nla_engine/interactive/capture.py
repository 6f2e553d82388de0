"""capture_activations: stage 1 from a program, of texts or records as well as of a prompt file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.capture.run import run_capture
from nla_engine.cli.output import say
from nla_engine.cli.progress import progress_bar
from nla_engine.config import CaptureOptions
from nla_engine.errors import PromptError
from nla_engine.interactive.given import options_from
from nla_engine.interactive.words import in_python, python_words
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_files import record_source
from nla_engine.store import CaptureStore

#: What a store says of prompts that did not come from a file.
GIVEN = "given in Python"
_FILE = "prompts.jsonl"


@python_words()
def capture_activations(
    model: str | os.PathLike[str] | LanguageModel,
    prompts: str | os.PathLike[str] | Iterable[str | Mapping[str, Any]],
    layer: int | str | Iterable[int],
    out: str | os.PathLike[str],
    *,
    quiet: bool = False,
    **options: Any,
) -> CaptureStore:
    """Run prompts through a model and store the residual stream: stage 1. Returns the store that was written.

    model: a directory, a Hub id, or a loaded model (`load_model`)
    prompts: the path of a prompt file; or texts, or records, dicts with "prompt" or "messages" and fields of your own,
    also as a table of pandas or polars
    layer: K of layer K, or several
    out: the store to write; quiet: neither messages nor progress on stderr
    options: any other option of `capture` by its name (`CaptureOptions`): max_new_tokens=64, positions="all"
    Raises the errors of `nla_engine.errors`, with the messages of the command, which name arguments here.
    """
    given = {"layer": layer, "out": out, **options}
    loaded = model if isinstance(model, LanguageModel) else None
    given["model"] = model if loaded is None else loaded.name
    known = [field.name for field in fields(CaptureOptions)]

    def run(kind: type[CaptureOptions], path: str | os.PathLike[str]) -> CaptureStore:
        asked = options_from(kind, given | {"prompts": path}, what="capture_activations", known=known)
        with nullcontext(_silent) if quiet else progress_bar("sequences") as progress:
            run_capture(asked, announce=_silent if quiet else _say, progress=progress, lm=loaded)
        return CaptureStore.open(asked.out)

    if isinstance(prompts, str | os.PathLike):
        if isinstance(prompts, str) and not os.path.exists(prompts):
            raise PromptError(
                f"{prompts!r} is no file: a str is the path of a prompt file; give prompts themselves as a list"
            )
        return run(CaptureOptions, prompts)
    with tempfile.TemporaryDirectory(prefix="nla-prompts-") as directory:
        file = Path(directory) / _FILE
        file.write_bytes(b"".join(_line(number, each) for number, each in enumerate(_each(prompts), 1)))
        try:
            return run(_Given, file)
        except PromptError as error:  # it names the file, which the user never saw
            said = str(error).replace(f"{file}, line ", "prompts, number ").replace(str(file), "prompts")
            raise PromptError(said) from None


@dataclass(frozen=True)
class _Given(CaptureOptions):
    """The options of a run whose prompts lie in a temporary file."""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"prompts": GIVEN}


def _each(prompts: Any) -> Iterable[Any]:
    """The prompts one by one: the rows of a table of pandas or polars, whose own iterator gives its columns."""
    if hasattr(prompts, "to_dicts"):
        return prompts.to_dicts()
    if hasattr(prompts, "to_dict") and hasattr(prompts, "columns"):
        return prompts.to_dict("records")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise PromptError(
            f"prompts is of type {type(prompts).__name__}: give a list of texts or of records, or the path of a file"
        )
    return prompts


def _line(number: int, prompt: Any) -> bytes:
    """A prompt as a line of JSON. number: counted from 1"""
    record = {"prompt": prompt} if isinstance(prompt, str) else _plain(prompt)
    if not isinstance(record, dict):
        raise PromptError(
            f"prompts, number {number}: is of type {type(prompt).__name__}: give a text, or a dict with "
            '"prompt" or "messages"'
        )
    try:
        return record_source(record) + b"\n"
    except PromptError as error:
        raise PromptError(f"prompts, number {number}: {error}") from None


def _plain(value: Any) -> Any:
    """The value with Python's own numbers and lists in place of numpy's."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _say(text: str) -> None:
    say(in_python(text))


def _silent(*_: Any) -> None:
    pass
