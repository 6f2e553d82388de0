"""Every way for vectors to enter, against plain transformers with a hook: tokens and hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from nla_engine.engine.generator import Generator
from nla_engine.engine.injection import at_scale
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError
from nla_engine.models.injection import Injection
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels

EOS = 257
PREFIX = (7, 8, 9, 10, 11)
INJECTIONS = {
    "replace": Injection(scale=5.0),
    "replace, raw": Injection(),
    "replace, norm match": Injection(norm_match=True),
    "add@1": Injection(1, adds=True, scale=5.0),
    "add@1, raw": Injection(1, adds=True),
    "add@1, norm match": Injection(1, adds=True, norm_match=True),
    "replace@0": Injection(0),
    "replace@2, norm match": Injection(2, norm_match=True),
    "add@3, norm match": Injection(3, adds=True, norm_match=True),  # the last block
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def language_model(architecture: str, device: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = tiny_model(architecture).to(device=device, dtype=dtype)
    return wrap_model(model, byte_tokenizer(), name=architecture)


@contextmanager
def hooked(lm: LanguageModel, how: Injection, vectors: np.ndarray, places: tuple[int, ...]) -> Iterator[None]:
    """transformers' own model, whose prompt passes have these vectors [n, d] at these places, by the formulas."""
    lm.model.set_attn_implementation("eager")
    at = torch.tensor(places)

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 1:  # a decode step
            return output
        there = hidden[0, at].double()
        v = torch.from_numpy(vectors).double().to(hidden.device)
        norm = v.norm(dim=-1, keepdim=True)
        if how.norm_match:
            v = v / norm * there.norm(dim=-1, keepdim=True)
        elif how.scale is not None:
            v = v / norm * how.scale
        hidden = hidden.clone()
        hidden[0, at] = (there + v if how.adds else v).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = (lm.embedding if how.block is None else lm.blocks[how.block]).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def requests_of(rng: np.random.Generator, d: int, count: int, most: int) -> list[tuple[Request, np.ndarray]]:
    """Ragged prompts with 1 to `most` vectors each, anywhere but in the shared prefix; some at the last token."""
    made = []
    for i in range(count):
        ids = tuple(rng.integers(1, 250, rng.integers(most, 20)).tolist())
        n = int(rng.integers(1, most + 1))
        places = sorted(rng.choice(len(ids), n, replace=False).tolist())
        if i % 3 == 0:
            places[-1] = len(ids) - 1
        vectors = rng.standard_normal((n, d)).astype(np.float32) * 3
        made.append((Request(i, ids, 12, None, tuple(places)), vectors))
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", INJECTIONS)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize(("kernels", "chunk", "most"), [("reference", 2048, 1), ("fused", 7, 3)])
def test_texts_equal_those_of_transformers_with_a_hook(
    device: str, name: str, architecture: str, kernels: str, chunk: int, most: int, rng
) -> None:
    lm, how = language_model(architecture, device), INJECTIONS[name]
    made = requests_of(rng, lm.d_model, 7, most)
    requests = [Request(r.id, r.token_ids, 12, at_scale(torch.from_numpy(v), how), r.places) for r, v in made]
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), (EOS,))
    with Runner(
        lm,
        slots=3,
        length=len(PREFIX) + 40,
        prefix=PREFIX,
        kernels=Kernels("auto" if device == "cuda" else kernels),
        injection=how,
        vectors=most,
    ) as runner:
        generator = Generator(runner, max_new_tokens=12, stop=stop, max_prefill_tokens=chunk)
        done = {each.request.id: each.generated.tolist() for each in generator.run(requests)}
    for request, vectors in made:
        ids = torch.tensor([[*PREFIX, *request.token_ids]], device=device)
        places = tuple(place + len(PREFIX) for place in request.places)
        how_to: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 12,
            "do_sample": False,
            "eos_token_id": EOS,
            "pad_token_id": 0,
        }
        with hooked(lm, how, vectors, places):
            out = lm.model.generate(ids, **how_to)
        assert done[request.id] == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", INJECTIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
def test_hidden_states_equal_those_of_transformers_with_a_hook(
    device: str, name: str, dtype: torch.dtype, limit: float, rng
) -> None:
    lm, how = language_model("qwen2", device, dtype), INJECTIONS[name]
    made = requests_of(rng, lm.d_model, 5, 2)
    kernels = Kernels("auto" if device == "cuda" else "fused")
    with Runner(lm, slots=5, length=40, kernels=kernels, injection=how, vectors=2) as runner:
        runner.injector.put(range(5), [at_scale(torch.from_numpy(v), how) for _, v in made])
        parts = [(r.id, 0, r.token_ids) for r, _ in made]
        starts = np.cumsum([0, *(len(r.token_ids) for r, _ in made)])
        entering = [(int(starts[r.id]) + place, r.id, k) for r, _ in made for k, place in enumerate(r.places)]
        states = runner.prefill(parts, entering=entering).split([len(ids) for _, _, ids in parts])
    for (request, vectors), got in zip(made, states, strict=True):
        with hooked(lm, how, vectors, request.places), torch.no_grad():
            ids = torch.tensor([request.token_ids], device=device)
            expected = lm.decoder(input_ids=ids).last_hidden_state[0].double()
        assert ((got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < limit
        if dtype == torch.float32:  # what a hook changes is far more
            with torch.no_grad():
                plain = lm.decoder(input_ids=ids).last_hidden_state[0].double()
            assert ((plain - expected).norm(dim=-1) / expected.norm(dim=-1)).max() > 100 * limit


@pytest.mark.parametrize(
    ("vectors", "places", "message"),
    [
        (1, (), "1 vectors for the tokens"),
        (0, (1,), "0 vectors for the tokens"),
        (2, (1, 1), "2 vectors for the tokens"),
        (2, (2, 1), "2 vectors for the tokens"),
        (1, (4,), "1 vectors for the tokens"),
        (1, (-1,), "1 vectors for the tokens"),
        (3, (0, 1, 2), "3 vectors, a slot has room for 2"),
    ],
)
def test_vectors_that_do_not_fit_their_places_are_refused(
    vectors: int, places: tuple[int, ...], message: str
) -> None:
    lm = language_model("qwen2", "cpu")
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), (EOS,))
    with Runner(lm, slots=2, length=20, vectors=2) as runner:
        generator = Generator(runner, max_new_tokens=2, stop=stop)
        given = torch.ones(vectors, lm.d_model) if vectors else None
        with pytest.raises(EngineError, match=message):
            list(generator.run([Request(0, (1, 2, 3, 4), 2, given, places)]))


def test_names() -> None:
    for name in ("replace", "replace@0", "add@1", "add@27"):
        assert Injection.named(name, 3.0).name == name
    assert Injection.named("add@1", 3.0, norm_match=True) == Injection(1, True, None, True)
    for name in ("add", "add@", "add@-1", "replace@x", "add@1 ", "add@٣"):
        with pytest.raises(ValueError, match="is none of"):
            Injection.named(name)
