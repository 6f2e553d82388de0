"""The tables of clauses and claims: against patch, plain transformers and planted texts; resuming; what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import LAYER, Ran, call, capture, check_refused, flags, json_lines, patch, roundtrip
from tiny import D, byte_tokenizer
from transformers import AutoModelForCausalLM

from nla_engine.referee import claim_run, clause_run
from nla_engine.referee.judge import ANSWER_TOKENS, verdict
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import ResultTable
from nla_engine.store import CaptureStore


@pytest.fixture(scope="module")
def root(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and a store of every position of longer prompts."""
    made = tmp_path_factory.mktemp("claims")
    for name in ("base", "ar", "av"):
        (made / name).symlink_to(root / name)
    said = [
        "Tell me about Paris",
        "what is 37 by 46",
        "name a colour",
        "who wrote it",
        "go on",
        "and then what",
    ]
    prompts = json_lines(made / "prompts.jsonl", [{"prompt": text} for text in said])
    captured = call(*capture(root, made / "run.zarr", prompts=prompts, positions="all"))
    assert captured.code == 0, captured.err
    return made


def clauses(root: Path, out: Path, explained: Path, **changes: object) -> Ran:
    given = {"ar": root / "ar", "explained": explained, "out": out, "device": "cpu"}
    return call("clauses", root / "run.zarr", *flags({**given, "json": True, **changes}))


def claims(root: Path, out: Path, explained: Path, **changes: object) -> Ran:
    given = {"explained": explained, "out": out, "device": "cpu", "json": True}
    return call("claims", root / "run.zarr", *flags({**given, **changes}))


@pytest.fixture
def texts(root: Path, tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two or three texts of some rows, of several clauses that hold numbers and quoted strings."""
    store = CaptureStore.open(root / "run.zarr")
    rows = np.unique(rng.integers(0, store.rows, 12)).tolist()
    parts = ["It is 7", 'the token is "e"', 'next comes "a"', "x y z", "he said Paris; no", "3 = 4"]
    records = []
    for row in rows:
        for _ in range(int(rng.integers(2, 4))):
            chosen = rng.permutation(parts)[: int(rng.integers(1, 5))]
            records.append({"row": row, "text": ". ".join(chosen) + "."})
    return json_lines(tmp_path / "texts.jsonl", records)


def test_scores_and_kl_are_those_of_patch(root: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.parquet"
    ran = clauses(root, out, texts, model=root / "base", seed=3)
    assert ran.code == 0, ran.err
    table = pq.read_table(out).to_pylist()
    again = json_lines(tmp_path / "again.jsonl", [{"row": r["row"], "text": r["text"]} for r in table])
    assert call(*patch(root, tmp_path / "p.parquet", again, ar=root / "ar")).code == 0
    patched = pq.read_table(tmp_path / "p.parquet").to_pylist()
    variance = ran.json["variance"]
    whole: dict[str, float] = {}
    for row, want in zip(table, patched, strict=True):
        assert (row["row"], row["text"]) == (want["row"], want["explanation"])
        assert row["cos"] == pytest.approx(want["cos"], abs=1e-5)
        assert row["kl"] == pytest.approx(want["kl"], rel=1e-3, abs=1e-6)
        if row["variant"] == "whole":
            whole = row
            assert (row["unit"], row["clause"], row["cos_lost"], row["kl_added"]) == (None,) * 4
            continue
        assert row["fve_lost"] == pytest.approx(2 * (whole["cos"] - row["cos"]) / variance, abs=1e-4)
        assert row["kl_added"] == pytest.approx(row["kl"] - whole["kl"], abs=1e-12)
        assert row["clause"] in whole["text"]
        assert row["text"] != whole["text"] or row["variant"].startswith("swapped")  # two may say the same
        assert (row["partner"] is not None) == row["variant"].startswith("swapped")
        assert (row["rule"] is not None) == row["variant"].startswith("negated")
    for change in ("removed", "swapped", "negated"):
        pairs = [[r["fve_lost"] for r in table if r["variant"] == change + end] for end in ("", "_control")]
        assert len(pairs[0]) == len(pairs[1]) > 0
        for end, values in zip(("", "_control"), pairs, strict=True):
            assert ran.json[f"fve_lost_{change}{end}"][0] == pytest.approx(np.mean(values), abs=2e-6)
        margin = np.subtract(*pairs).mean()
        assert ran.json[f"fve_lost_{change}_margin"][0] == pytest.approx(margin, abs=2e-6)


@pytest.mark.parametrize("command", ["clauses", "claims"])
def test_resuming_gives_the_same_table(
    command: str, root: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"clauses": clauses, "claims": claims}[command]
    assert run(root, tmp_path / "once.parquet", texts).code == 0
    monkeypatch.setattr(clause_run, "_TEXTS", {"cpu": 9})
    monkeypatch.setattr(claim_run, "_ROWS", 2)
    append, count = ResultTable.append, []

    def stopping(self: ResultTable, columns: dict) -> None:
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(1)
        append(self, columns)

    with monkeypatch.context() as patched:
        patched.setattr(ResultTable, "append", stopping)
        assert run(root, tmp_path / "twice.parquet", texts).code == 1
    check_refused(
        run(root, tmp_path / "twice.parquet", texts, resume=True, seed=9), "made with other options"
    )
    ran = run(root, tmp_path / "twice.parquet", texts, resume=True)
    assert ran.code == 0, ran.err
    once, twice = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("once", "twice"))
    assert once.schema.names == twice.schema.names
    for name in once.schema.names:
        values = [table[name].to_pylist() for table in (once, twice)]
        if name in ("cos", "cos_lost", "mse_nrm", "fve_nrm", "fve_lost"):
            values = [[-9 if value is None else value for value in each] for each in values]
            np.testing.assert_allclose(*values, atol=1e-5)
        else:
            assert values[0] == values[1], name


def test_agreement_counts_the_other_samples(root: Path, tmp_path: Path) -> None:
    said = {0: ["about 7 and 8", "about 7", "7"], 20: ["9", "7"], 21: ["only 7"]}
    records = [{"row": row, "text": text} for row, each in said.items() for text in each]
    ran = claims(root, tmp_path / "c.parquet", json_lines(tmp_path / "t.jsonl", records))
    table = [r for r in pq.read_table(tmp_path / "c.parquet").to_pylist() if r["side"] == "claim"]
    for row in table:
        if len(said[row["row"]]) == 1:
            assert row["agree"] is None and row["agree_control"] is None
            continue
        others = [text for n, text in enumerate(said[row["row"]]) if n != row["sample"]]
        beside = said[row["partner"]]
        assert row["agree"] == pytest.approx(np.mean([row["said"] in text for text in others]))
        assert row["agree_control"] == pytest.approx(np.mean([row["said"] in text for text in beside]))
    assert ran.json["agree_number"][0] == pytest.approx(
        np.mean([row["agree"] for row in table if row["agree"] is not None]), abs=1e-6
    )


def test_the_judge_is_plain_greedy_generation(root: Path, tmp_path: Path) -> None:
    records = [{"row": row, "text": "One is <|im_end|> here. Two"} for row in (0, 15, 30)]
    out = tmp_path / "j.parquet"
    ran = claims(root, out, json_lines(tmp_path / "t.jsonl", records), judge=root / "base", judge_context=8)
    assert ran.code == 0, ran.err
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    tokenizer = byte_tokenizer()
    judged = [row for row in pq.read_table(out).to_pylist() if row["kind"] == "clause"]
    assert [row["said"] for row in judged] == ["One is <|im_end|> here.", "Two"] * 3
    special = set(tokenizer.all_special_tokens)
    for row in judged:
        for end in ("", "_control"):
            prompt = row["prompt" + end]
            assert not any(token in prompt for token in special)
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            made = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0)
            new = made[0, ids.shape[1] :].tolist()
            new = new[:-1] if new[-1] == tokenizer.eos_token_id else new
            assert row["answer" + end] == tokenizer.decode(new)
            assert row["judged" + end] == verdict(row["answer" + end])
        assert row["prompt"] != row["prompt_control"]
    assert sum(ran.json[f"judged_{answer}"][0] for answer in ("yes", "no", "unclear")) == pytest.approx(1)


def test_planted_verbalizers_are_told_apart(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an AR that reads made-up words alone: who carries the vector, and who says what is true."""
    store = CaptureStore.open(root / "run.zarr")
    vectors = store.layer(LAYER)[:]
    tokens, following = (store.token_text(store.column(name)[:]) for name in ("token_id", "next_token_id"))
    rows = [n for n in range(store.rows) if tokens[n].isalnum() and following[n].isalnum()]
    rows = rows[:: max(len(rows) // 40, 1)]
    assert len(set(store.column("sequence")[rows].tolist())) >= 5
    quarter = D // 4

    def code(vector: np.ndarray) -> str:
        letters = np.clip(np.round(vector / np.abs(vector).max() * 12) + 12, 0, 24).astype(int)
        words = ["".join(chr(97 + n) for n in part) for part in letters.reshape(4, quarter)]
        return " ".join(f"zz{'abcd'[n]}{word};" for n, word in enumerate(words))

    def decoded(text: str) -> torch.Tensor:
        out = torch.full((D,), 1e-3)
        for block, letters in re.findall(rf"zz([abcd])([a-y]{{{quarter}}});", text):
            values = torch.tensor([(ord(letter) - 109) / 12 for letter in letters])
            out["abcd".index(block) * quarter :][:quarter] = values
        return out

    monkeypatch.setattr(
        Reconstructor, "reconstruct", lambda self, texts: torch.stack([decoded(text) for text in texts])
    )
    true = [f'The last token read is "{tokens[n]}"; next comes "{following[n]}".' for n in rows]
    half = [f'The last token read is "{tokens[n]}"; next comes "wrong".' for n in rows]
    codes = [code(vectors[n]) for n in rows]
    planted = {
        "true and carrying": [f"{a} {b}" for a, b in zip(true, codes, strict=True)],
        "half right": half,
        "true alone": true,
        "meaningless": codes,
    }
    found = {}
    for name, said in planted.items():
        file = json_lines(
            tmp_path / "t.jsonl", [{"row": n, "text": text} for n, text in zip(rows, said, strict=True)]
        )
        carried = clauses(root, tmp_path / f"{name}.parquet", file)
        checked = claims(root, tmp_path / f"{name}-claims.parquet", file)
        assert (carried.code, checked.code) == (0, 0), carried.err + checked.err
        found[name] = {**carried.json, **checked.json}
    for name in ("true and carrying", "meaningless"):
        assert found[name]["cos"][0] > 0.9 and found[name]["fve_lost_removed"][1] > 0
    for name in ("half right", "true alone"):
        assert found[name]["fve_nrm"][0] < 0.5 and found[name]["fve_lost_removed"][0] == 0
    for name in ("true and carrying", "true alone"):
        assert found[name]["precision_all"][0] == found[name]["recall_read"][0] == 1
        assert found[name]["precision_all_margin"][1] > 0
    assert found["half right"]["precision_all"][0] == 0.5
    assert found["half right"]["precision_read"][0] == 1 and found["half right"]["precision_next"][0] == 0
    assert found["half right"]["recall_next"][0] == 0
    assert found["meaningless"]["claims"] == {} and found["meaningless"]["precision_all"] == [None] * 3
    assert found["meaningless"]["recall_all"][0] == 0


def test_what_is_refused(root: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.parquet"
    one = json_lines(tmp_path / "one.jsonl", [{"row": 0, "text": "a"}])
    explained = tmp_path / "explained.parquet"
    assert call(*roundtrip(root, explained, limit=3)).code == 0
    for ran, message in [
        (clauses(root, out, one), "one row has no control"),
        (claims(root, out, one), "one row has no control"),
        (clauses(root, out, texts, base=root / "base"), "--base: belongs to --model"),
        (claims(root, out, texts, batch_size=2), "--batch-size: belongs to --judge"),
        (claims(root, out, texts, judge=root / "none"), "none"),
        (clauses(root, out, texts, ar=None), "does not name an AR"),
        (clauses(root, out, texts, model=root / "av"), "captured with"),
        (clauses(root, explained, explained, overwrite=True), "is the file of the texts"),
        (claims(root, explained, explained, overwrite=True), "is the file of the texts"),
        (claims(root, out, tmp_path / "no.jsonl"), "no such file"),
        (clauses(root, out, texts, where="position > 5000"), "has no row for --where"),
    ]:
        check_refused(ran, message)
    assert not out.exists() and pq.read_metadata(explained).num_rows == 3
