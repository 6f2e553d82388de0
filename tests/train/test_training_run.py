"""The command train: whole runs on a small model, resumed runs, what comes out, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import LAYER, call, capture, check_refused, contents, flags
from tiny import byte_tokenizer, save_model, tiny_config, write_prompts
from transformers import AutoModelForCausalLM

from nla_engine.cli.interrupted import Interrupted, what_is_left
from nla_engine.config import TrainOptions
from nla_engine.demo import real_corpus, real_run
from nla_engine.errors import RequestError
from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore
from nla_engine.train import run as running
from nla_engine.train.data import Data, read_data
from nla_engine.train.run import run_train

SMALL = {
    "held_out": 0.3,
    "ar_steps": 2,
    "av_steps": 2,
    "rl_steps": 2,
    "batch_size": 3,
    "vectors": 2,
    "samples": 2,
    "max_new_tokens": 12,
    "measured_rows": 4,
    "measures": 1,
    "slots": 4,
    "av_rank": 2,
    "ar_rank": 2,
    "device": "cpu",
}


def train(made: Path, out: Path, **changes: object) -> list[object]:
    return ["train", made / "rows.zarr", *flags({"out": out, **SMALL, **changes})]


def options_of(made: Path, out: Path, **changes: object) -> TrainOptions:
    return TrainOptions(store=str(made / "rows.zarr"), out=out, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A training by the command, and its summary."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ran = call(*train(made, out, checkpoint_steps=1), "--json")
    assert ran.code == 0, ran.err
    return out, ran.json


def check_usable(made: Path, told: dict, tmp_path: Path) -> None:
    """The pair goes through a round trip."""
    table = tmp_path / "explained.parquet"
    pair = {"av": told["av"], "ar": told["ar"], "out": table, "max_new_tokens": 12, "limit": 4}
    again = call("roundtrip", made / "rows.zarr", *flags({**pair, "device": "cpu"}))
    assert again.code == 0, again.err
    least = min(CaptureStore.open(made / "rows.zarr").column("position"))
    assert read_metadata(table)["av_min_position"] == least


def test_what_comes_out_is_a_pair_for_the_other_commands(
    whole: tuple[Path, dict], made: Path, tmp_path: Path
) -> None:
    out, told = whole
    assert told["steps"] == {"ar": 2, "av": 2, "rl": 2} and told["layer"] == LAYER
    assert told["documents"] + told["held_out_documents"] == 16
    assert {"fve_nrm", "fve_given", "cos_shuffled", "closed", "samples"} <= told["last"].keys()
    assert told["warm"] is not None and not (out / "checkpoint").exists()
    noted = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [each["phase"] for each in noted if "measured" in each] == ["ar", "av", "rl", "rl"]
    assert (out / "av" / "adapter_config.json").exists()
    check_usable(made, told, tmp_path)


def test_every_weight_may_be_trained(made: Path, tmp_path: Path) -> None:
    """The released layout comes out: whole checkpoints, the AR with the blocks that it needs."""
    ran = call(*train(made, tmp_path / "out", method="full", kl=0), "--json")
    assert ran.code == 0, ran.err
    assert not (tmp_path / "out" / "av" / "adapter_config.json").exists()
    config = json.loads((tmp_path / "out" / "ar" / "config.json").read_text())
    assert config["num_hidden_layers"] == LAYER + 1
    check_usable(made, ran.json, tmp_path)


def test_a_model_inside_a_wrapper_is_trained(tmp_path: Path) -> None:
    """Gemma-3, whose text model lies inside one that sees images, and whose embeddings are scaled."""
    save_model(tmp_path / "base", "gemma3")
    write_prompts(tmp_path / "prompts.jsonl", 12)
    assert call(*capture(tmp_path, tmp_path / "rows.zarr", max_new_tokens=4, next_token=3)).code == 0
    ran = call(*train(tmp_path, tmp_path / "out", ar_steps=1, av_steps=1, rl_steps=1), "--json")
    assert ran.code == 0, ran.err
    check_usable(tmp_path, ran.json, tmp_path)


class Cut(Exception):
    """Ends a run."""


def cut_at(steps: int):
    """A progress that ends a run once it has done so many steps."""
    count = 0

    def progress(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count > steps:
            raise Cut

    return progress


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resumed_training_is_the_same_to_the_last_bit(
    at: int, whole: tuple[Path, dict], made: Path, tmp_path: Path
) -> None:
    """It is cut off within each phase."""
    with pytest.raises(Cut):
        run_train(options_of(made, tmp_path / "cut", checkpoint_steps=1), progress=cut_at(at))
    assert (tmp_path / "cut" / "checkpoint" / "state.safetensors").exists()
    resumed = run_train(options_of(made, tmp_path / "cut", checkpoint_steps=1, resume=True))
    for role in ("av", "ar"):
        first, second = (
            {Path(p).name: sha for p, sha in contents(directory / role).items()}
            for directory in (whole[0], tmp_path / "cut")
        )
        assert first == second and len(first) == (3 if role == "av" else 4)
    assert {**resumed.last, "samples": list(resumed.last["samples"])} == whole[1]["last"]
    logs = [(directory / "log.jsonl").read_text().splitlines() for directory in (whole[0], tmp_path / "cut")]
    first, second = ([(e["phase"], e["step"]) for e in map(json.loads, lines)] for lines in logs)
    assert first == second


def test_a_budget_ends_every_phase(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a hundredth of a second whenever it is looked at."""
    looks = itertools.count()
    monkeypatch.setattr(running, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 100))
    summary = run_train(
        options_of(made, tmp_path / "out", budget=0.02, ar_steps=10**6, av_steps=10**6, rl_steps=10**6)
    )
    assert 1.2 <= summary.seconds < 2 and all(0 <= steps < 10**6 for steps in summary.steps.values())
    assert summary.steps["ar"] > 0


def test_texts_of_a_file_are_taken(made: Path, tmp_path: Path) -> None:
    store = CaptureStore.open(made / "rows.zarr")
    rows = np.arange(0, store.rows, 2)
    table = pa.table({"row": rows, "text": [f"text of {row}" for row in rows]})
    pq.write_table(table, tmp_path / "texts.parquet")
    data = read_data(
        options_of(made, tmp_path / "out", texts=tmp_path / "texts.parquet"), store, torch.device("cpu")
    )
    both = [
        *zip(data.trained.row, data.trained.texts, strict=True),
        *zip(data.held_out.row, data.held_out.texts, strict=True),
    ]
    assert sorted(row for row, _ in both) == rows.tolist()
    assert all(text == f"text of {row}" for row, text in both)
    sides = [set(part.sequence.tolist()) for part in (data.trained, data.held_out)]
    assert not sides[0] & sides[1]
    vectors = store.layer(LAYER)[data.trained.row]
    np.testing.assert_allclose(
        data.trained.vectors, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-6
    )


def test_training_data_that_was_imported_is_taken(made: Path, tmp_path: Path) -> None:
    """`export --to nla`, a text added to each row, `import`, `train --text-field`."""
    file = tmp_path / "data.parquet"
    assert call("export", made / "rows.zarr", "--to", "nla", "--out", file).code == 0
    table = pq.read_table(file)
    texts = [f"about {place}" for place in range(len(table))]
    pq.write_table(table.append_column("api_explanation", pa.array(texts)), tmp_path / "with.parquet")
    store = tmp_path / "imported.zarr"
    imported = call("import", tmp_path / "with.parquet", "--out", store, "--layer", LAYER)
    assert imported.code == 0, imported.err
    given = {"out": tmp_path / "out", **SMALL, "text_field": "api_explanation", "model": made / "base"}
    ran = call("train", store, *flags(given), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["rows"] + ran.json["held_out_rows"] == len(table)
    check_refused(
        call("train", store, *flags({**given, "out": tmp_path / "no", "text_field": "nothing"})),
        "no such text",
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 1e-9}, "would be held out"),
        ({"held_out": 1.0}, "--held-out is 1.0"),
        ({"layer": 1}, "layer"),
        ({"where": "position < 0"}, "has no row to train on"),
        ({"model": "missing-model-directory"}, "missing-model-directory"),
        ({"texts": "missing.parquet"}, "missing.parquet"),
        ({"method": "both"}, "--method"),
        ({"method": "full"}, "--kl needs --method lora"),
        ({"ar_steps": 0, "av_steps": 0, "rl_steps": 0}, "nothing would be trained"),
        ({"resume": True}, "holds no checkpoint"),
        ({"text_field": "n"}, "several rows|no such text"),
        ({"injection_scale": "-3"}, "--injection-scale"),
        ({"samples": 1}, "--samples"),
        ({"max_new_tokens": 500}, "512 positions: lower it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_refused_and_nothing_is_written(
    changes: dict[str, object], message: str, made: Path, tmp_path: Path
) -> None:
    check_refused(call(*train(made, tmp_path / "out", **changes)), message)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_width_is_refused(made: Path, tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    config.hidden_size, config.num_attention_heads = 32, 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    byte_tokenizer().save_pretrained(tmp_path / "narrow")
    check_refused(call(*train(made, tmp_path / "out", model=tmp_path / "narrow")), "width")
    assert not (tmp_path / "out").exists()


def test_texts_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    """Beyond the model's positions they are refused; that the AV's are cut is said."""
    store = CaptureStore.open(made / "rows.zarr")
    texts = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"row": range(store.rows), "text": ["word " * 110] * store.rows}), texts)
    check_refused(call(*train(made, tmp_path / "out", texts=texts)), "512 positions: shorten it")
    pq.write_table(pa.table({"row": range(store.rows), "text": ["word " * 20] * store.rows}), texts)
    ran = call(*train(made, tmp_path / "out", texts=texts, rl_steps=0))
    assert ran.code == 0 and "100% of the texts are longer than --max-new-tokens 12" in ran.err


def test_an_interrupt_says_how_to_go_on(made: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    given = options_of(made, tmp_path / "out", checkpoint_steps=1)
    with pytest.raises(Interrupted, match="--resume continues"), what_is_left(given):
        run_train(given, progress=interrupt)


def test_a_store_without_next_tokens_needs_texts(made: Path, tmp_path: Path) -> None:
    assert call(*capture(made, tmp_path / "rows.zarr")).code == 0
    check_refused(call(*train(tmp_path, tmp_path / "out")), "--next-token")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept_unless_it_may_be_replaced(made: Path, tmp_path: Path) -> None:
    short = {"rl_steps": 0, "av_steps": 0}
    first = run_train(options_of(made, tmp_path / "out", **short))
    before = contents(tmp_path / "out")
    for more, message in (((), "exists"), (("--resume",), "is finished")):
        check_refused(call(*train(made, tmp_path / "out"), *more), message)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("mine")
    second = run_train(options_of(made, tmp_path / "out", **short, overwrite=True))
    assert second.last == first.last and (tmp_path / "out" / "mine.txt").exists()


def test_other_options_are_refused_on_resume(made: Path, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        run_train(options_of(made, tmp_path / "out", checkpoint_steps=1), progress=cut_at(1))
    grown = options_of(made, tmp_path / "out", checkpoint_steps=1, resume=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Data, "fingerprint", lambda self: "of another store")
        with pytest.raises(RequestError, match="other rows or texts"):
            run_train(grown)
    with pytest.raises(RequestError, match="another --rate"):
        run_train(options_of(made, tmp_path / "out", rate=1e-3, resume=True))
    (tmp_path / "out" / "checkpoint" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(RequestError, match="cannot be read"):
        run_train(options_of(made, tmp_path / "out", resume=True))


def test_a_model_that_is_an_adapter_is_refused(whole: tuple[Path, dict], made: Path, tmp_path: Path) -> None:
    check_refused(call(*train(made, tmp_path / "out", model=whole[0] / "av")), "is an adapter")
    assert not (tmp_path / "out").exists()


def test_the_demo_of_a_pair_runs_every_stage(
    whole: tuple[Path, dict], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["--pair", whole[0], "--base", made / "base", "--out", tmp_path / "demo", "--questions", 2]
    assert real_run.main([str(each) for each in [*given, "--rows", 2, "--tokens", 4, "--device", "cpu"]]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["round_trip"]["rows"] == 4 and "controls" in summary
    assert all((tmp_path / "demo" / name).exists() for name in real_run.FILES)
    given[1] = tmp_path / "nothing"
    assert real_run.main([str(each) for each in given]) == 2
    assert "nla_meta.yaml: missing" in capsys.readouterr().err


def test_the_questions_of_the_demo_are_not_those_of_the_recipe() -> None:
    topics = [
        topic.removeprefix("a ").removeprefix("the ") for topic in real_corpus._split(real_corpus.TOPICS)
    ]
    for question in real_run.QUESTIONS:
        assert not [topic for topic in topics if re.search(rf"\b{re.escape(topic)}\b", question)], question
