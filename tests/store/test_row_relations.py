"""Relations of rows and their sequences: what is counted, whatever part is looked at together."""

from __future__ import annotations

import numpy as np
import pytest

from nla_engine.store.care import row_relations as module
from nla_engine.store.care.row_relations import row_relations
from nla_engine.store.format import row_flags

NUMBER, POSITIONS = "rows carry the number of their sequence", "positions ascend within their sequence"
TOKEN, FOLLOWING = "token_id is the token at the position", "next_token_id is the token after it"
LOGPROB = "next_logprob is a log-probability where a token follows"
FLAGS = "flags fit the positions"


def sound(rng: np.random.Generator, sizes: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of sequences with so many rows each, and their numbers. Some tokens have no row."""
    numbers = rng.permutation(len(sizes) + 3)[: len(sizes)]
    columns: dict[str, list] = {
        name: []
        for name in ("sequence", "position", "token_id", "next_token_id", "flags", "next_logprob", "tokens")
    }
    token_sizes, prompts = [], []
    for number, size in zip(numbers, sizes, strict=True):
        count = size + int(rng.integers(0, 4))
        tokens = rng.integers(0, 9, count).astype(np.int32)
        position = np.sort(rng.choice(count, size, replace=False)).astype(np.int32)
        prompt = int(rng.integers(0, count + 1))
        following = np.append(tokens, np.int32(-1))[position + 1]
        columns["sequence"].append(np.full(size, number))
        columns["position"].append(position)
        columns["token_id"].append(tokens[position])
        columns["next_token_id"].append(following)
        columns["flags"].append(row_flags(position, prompt, count))
        columns["next_logprob"].append(np.where(following < 0, np.nan, -1.0).astype(np.float32))
        columns["tokens"].append(tokens)
        token_sizes.append(count)
        prompts.append(prompt)
    joined = {name: np.concatenate([np.zeros(0, np.int32), *parts]) for name, parts in columns.items()}
    kinds = {"sequence": np.int64, "flags": np.uint8, "next_logprob": np.float32}
    values = {
        f"rows/{n}": v.astype(kinds.get(n, np.int32), copy=False) for n, v in joined.items() if n != "tokens"
    }
    values["sequences/tokens"] = joined["tokens"].astype(np.int32)
    for name, counts in (("row", sizes), ("token", token_sizes)):
        size = np.array(counts, np.int64)
        values[f"sequences/{name}_size"], values[f"sequences/{name}_start"] = size, np.cumsum(size) - size
    values["sequences/prompt_size"] = np.array(prompts, np.int32)
    return values, numbers


@pytest.fixture(params=[1, 7, 10**6])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BLOCK_ROWS", request.param)
    return request.param


@pytest.mark.parametrize("sizes", [[], [0], [5, 0, 0, 12, 1, 30, 0], [40]], ids=str)
def test_sound_rows(block: int, sizes: list[int], rng: np.random.Generator) -> None:
    values, numbers = sound(rng, sizes)
    found = row_relations(values, numbers)
    names = [NUMBER, POSITIONS, TOKEN, FOLLOWING, LOGPROB, FLAGS]
    assert [each.name for each in found] == names
    assert all((each.wrong, each.checked) == (0, sum(sizes)) for each in found)


@pytest.mark.parametrize(
    ("path", "relation", "wrong"),
    [
        ("rows/sequence", NUMBER, 99),
        ("rows/token_id", TOKEN, 77),
        ("rows/next_token_id", FOLLOWING, 77),
        ("rows/next_logprob", LOGPROB, 2.0),
        ("rows/flags", FLAGS, None),
    ],
    ids=["sequence", "token", "next token", "log-probability", "flags"],
)
def test_each_wrong_row_is_counted_once(
    block: int, path: str, relation: str, wrong: float | None, rng: np.random.Generator
) -> None:
    values, numbers = sound(rng, [5, 0, 3, 12, 1, 30, 8])
    places = np.sort(rng.choice(59, 4, replace=False))
    values[path][places] = values[path][places] ^ 8 if wrong is None else wrong
    found = {each.name: each for each in row_relations(values, numbers)}
    assert (found[relation].wrong, found[relation].first) == (4, places[0])
    assert all(each.wrong == 0 for name, each in found.items() if name not in (relation, LOGPROB))


def test_nothing_is_said_of_rows_at_wrong_positions(block: int, rng: np.random.Generator) -> None:
    """Where positions fail in one part, other parts do not report what depends on them either."""
    values, numbers = sound(rng, [6] * 9)
    values["rows/position"][[20, 40]] = [10**6, -1]
    values["rows/token_id"][3] = 77
    found = row_relations(values, numbers)
    assert [each.name for each in found] == [NUMBER, POSITIONS]
    assert (found[1].first, found[1].checked) == (20, 54)
    assert found[1].wrong == 3  # the row behind the first does not ascend
