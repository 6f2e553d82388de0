"""Suite real: what it counts, that a store which fails its audit has no figure, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_model

from nla_engine.bench.__main__ import main
from nla_engine.bench.chats import chat_file, chats
from nla_engine.bench.suites.real import until_the_end
from nla_engine.store.care.verify import Check


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with a chat template and room for the longest request."""
    directory = save_model(tmp_path_factory.mktemp("real") / "tiny")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return directory


def test_requests_are_many_kinds_and_always_the_same(tmp_path: Path) -> None:
    texts = chats(300)
    sizes = [len(text.split()) for text in texts]
    assert min(sizes) < 8 and max(sizes) > 400 and len(set(texts)) > 250
    assert chats(20) == texts[:20]
    records = [json.loads(line) for line in chat_file(tmp_path / "chats.jsonl", 3).read_text().splitlines()]
    assert [record["messages"][0]["content"] for record in records] == texts[:3]


def test_tokens_up_to_the_first_end_are_counted() -> None:
    replies = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 5, 2, 5], [5, 6, 7, 3]])
    assert until_the_end(replies, (2, 3)) == 2 + 4 + 1 + 4
    assert until_the_end(replies, ()) == 16


def run(model: Path, capsys: pytest.CaptureFixture, *more: str) -> tuple[int, dict]:
    command = f"real --device cpu --repeats 1 --requests 5 --new-tokens 6 --model {model}".split()
    code = main([*command, *more])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_suite(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, result = run(model, capsys, "--baseline", "hf", "--store", str(tmp_path), "--layer", "1")
    assert code == 0 and not result["failed"]
    lines = {line["case"]: line for line in result["lines"]}
    assert list(lines) == [
        "5 chats, up to 6 new tokens, all positions, layer 1 to disk",
        "verify --model, layer 1",
        "5 chats, up to 6 new tokens, all positions, all layers to disk",
        "verify --model, all layers",
        "HF generate, no capture B=64 up to 6",
    ]
    for line in lines.values():
        assert bool(line["ratio"]) == line["case"].endswith("to disk") and line["p50"] > 0
    assert list(tmp_path.iterdir()) == []  # captured data is removed


def test_a_store_that_fails_its_audit_is_named(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nla_engine.bench.suites.real.audit", lambda *_: [Check("rows are those of block 2", False, "0.7")]
    )
    code, result = run(model, capsys)
    assert code == 1 and [failed["case"] for failed in result["failed"]] == [
        "verify --model, layer 2",
        "verify --model, all layers",
    ]
    assert "rows are those of block 2 (0.7)" in result["failed"][0]["error"]


def test_a_model_is_needed(capsys: pytest.CaptureFixture) -> None:
    assert main(["real", "--device", "cpu", "--shape", "tiny"]) == 2
    assert "suite real needs --model" in capsys.readouterr().err


def test_hooked_runs_both_ways_and_compares(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = f"hooked --device cpu --repeats 2 --requests 3 --new-tokens 5 --model {model} --layer 1".split()
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, theirs = result["lines"]
    assert ours["case"] == "3 short chats, up to 5 new tokens, layer 1, loading left out"
    assert theirs["case"] == "HF generate with a hook B=3 up to 5" == ours["baseline"]
    assert ours["ratio"] == pytest.approx(ours["p50"] / theirs["p50"], rel=1e-3) and not result["failed"]
    assert main(["hooked", "--device", "cpu"]) == 2
    assert "suite hooked needs --model" in capsys.readouterr().err
