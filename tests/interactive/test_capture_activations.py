"""capture_activations: what the command writes, from texts, records and files; plain strings; the command's errors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import LAYER, call, capture
from tiny import byte_tokenizer, tiny_model

import nla_engine
from nla_engine.config import CaptureOptions
from nla_engine.errors import CheckpointError, NLAError, PromptError, RequestError, StoreError
from nla_engine.interactive.given import options_from
from nla_engine.store import CaptureStore

HOW = {"layer": LAYER, "max_new_tokens": 4, "device": "cpu", "quiet": True}


def same_rows(one: CaptureStore, other: CaptureStore) -> None:
    for layer in other.layers:
        np.testing.assert_array_equal(one.layer(layer)[:], other.layer(layer)[:])
    for name in ("token_id", "next_token_id", "position", "sequence", "flags"):
        np.testing.assert_array_equal(one.column(name), other.column(name))


def test_texts_records_and_files_give_the_store_of_the_command(root: Path, tmp_path: Path) -> None:
    expected = CaptureStore.open(root / "run.zarr")
    file = root / "prompts.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [record["prompt"] for record in records]
    ways: dict[str, Any] = {
        "str": str(file),
        "path": file,
        "dict": records,
        "text": texts,
        "iter": iter(records),
    }
    for name, prompts in ways.items():
        run = nla_engine.capture_activations(str(root / "base"), prompts, out=str(tmp_path / name), **HOW)
        assert isinstance(run, CaptureStore) and run.complete
        same_rows(run, expected)
        sources = [sequence.source for sequence in run.iter_sequences()]
        assert sources == ([{"prompt": text} for text in texts] if name == "text" else records)
        told = run.provenance["options"]["prompts"]
        assert told == (str(file) if name in ("str", "path") else "given in Python")


def test_rows_are_those_of_transformers(root: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """hidden_states[K + 1] of plain transformers, over the prompt and over what it goes on with."""
    text = "".join(rng.choice(list("abcdef "), 20))
    run = nla_engine.capture_activations(
        root / "base", [text], layer=[1, LAYER], out=tmp_path / "run.zarr", codec="bf16", positions="all",
        chat=False, max_new_tokens=np.int64(5), dtype=torch.float32, device=torch.device("cpu"), quiet=True,
    )  # fmt: skip
    model = tiny_model("qwen2")
    ids = torch.tensor([byte_tokenizer().encode(text)])
    eos = byte_tokenizer().eos_token_id
    whole = model.generate(
        ids,
        max_new_tokens=5,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
        eos_token_id=eos,
        pad_token_id=eos,
    )
    assert run.sequence(0).tokens.tolist() == whole[0].tolist()
    states = model(whole, output_hidden_states=True).hidden_states
    for layer in (1, LAYER):
        wanted = states[layer + 1][0].detach().numpy()
        np.testing.assert_allclose(run.layer(layer)[:], wanted, atol=0.01 * np.abs(wanted).max())


def test_a_loaded_model_serves_several_calls(root: Path, tmp_path: Path) -> None:
    lm = nla_engine.load_model(str(root / "base"), device="cpu")
    for name in ("a", "b"):
        run = nla_engine.capture_activations(lm, root / "prompts.jsonl", out=tmp_path / name, **HOW)
        same_rows(run, CaptureStore.open(root / "run.zarr"))


def test_numbers_of_numpy_are_kept_as_numbers(root: Path, tmp_path: Path) -> None:
    record = {
        "prompt": "say",
        "n": np.int64(3),
        "x": np.float32(0.5),
        "ok": np.bool_(True),
        "v": np.arange(2),
    }
    run = nla_engine.capture_activations(root / "base", [record, {"prompt": "b"}], out=tmp_path / "r", **HOW)
    assert run.sequence(0).source == {"prompt": "say", "n": 3, "x": 0.5, "ok": True, "v": [0, 1]}
    assert run.where("record.n == 3 and record.ok").tolist() == list(range(run.sequence(0).rows.stop))


def test_tables_are_read_row_by_row(root: Path, tmp_path: Path) -> None:
    records = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    for name, make in (("pandas", "DataFrame"), ("polars", "DataFrame")):
        table = getattr(pytest.importorskip(name), make)(records)
        run = nla_engine.capture_activations(root / "base", table, out=tmp_path / name, **HOW)
        assert [sequence.source for sequence in run.iter_sequences()] == records


def test_resume_and_overwrite_are_those_of_the_command(root: Path, tmp_path: Path) -> None:
    def again(**changes: Any) -> CaptureStore:
        given = {"prompts": ["a", "b"], "out": tmp_path / "r.zarr", **HOW, **changes}
        return nla_engine.capture_activations(root / "base", **given)

    first = again()
    with pytest.raises(
        StoreError, match=r"r\.zarr: exists; pass resume=True to continue it or overwrite=True"
    ):
        again()
    same_rows(again(resume=True), first)
    assert again(overwrite=True, prompts=["c"]).sequences == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"prompts": "What is this?"},
            PromptError,
            "'What is this.' is no file: a str is the path .* as a list",
        ),
        ({"prompts": {"prompt": "a"}}, PromptError, "prompts is of type dict: give a list"),
        ({"prompts": 3}, PromptError, "prompts is of type int: give a list"),
        ({"prompts": [[{"role": "user", "content": "a"}]]}, PromptError, 'is of type list: .*"messages"'),
        ({"prompts": []}, PromptError, "prompts: no usable prompt in it"),
        ({"prompts": ["a", 3]}, PromptError, "prompts, number 2: is of type int: give a text, or a dict"),
        ({"prompts": ["a", {"q": "b"}]}, PromptError, '^prompts, number 2: no field "prompt"'),
        ({"prompts": ["a", ""]}, PromptError, "^prompts, number 2: "),
        ({"prompts": [{"prompt": "a", "x": float("nan")}]}, PromptError, "prompts, number 1: .*'x' is nan"),
        ({"prompts": [{"prompt": "a", "x": object()}]}, PromptError, "number 1: .*'x' is of type object"),
        ({"prompts": Path("gone.jsonl")}, PromptError, "gone.jsonl: no such file"),
        ({"layer": 99}, NLAError, "99"),
        ({"layer": "x"}, RequestError, "layer is 'x': it must be block numbers"),
        ({"layer": []}, RequestError, "layer is"),
        ({"layer": 1.5}, RequestError, "layer is '1.5'"),
        ({"layer": True}, RequestError, "layer is 'True'"),
        ({"max_new_tokens": "four"}, RequestError, "max_new_tokens is four: it must be 0 or more, or max"),
        ({"max_new_tokens": True}, RequestError, "max_new_tokens is True"),
        ({"max_new_tokens": None}, RequestError, "max_new_tokens is None"),
        ({"max_new_tokens": -1}, RequestError, "max_new_tokens is -1: it must be 0 or more"),
        ({"max_new_token": 4}, RequestError, "max_new_token is no option of .*: did you mean max_new_tokens"),
        ({"xyz": 4}, RequestError, "xyz is no option of capture_activations: it has base, "),
        ({"temperature": "hot"}, RequestError, "temperature is 'hot': it must be a number"),
        ({"codec": 8}, RequestError, "codec is 8: it must be text"),
        ({"codec": "int9"}, RequestError, "codec is 'int9'"),
        ({"device": "tpu"}, RequestError, "tpu"),
        ({"resume": 1}, RequestError, "resume is 1: it must be True or False"),
        ({"model": "nowhere/at/all"}, (CheckpointError, NLAError), "nowhere/at/all"),
    ],
    ids=lambda value: "" if isinstance(value, (dict, type)) else value,
)
def test_refused_in_one_line(
    root: Path, tmp_path: Path, changes: dict[str, Any], error: Any, message: str
) -> None:
    given = {"model": root / "base", "prompts": ["a"], "out": tmp_path / "out.zarr", **HOW} | changes
    with pytest.raises(error, match=message) as caught:
        nla_engine.capture_activations(**given)
    assert "\n" not in str(caught.value) and tempfile.gettempdir() + "/nla-prompts" not in str(caught.value)
    assert not (tmp_path / "out.zarr").exists()
    assert caught.value._render_traceback_() == [f"{type(caught.value).__name__}: {caught.value}"]


def test_the_error_is_that_of_the_command(root: Path, tmp_path: Path) -> None:
    said = call(*capture(root, tmp_path / "r.zarr", layer=40)).err
    with pytest.raises(NLAError) as caught:
        nla_engine.capture_activations(
            root / "base", root / "prompts.jsonl", 40, tmp_path / "r.zarr", quiet=True
        )
    assert said == f"error: {caught.value}\n"


def test_every_option_takes_what_a_program_has() -> None:
    given = {
        "model": Path("m"),
        "prompts": "p.jsonl",
        "layer": range(3),
        "out": Path("o"),
        "template_option": {"enable_thinking": False},
        "host_memory": 2,
        "positions": "prompt,generated",
        "temperature": np.float32(0.5),
    }
    options = options_from(CaptureOptions, given, what="x")
    assert (options.model, options.layer, options.out) == ("m", (0, 1, 2), "o")
    assert options.template_option == {"enable_thinking": False}
    assert (options.host_memory, options.temperature) == (2.0, 0.5)
    assert type(options.host_memory) is float
    for layers in (5, "5", "5,6", [5, "6"], np.array([6, 5]), (np.int64(5),)):
        assert options_from(CaptureOptions, given | {"layer": layers}, what="x").layer[0] == 5


def test_options_take_text_for_paths_and_a_number_for_a_layer(tmp_path: Path) -> None:
    options = CaptureOptions(model=tmp_path, prompts=Path("p.jsonl"), layer=7, out=tmp_path / "o")  # type: ignore[arg-type]
    assert (options.model, options.out, options.layer) == (str(tmp_path), str(tmp_path / "o"), (7,))
    table = nla_engine.RoundtripOptions(store=tmp_path, av=tmp_path, ar="ar", out="o.parquet")  # type: ignore[arg-type]
    assert (table.store, table.av, table.out) == (str(tmp_path), str(tmp_path), Path("o.parquet"))


def test_progress_and_messages_go_to_stderr(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (True, False):
        nla_engine.capture_activations(
            root / "base", ["a"], out=tmp_path / str(quiet), **(HOW | {"quiet": quiet})
        )
        out, err = capsys.readouterr()
        assert out == "" and ("1 sequences" in err or "1 sequence" in err) is not quiet
