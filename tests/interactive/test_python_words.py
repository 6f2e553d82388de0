"""What commands say, in the words of a Python call."""

from __future__ import annotations

import pytest

from nla_engine.errors import StoreError, already_there
from nla_engine.interactive.words import in_python, python_words


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (already_there("r"), "r: exists; pass resume=True to continue it or overwrite=True to replace it"),
        ("--samples above 1: give a --temperature", "samples above 1: give temperature=..."),
        ("--skip-bad leaves such records out", "skip_bad=True leaves such records out"),
        ("--av DIR is made for 3", "av DIR is made for 3"),
        ("--resume and --overwrite exclude", "resume=True and overwrite=True exclude"),
        ("With --max-new-tokens 0 it is read", "With max_new_tokens=0 it is read"),
        ("nla-engine info --model X: --layer, a--layer", "nla-engine info --model X: layer, a--layer"),
        ("--repair is of verify", "--repair is of verify"),
    ],
    ids=range(8),
)
def test_a_message(command: str, call: str) -> None:
    assert in_python(command) == call


def test_an_error_keeps_its_kind() -> None:
    with pytest.raises(StoreError) as caught, python_words():
        raise StoreError("give --layer")
    assert str(caught.value) == "give layer=..."
