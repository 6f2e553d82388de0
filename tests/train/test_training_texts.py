"""Texts by rule say what is true of their rows; optimiser and documents by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import LAYER
from transformers import AutoTokenizer

from nla_engine.demo.real_corpus import prompts
from nla_engine.models.av_prompt import verbalizer_prompt
from nla_engine.models.sidecar import read_sidecar, reconstructor_prompts
from nla_engine.roundtrip.score import unit
from nla_engine.store import CaptureStore
from nla_engine.train import words
from nla_engine.train.data import document_of
from nla_engine.train.fit import Fitter
from nla_engine.train.output import write_sidecars
from nla_engine.train.phases import ends_at
from nla_engine.train.rule import kind_of, rule_texts
from nla_engine.train.words import Words, shown


@pytest.fixture(scope="module")
def store(made: Path) -> CaptureStore:
    return CaptureStore.open(made / "rows.zarr")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are learnt from two rows on, and from unlikely tokens: the store is small, its model unsure."""
    monkeypatch.setattr(words, "_LEAST", 2)
    monkeypatch.setattr(words, "_LIKELY", 0.0)


def directions(store: CaptureStore, rows: np.ndarray) -> torch.Tensor:
    return unit(store.layer(LAYER).torch(rows))


def test_words_are_means_of_rows_away_from_the_mean(
    store: CaptureStore, rng: np.random.Generator, few: None
) -> None:
    """Each direction by hand: of rows of a token, and of rows weighted by how likely a token follows."""
    rows = rng.permutation(store.rows)
    vectors = directions(store, rows)
    learnt = Words.learn(store, rows, vectors)
    away = (vectors - vectors.mean(0)).double().numpy()
    position, owner = store.column("position")[rows], store.column("sequence")[rows]
    top, chance = store.column("top_id")[rows], np.exp(store.column("top_logprob")[rows].astype(float))
    texts = {n: store.sequence(int(n)) for n in np.unique(owner)}
    names = [[shown(texts[n].vocabulary.text(int(t))) for t in texts[n].tokens] for n in owner]
    last = [each[at] for each, at in zip(names, position, strict=True)]
    word = texts[owner[0]].vocabulary.text
    for label, got in zip(learnt.labels, learnt.directions.double().numpy(), strict=True):
        mark, name = label.split(" ", 1)
        if mark == "like":
            weight = np.array([each == name for each in last], float)
            assert weight.sum() >= 2
        else:
            hit = np.array([[shown(word(int(t))) == name for t in line] for line in top])
            weight = (chance * hit).sum(1)
        wanted = weight @ away
        np.testing.assert_allclose(got, wanted / np.linalg.norm(wanted), atol=1e-5)
    marks = {label.split(" ")[0] for label in learnt.labels}
    assert marks == {"like", "before"} and len(set(learnt.labels)) == len(learnt.labels)


def test_words_of_a_vector_are_what_it_is_made_of(rng: np.random.Generator) -> None:
    """Directions at right angles: each word once, the strongest first."""
    basis = torch.from_numpy(np.linalg.qr(rng.standard_normal((40, 40)))[0]).float()
    made = Words(torch.full((40,), 0.1), basis[:20], [f"like {n}" for n in range(20)])
    strength = rng.permutation(np.arange(1.0, 21.0))
    vector = made.mean + torch.from_numpy(strength).float() @ basis[:20]
    (found,) = made.of(vector[None], torch.device("cpu"))
    assert found == " ".join(f"like {n}" for n in np.argsort(-strength)[:12])


def test_texts_say_the_kind_and_the_words(store: CaptureStore, rng: np.random.Generator, few: None) -> None:
    """They depend on which rows words are learnt from, and not on the order of rows."""
    rows = np.arange(store.rows)
    learnt = rng.random(store.rows) < 0.8
    order = rng.permutation(store.rows)
    cpu = torch.device("cpu")
    texts = rule_texts(store, rows, directions(store, rows), learnt, cpu)
    mixed = rule_texts(store, order, directions(store, order), learnt[order], cpu)
    known = Words.learn(store, rows[learnt], directions(store, rows[learnt]))
    for text, said in zip(texts, known.of(directions(store, rows), cpu), strict=True):
        kind, _, rest = text.partition(": ")
        assert kind.startswith(("A reply, ", "A text, ")) and rest == said
        assert "<explanation>" not in text and "<|" not in text
    same = [texts[row] == text for row, text in zip(order, mixed, strict=True)]
    assert np.mean(same) > 0.9  # sums in another order differ by rounding, which may decide between words


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (" castle", "castle"),
        ("ing", "ing"),
        ("\n\n", "\\n\\n"),
        ("   ", "___"),
        ("<|im_end|>", "[im_end]"),
        (" </explanation>", "_"),
        ("\ufffd", ""),
    ],
    ids=["word", "part", "lines", "spaces", "special", "tag", "byte"],
)
def test_names_of_tokens(token: str, name: str) -> None:
    assert shown(token) == name


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


def test_phases_without_steps_leave_their_time() -> None:
    every = {"ar": 10, "av": 10, "rl": 10}
    assert [ends_at(name, every) for name in every] == pytest.approx([0.25, 0.6, 1.0])
    assert ends_at("ar", {"ar": 1, "av": 0, "rl": 0}) == 1
    assert ends_at("av", {"ar": 0, "av": 5, "rl": 5}) == pytest.approx(0.35 / 0.75)
