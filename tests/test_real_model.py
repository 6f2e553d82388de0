"""The first stage on a real pretrained model, SmolLM2-135M-Instruct, beside transformers' own float32 on a CPU."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Ran, call, flags
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla_engine.capture.run import run_capture
from nla_engine.codec.rows import Codec, bf16_bits, relative_errors
from nla_engine.config import CaptureOptions
from nla_engine.demo import smollm2 as recipe
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.store import CaptureStore, Finish, RowFlag

pytestmark = pytest.mark.real

LAYERS = (0, 10, 20, 29)
NEW = 24
TEMPERATURE = 1.5
#: Requests whose greedy replies do not depend on rounding: the best token leads by 0.02 or more.
#: Two end by themselves within NEW tokens; the story makes the batch ragged.
QUESTIONS = (
    "Compare a steam engine with the game of chess: one thing they share, one in which they differ.",
    "Give Dalia one piece of advice about the metric system, then say goodbye.",
    "What is the capital of France? Answer in one word.",
    "Who went furthest, and why do you think so?\n\n"
    + "Ada walked home along the river after the last train had left. Bruno counted herons. " * 8,
    "List three facts about why leaves change colour.",
)
TEXTS = (
    "The harbour froze in the second week of January, and the ferries stood along the quay like cattle. Children "
    "walked out to the lighthouse, which nobody had reached on foot since 1947, and came back with blue hands.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / 2\n",
    "1, 2, 3, 5, 8, 13, 21, 34. The next number is 55, and after it 89.",
)


@dataclass(frozen=True)
class Truth:
    """One sequence by transformers alone. rows: of block K, its output for every token, float32 [n, d_model]."""

    prompt: list[int]
    reply: list[int]
    rows: dict[int, np.ndarray]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def lm(smollm2: Path, tokenizer: Any) -> LanguageModel:
    """A separate copy of the model: the engine replaces its attention."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return wrap_model(model, tokenizer, name=str(smollm2))


@torch.inference_mode()
def block_outputs(model: Any, ids: list[int]) -> dict[int, np.ndarray]:
    """What the hook on each block of LAYERS sees."""
    rows: dict[int, np.ndarray] = {}
    hooks = [
        model.model.layers[k].register_forward_hook(lambda _m, _i, out, k=k: rows.update({k: out[0].numpy()}))
        for k in LAYERS
    ]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return rows


@pytest.fixture(scope="module")
def truth(model: Any, tokenizer: Any) -> list[Truth]:
    """Every question answered by `generate`, one at a time, then read again in one pass."""
    out = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        read = torch.tensor([prompt])
        found = model.generate(
            read, attention_mask=torch.ones_like(read), max_new_tokens=NEW, do_sample=False
        )
        ids = found[0].tolist()
        out.append(Truth(prompt, ids[len(prompt) :], block_outputs(model, ids)))
    return out


@pytest.fixture(scope="module")
def captured(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """The same by `nla-engine capture`: five requests in three slots, all rows of four layers."""
    root = tmp_path_factory.mktemp("real")
    prompts, out = root / "prompts.jsonl", root / "run.zarr"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    options = {"prompts": prompts, "out": out, "positions": "all", "codec": "bf16", "batch_size": 3}
    command = ["capture", smollm2, *flags({**options, "max_new_tokens": NEW, "device": "cpu", "json": True})]
    for layer in LAYERS:
        command += ["--layer", layer]
    ran = call(*command)
    assert ran.code == 0, ran.err
    return out, ran


def test_the_checkpoint_is_the_released_model(smollm2: Path, tokenizer: Any) -> None:
    assert hashlib.sha256((smollm2 / "model.safetensors").read_bytes()).hexdigest() == recipe.WEIGHTS_SHA256
    assert sorted(p.name for p in smollm2.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    # Runs of spaces stay together before a number, as every digit is split off first.
    assert tokenizer.tokenize("a   1234 b") == ["a", "ĠĠĠ", "1", "2", "3", "4", "Ġb"]
    text = "Grüße, 東京 🙂\n\n\tdon't  <|im_end|> 3.14"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 2 and len(tokenizer) == 49_152


def test_tokens_are_those_of_transformers(captured: tuple[Path, Ran], truth: list[Truth]) -> None:
    store = CaptureStore.open(captured[0])
    finishes = []
    for sequence, want in zip(store.iter_sequences(), truth, strict=True):
        assert sequence.tokens[: sequence.prompt_size].tolist() == want.prompt
        assert sequence.tokens[sequence.prompt_size :].tolist() == want.reply
        assert (sequence.finish == Finish.EOS) == (want.reply[-1] == 2)
        finishes.append(sequence.finish)
    assert finishes.count(Finish.EOS) == 2 and finishes.count(Finish.LENGTH) == 3
    assert captured[1].json["tokens_generated"] == sum(len(want.reply) for want in truth)


def test_rows_are_the_block_outputs_of_transformers(captured: tuple[Path, Ran], truth: list[Truth]) -> None:
    store = CaptureStore.open(captured[0])
    for sequence, want in zip(store.iter_sequences(), truth, strict=True):
        assert store.column("position")[sequence.rows].tolist() == list(range(len(sequence.tokens)))
        for layer in LAYERS:
            check_rows(store.layer(layer)[sequence.rows], want.rows[layer], limit=2**-8)


def check_rows(got: np.ndarray, want: np.ndarray, limit: float) -> None:
    """The relative L2 error of every row; rounding to the 8 bits of a bfloat16 costs up to 2**-8 of a value."""
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert got.shape == want.shape and error.max() < limit, error.max()


def test_the_audit_is_sound(captured: tuple[Path, Ran], smollm2: Path) -> None:
    ran = call("verify", captured[0], "--model", smollm2, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
def test_a_text_that_is_read(
    codec: str, model: Any, tokenizer: Any, lm: LanguageModel, tmp_path: Path
) -> None:
    """`--corpus`: codecs keep what they state, rows of sinks are exact."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    layers = (20, 29)
    options = CaptureOptions(
        model=lm.name,
        prompts=tmp_path / "texts.jsonl",
        layer=layers,
        out=str(tmp_path / "run.zarr"),
        corpus=True,
        codec=codec,
        batch_size=2,
    )
    run_capture(options, lm=lm)
    store = CaptureStore.open(tmp_path / "run.zarr")
    for sequence, text in zip(store.iter_sequences(), TEXTS, strict=True):
        assert sequence.tokens.tolist() == tokenizer(text).input_ids
        rows = block_outputs(model, sequence.tokens.tolist())
        for layer in layers:
            got, want = store.layer(layer)[sequence.rows], rows[layer]
            sink = np.linalg.norm(want, axis=1) > store.sink_norm[layer]
            check_rows(got[~sink], want[~sink], limit=WORST[codec])
            check_exact(got[sink], want[sink])
            assert (store.column("flags")[sequence.rows][sink] & RowFlag.SINK).all()
            if layer == 20:  # here the first token is 100 times as long as the others
                assert np.flatnonzero(sink).tolist() == [0]
    for layer in layers:
        assert store.codec_error[layer]["mean"] <= MEAN[codec]


#: Relative L2 error of a row: a little above the worst, and the largest mean, of docs/codecs.md on this model.
WORST = {"int8": 0.0075, "int4": 0.115, "bf16": 2**-8}
MEAN = {"int8": 0.0056, "int4": 0.09, "bf16": 0.0}


def check_exact(got: np.ndarray, want: np.ndarray) -> None:
    """Rows kept exactly are the float32 rows in bfloat16, but where sums in another order round differently."""
    apart = np.abs(bf16_bits(got).astype(np.int32) - bf16_bits(want).astype(np.int32))
    assert apart.max(initial=0) <= 1 and np.count_nonzero(apart) <= 0.02 * apart.size


def test_every_codec_on_its_rows(truth: list[Truth]) -> None:
    """The errors that docs/codecs.md states, on the rows of the replies."""
    for layer in LAYERS:
        rows = np.concatenate([sequence.rows[layer] for sequence in truth])
        norm = np.linalg.norm(rows, axis=1)
        rows = rows[norm < 8 * np.median(norm)]
        for name, mean in {"int8": MEAN["int8"], "int4": MEAN["int4"], "bf16": 2**-9}.items():
            error = relative_errors(Codec.named(name, rows.shape[1]), rows)
            assert error.max() < WORST[name] and 0 < error.mean() < mean, (layer, name, error.mean())


@torch.inference_mode()
def test_tokens_are_drawn_as_often_as_the_softmax_says(model: Any, lm: LanguageModel, tmp_path: Path) -> None:
    draws = 600
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text((json.dumps({"prompt": "Name a colour."}) + "\n") * draws)
    options = CaptureOptions(
        model=lm.name,
        prompts=prompts,
        layer=(0,),
        out=str(tmp_path / "run.zarr"),
        max_new_tokens=1,
        temperature=TEMPERATURE,
        seed=7,
        batch_size=200,
    )
    run_capture(options, lm=lm)
    store = CaptureStore.open(tmp_path / "run.zarr")
    drawn = np.array([sequence.tokens[-1] for sequence in store.iter_sequences()])
    prompt = store.sequence(0).tokens[:-1].astype(np.int64)
    logits = model(torch.from_numpy(prompt)[None]).logits[0, -1]
    expected = draws * torch.softmax(logits.double() / TEMPERATURE, -1).numpy()
    often = expected >= 5
    seen = np.append(np.bincount(drawn, minlength=len(expected))[often], (~often[drawn]).sum())
    wanted = np.append(expected[often], expected[~often].sum())
    chi2, freedom = float(((seen - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert freedom >= 10 and len(drawn) == draws
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)
    # Other temperatures are not mistaken for this one.
    other = torch.softmax(logits.double() / (0.9 * TEMPERATURE), -1).numpy() * draws
    other = np.append(other[often], other[~often].sum())
    assert ((seen - other) ** 2 / other).sum() > freedom + 4 * np.sqrt(2 * freedom)


def test_in_bfloat16_fused_blocks_pass_their_check_and_the_store_its_audit(
    smollm2: Path, tmp_path: Path
) -> None:
    """Layers 10 and 11, where rounding moves some rows by a tenth and more."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS[1:3]))
    options = {"layer": "10,11", "positions": "all", "max_new_tokens": 6, "kernels": "fused"}
    made = ["--prompts", prompts, "--out", tmp_path / "run.zarr", "--dtype", "bfloat16", "--device", "cpu"]
    assert call("capture", smollm2, *made, *flags(options)).code == 0
    checked = call("verify", tmp_path / "run.zarr", "--model", smollm2, "--device", "cpu", "--json")
    assert checked.code == 0, checked.out
    names = [check["name"] for check in checked.json["checks"] if "rows are the output" in check["name"]]
    assert names == [f"layer {k}: rows are the output of block {k}" for k in (10, 11)]
