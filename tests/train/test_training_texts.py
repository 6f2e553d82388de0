"""Texts by rule say what is true of their rows; optimiser and documents by hand."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from nla_engine.demo.real_corpus import prompts
from nla_engine.models.av_prompt import verbalizer_prompt
from nla_engine.models.sidecar import read_sidecar, reconstructor_prompts
from nla_engine.store import CaptureStore
from nla_engine.train.data import document_of
from nla_engine.train.fit import Fitter
from nla_engine.train.output import write_sidecars
from nla_engine.train.rule import kind_of, rule_texts


@pytest.fixture(scope="module")
def store(made: Path) -> CaptureStore:
    return CaptureStore.open(made / "rows.zarr")


def quoted(text: str) -> str:
    """A text as the rule quotes it."""
    return re.sub(r"<\|(.*?)\|>", r"[\1]", text).replace("\n", "\\n")


def test_texts_quote_what_was_read_and_name_what_is_likely(store: CaptureStore) -> None:
    rows = np.arange(store.rows)
    texts = rule_texts(store, rows, 0)
    position, owner = store.column("position"), store.column("sequence")
    top, chance = store.column("top_id"), np.exp(store.column("top_logprob"))
    for row, text in zip(rows.tolist(), texts, strict=True):
        sequence = store.sequence(int(owner[row]))
        upto = sequence.tokens[: position[row] + 1]
        assert f'"{quoted(sequence.vocabulary.join(upto[-10:]))}"' in text
        assert f'"{quoted(sequence.vocabulary.text(int(upto[-1])))}"' in text
        named = [f'"{quoted(sequence.vocabulary.text(int(token)))}"' for token in top[row]]
        if chance[row, 0] >= 0.04:
            assert text.endswith((f"{named[0]}.", f"{named[0]} comes next.", f"{named[1]}.", f"{named[2]}."))
            assert named[0] in text
        assert "<explanation>" not in text and "<|" not in text


def test_texts_depend_on_seed_and_row_alone(store: CaptureStore, rng: np.random.Generator) -> None:
    rows = rng.permutation(store.rows)
    first = dict(zip(rows.tolist(), rule_texts(store, rows, 3), strict=True))
    again = rule_texts(store, np.arange(store.rows), 3)
    assert again == [first[row] for row in range(store.rows)]
    assert again != rule_texts(store, np.arange(store.rows), 4)


@pytest.mark.parametrize(
    ("near", "kind"),
    [
        ("First.\n2. Second thing", "in a numbered list"),
        ("Things:\n- one", "in a list"),
        ("def f(x):\n    return x + 1", "in code"),
        ("## A title", "in a heading"),
        ("Some words.\n", "at the start of a line"),
        ("It costs 12, 43, 54, 65", "in numbers"),
        ('He said "we', "in quoted words"),
        ("Is it so?", "behind a question"),
        ("It is so.", "at the end of a sentence"),
        ("It is", "inside a sentence"),
        ("", "at the start of a line"),
    ],
)
def test_kinds(near: str, kind: str) -> None:
    assert kind_of(near, "a text") == f"a text, {kind}"


def test_sequences_of_one_record_are_one_document(store: CaptureStore) -> None:
    names = [document_of(each) for each in store.iter_sequences()]
    assert len(set(names)) == store.sequences
    record = {"nla_window": {"window": 2, "document": 0, "windows": 3, "start": 0}}

    part = SimpleNamespace(number=7, source=record, record=b"{}")
    assert document_of(part) == "from 5 on"  # type: ignore[arg-type]
    part.source = {"id": "a", **record}
    assert document_of(part) == "id a"  # type: ignore[arg-type]


def test_an_optimiser_goes_on_where_it_was(rng: np.random.Generator) -> None:
    """And its first step is AdamW's by the formula."""
    start = torch.from_numpy(rng.standard_normal((3, 4))).float()
    gradients = [torch.from_numpy(rng.standard_normal((3, 4))).float() * 0.1 for _ in range(4)]

    def fitted(cut: int | None) -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone())
        flat = torch.nn.Parameter(torch.ones(2))
        fitter = Fitter({"w": weight, "flat": flat}, 0.1)
        for step, gradient in enumerate(gradients):
            if step == cut:
                held = {name: value.clone() for name, value in fitter.state().items()}
                fitter = Fitter({"w": weight, "flat": flat}, 0.1)
                fitter.load(held)
            weight.grad, flat.grad = gradient.clone(), torch.ones(2) * 0.1
            fitter.step(step, 2, step / 4)
        return weight.detach()

    whole = fitted(None)
    assert torch.equal(fitted(2), whole)
    weight = torch.nn.Parameter(start.clone())
    fitter = Fitter({"w": weight}, 0.1)
    weight.grad = gradients[0].clone()
    fitter.step(0, 2, 0.0)  # half of the peak rate; the gradient is shorter than 1
    norm = float(gradients[0].norm())
    used = gradients[0] / max(norm, 1.0)
    wanted = start * (1 - 0.05 * 0.05) - 0.05 * used / (used.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), wanted, atol=2e-4, rtol=1e-3)


def test_prompts_of_the_recipe_are_many_and_the_same_again() -> None:
    found = prompts(6600, 0)
    assert found == prompts(6600, 0) != prompts(6600, 1)
    assert len({each["prompt"] for each in found}) > 0.9 * len(found)
    assert len({each["id"] for each in found}) == len(found)


@pytest.mark.real
def test_sidecars_hold_for_a_real_tokenizer(smollm2: Path, tmp_path: Path) -> None:
    """Whatever a text ends with, and if there is none: the AR's prompt ends with the tokens that the sidecar says."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    write_sidecars(tmp_path, tokenizer, 576, 20, "sqrt_d_model", 10)
    sidecar = read_sidecar(tmp_path / "ar", "ar")
    assert len(sidecar.suffix_ids) >= 3
    texts = ["", "words", 'next may come ",".', "x</text>", "<", "a\n", "é…", "> ", "12"]
    prompts = reconstructor_prompts(sidecar, tokenizer, texts)
    assert all(tuple(ids[-len(sidecar.suffix_ids) :]) == sidecar.suffix_ids for ids in prompts)
    av = read_sidecar(tmp_path / "av", "av")
    prompt = verbalizer_prompt(av, tokenizer)
    assert prompt.token_ids[prompt.places[0]] == av.marker_id and av.injection.scale == 24.0
