"""The where grammar, against the same conditions written as Python loops over the rows."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from store_samples import create_store, sample_sequence

from nla_engine.codec.rows import Codec
from nla_engine.errors import WhereError
from nla_engine.store import CaptureStore, RowFlag, SequenceRows

CODEC = Codec.named("int8", 16)
RECORDS: list[Any] = [
    {"answer": 12, "kind": "easy", "meta": {"split": "train", "fold": 1}, "ok": True},
    {"answer": "many", "kind": "hard", "meta": {"split": "test"}, "ok": False},
    {"answer": None, "kind": "easy", "order": 3},
    "a bare prompt",
]


@dataclass(frozen=True)
class Row:
    """One row, for a condition written in Python."""

    number: int
    token: str
    next_token: str
    token_id: int
    position: int
    sequence: int
    norm: float
    norm_7: float
    flags: RowFlag
    record: Any


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaptureStore:
    path = tmp_path_factory.mktemp("where") / "run.zarr"
    rng = np.random.default_rng(3)
    with create_store(path, CODEC, (3, 7)) as writer:
        for record in RECORDS:
            sequence, _ = sample_sequence(rng, CODEC, (3, 7), 70)
            writer.append(SequenceRows(**{**vars(sequence), "source": json.dumps(record).encode()}))
    return CaptureStore.open(path)


@pytest.fixture(scope="module")
def rows(store: CaptureStore) -> list[Row]:
    columns = {
        name: store.column(name).tolist() for name in ("token_id", "next_token_id", "position", "sequence")
    }
    return [
        Row(
            number,
            *store.token_text([columns["token_id"][number], columns["next_token_id"][number]]),
            columns["token_id"][number],
            columns["position"][number],
            columns["sequence"][number],
            float(store.layer(3).norm()[number]),
            float(store.layer(7).norm()[number]),
            RowFlag(int(store.column("flags")[number])),
            RECORDS[columns["sequence"][number]],
        )
        for number in range(store.rows)
    ]


def of(row: Row, *keys: str) -> Any:
    value = row.record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


CASES = {
    "token == '1'": lambda r: r.token == "1",
    "'1' == token": lambda r: r.token == "1",
    "token != '1' and next_token == \" times\"": lambda r: r.token != "1" and r.next_token == " times",
    "next_token == ''": lambda r: r.next_token == "",
    r"token matches '^\d$'": lambda r: re.search(r"^\d$", r.token),
    r"token matches '^\n$' or next_token matches \"é|�\"".replace('\\"', '"'): (
        lambda r: r.token == "\n" or re.search("é|\ufffd", r.next_token)
    ),
    "token in ['1', '2',\"3\"]": lambda r: r.token in ("1", "2", "3"),
    "token in []": lambda r: False,
    "position in [1, 2.0, 69]": lambda r: r.position in (1, 2, 69),
    "token_id >= 4 and token_id < 8": lambda r: 4 <= r.token_id < 8,
    "next_token_id == -1": lambda r: r.position == 69,
    "5 > position": lambda r: r.position < 5,
    "position <= 2.5": lambda r: r.position <= 2,
    "position>60and not generated": lambda r: r.position > 60 and not r.flags & RowFlag.GENERATED,
    "row >= 100": lambda r: r.number >= 100,
    "row == position": lambda r: r.number == r.position,
    "sequence != 1": lambda r: r.sequence != 1,
    "norm > 4": lambda r: r.norm > 4,
    "norm_3 > 4 and norm_7 < 4": lambda r: r.norm > 4 and r.norm_7 < 4,
    "norm > 1e2": lambda r: r.norm > 100,
    "generated": lambda r: r.flags & RowFlag.GENERATED,
    "prompt": lambda r: not r.flags & RowFlag.GENERATED,
    "prompt == false": lambda r: r.flags & RowFlag.GENERATED,
    "(position > 5) != true": lambda r: r.position <= 5,
    "prompt_end or sequence_end": lambda r: r.flags & (RowFlag.PROMPT_END | RowFlag.SEQUENCE_END),
    "early and not (sink or nonfinite)": (
        lambda r: r.flags & RowFlag.EARLY and not r.flags & (RowFlag.SINK | RowFlag.NONFINITE)
    ),
    "not not early": lambda r: r.flags & RowFlag.EARLY,
    "generated or early and sink": lambda r: (
        r.flags & RowFlag.GENERATED or (r.flags & RowFlag.EARLY and r.flags & RowFlag.SINK)
    ),
    "(generated or early) and sink": lambda r: (
        r.flags & (RowFlag.GENERATED | RowFlag.EARLY) and r.flags & RowFlag.SINK
    ),
    "record.kind == 'easy'": lambda r: of(r, "kind") == "easy",
    "record.kind != 'easy'": lambda r: of(r, "kind") == "hard",
    "not record.kind == 'easy'": lambda r: of(r, "kind") != "easy",
    "record.answer > 11": lambda r: of(r, "answer") == 12,
    "12 == record.answer": lambda r: of(r, "answer") == 12,
    "record.answer in [12, 'many']": lambda r: of(r, "answer") in (12, "many"),
    "record.answer matches 'an'": lambda r: of(r, "answer") == "many",
    "record.meta.split == 'test'": lambda r: of(r, "meta", "split") == "test",
    "record.meta.fold == 1": lambda r: of(r, "meta", "fold") == 1,
    "record.ok": lambda r: of(r, "ok") is True,
    "record.ok == false": lambda r: of(r, "ok") is False,
    "record.order == 3": lambda r: of(r, "order") == 3,
}


@pytest.mark.parametrize("expression", CASES)
def test_cases(store: CaptureStore, rows: list[Row], expression: str) -> None:
    selected = store.where(expression)
    for first in (1, 70, 100, store.rows - 1, store.rows):
        assert store.where(expression, first).tolist() == selected[selected >= first].tolist()
    assert selected.dtype == np.int64
    assert selected.tolist() == [row.number for row in rows if CASES[expression](row)]


ERRORS = {
    "": (1, "ends too early"),
    "position <": (11, "ends too early"),
    "(position < 3": (14, "ends too early"),
    "position < 3)": (13, "cannot be understood"),
    "position ~ 3": (10, "cannot be understood"),
    "token == 'a": (10, "cannot be understood"),
    "1 < position < 3": (14, "cannot be understood"),
    "early and colour == 3": (11, "there is no field 'colour'"),
    "norm_4 > 1": (1, "there is no field 'norm_4'"),
    "kind == 'easy'": (1, "there is no field 'kind' (did you mean record.kind?)"),
    "__import__ == 1": (1, "there is no field"),
    "__import__('os')": (11, "cannot be understood"),
    "token == 1": (1, "text is compared with number"),
    "token < 'a'": (1, "text has no order"),
    "token == next_token": (10, "can only be compared with a constant"),
    "position == 'a'": (1, "number is compared with text"),
    "position == true": (1, "compared with true or false"),
    "generated > false": (1, "has no order"),
    "generated == 1": (1, "true or false is compared with number"),
    "position matches '1'": (1, "'matches' needs a text"),
    "token matches 1": (15, "needs a quoted pattern"),
    "token matches '('": (15, "not a regular expression"),
    "token matches 'a{99999999999}'": (15, "not a regular expression: the repetition number is too large"),
    "token in [1]": (11, "text is compared with number"),
    "position in ['a']": (14, "number is compared with text"),
    "1 in [1]": (1, "needs a field before it"),
    "1 == 1": (1, "two constants"),
    "position": (1, "is not a condition"),
    "early and token": (11, "is not a condition"),
    "'a'": (1, "is not a condition"),
    "record.nothing == 1": (1, "no prompt record has 'nothing' (keys seen: answer, kind, meta, ok, order)"),
    "record.kind == 1": (1, 'never a number in the prompt records (it is, for example, "easy")'),
    "record.kind": (1, "never true or false"),
    "record.ok == 1": (1, "never a number"),
    "record.answer == token_id": (18, "can only be compared with a constant"),
    "not " * 5000 + "early": (1, "nested too deeply"),
}


@pytest.mark.parametrize("expression", ERRORS, ids=lambda expression: expression[:30])
def test_errors_name_the_place_and_the_fields(store: CaptureStore, expression: str) -> None:
    column, message = ERRORS[expression]
    with pytest.raises(WhereError) as caught:
        store.where(expression)
    assert f"column {column}: " in str(caught.value)
    assert message in str(caught.value)
    assert "fields: token, next_token, token_id" in str(caught.value)
    assert "norm_7, prompt, generated" in str(caught.value)


WORDS = [
    "token",
    "position",
    "generated",
    "record.ok",
    "and",
    "or",
    "not",
    "in",
    "matches",
    "==",
    "<",
    "(",
    ")",
]
WORDS += ["[", "]", "'1'", "3", "true", ",", "norm_7"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join) | st.text(max_size=20))
@example("position < 1e999")
@example("token matches ''")
def test_any_text_is_an_answer_or_a_where_error(store: CaptureStore, expression: str) -> None:
    try:
        selected = store.where(expression)
    except WhereError:
        return
    assert selected.dtype == np.int64
    assert (np.diff(selected) > 0).all()


def test_an_empty_store_selects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    create_store(tmp_path / "run.zarr", CODEC).close()
    store = CaptureStore.open(tmp_path / "run.zarr")
    for expression in ("token == 'a'", "norm > 1", "record.x == 1", "not early", "token in ['a']"):
        assert store.where(expression).tolist() == []


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> CaptureStore:
    """Records whose ids differ in the last digit only, beyond what a float64 can tell apart."""
    path = tmp_path_factory.mktemp("numbers") / "run.zarr"
    rng = np.random.default_rng(4)
    with create_store(path, CODEC, (3,)) as writer:
        for id_ in (2**53, 2**53 + 1, 10**400, 1, 2.5):
            sequence, _ = sample_sequence(rng, CODEC, (3,), 5)
            source = json.dumps({"id": id_}).encode()
            writer.append(SequenceRows(**{**vars(sequence), "source": source}))
    return CaptureStore.open(path)


@pytest.mark.parametrize(
    ("condition", "sequences"),
    [
        (f"record.id == {2**53}", [0]),
        (f"record.id == {2**53 + 1}", [1]),
        (f"record.id == {2**53 + 3}", []),
        (f"record.id in [{2**53 + 1}, 1]", [1, 3]),
        (f"record.id > {2**53}", [1, 2]),
        (f"record.id == {10**400}", [2]),
        (f"record.id < {10**400}", [0, 1, 3, 4]),
        ("record.id == 1.0 or record.id == 2.5", [3, 4]),
        ("record.id == +1", [3]),
        (f"sequence < {10**400} and sequence > -{10**30}", [0, 1, 2, 3, 4]),
        (f"sequence == {2**63} or token_id == {2**40}", []),
        (f"norm < {10**400} and norm > -{10**60}", [0, 1, 2, 3, 4]),
        (f"not nonfinite and (norm > {10**60} or {10**400} < norm_3)", []),
        (f"sequence in [1, {2**64 + 2}]", [1]),
    ],
)
def test_whole_numbers_are_compared_digit_by_digit(
    numbered: CaptureStore, condition: str, sequences: list[int]
) -> None:
    found = numbered.column("sequence")[numbered.where(condition)]
    assert sorted(set(found.tolist())) == sequences


def test_a_number_of_too_many_digits_is_named(numbered: CaptureStore) -> None:
    with pytest.raises(WhereError, match="column 14: a number of so many digits"):
        numbered.where("record.id == 1" + "0" * 4_300)
