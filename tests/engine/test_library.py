"""transformers' own generation behind the engine's interface: the same tokens, whatever the model and the batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_families import small_model
from tiny import byte_tokenizer, tiny_model

from nla_engine.engine.choose import open_generator, open_runner
from nla_engine.engine.generator import Generator
from nla_engine.engine.library import Library
from nla_engine.engine.library_batch import Batch
from nla_engine.engine.library_check import check_library
from nla_engine.engine.library_generator import LibraryGenerator
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError, RequestError, UnsupportedModel
from nla_engine.models.injection import Injection
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling
from nla_engine.ops.truncation import Truncation

PREFIX = (7, 8, 9, 10, 11)
EOS = 257


def model(config: str = "GPT2Config") -> LanguageModel:
    return wrap_model(small_model(getattr(transformers, config)), byte_tokenizer(), name=config)


def asked(rng: np.random.Generator, count: int, longest: int = 30) -> list[Request]:
    return [
        Request(i, tuple(rng.integers(1, 250, rng.integers(1, longest)).tolist()), int(rng.integers(1, 16)))
        for i in range(count)
    ]


def run(
    lm: LanguageModel,
    requests: list[Request],
    kernels: str = "library",
    *,
    slots: int = 4,
    prefix: tuple[int, ...] = (),
    sampling: Sampling = Sampling(),
    stop: tuple[bytes, ...] = (),
    injection: Injection = Injection(),
    vectors: int = 1,
) -> dict[int, Completion]:
    generator = open_generator(
        lm,
        slots=slots,
        length=len(prefix) + 60,
        prefix=prefix,
        kernels=Kernels(kernels),
        injection=injection,
        vectors=vectors,
        announce=lambda text: None,
        how={
            "max_new_tokens": 20,
            "stop": StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), (EOS,), stop),
            "sampling": sampling,
        },
    )
    assert isinstance(generator, LibraryGenerator if kernels == "library" else Generator)
    with generator.runner:
        return {each.request.id: each for each in generator.run(requests)}


@pytest.mark.parametrize(
    ("architecture", "sampling"),
    [("gemma3", Sampling()), ("qwen2", Sampling(0.9, 2, Truncation(0.8, 50, 0.01)))],
    ids=["gemma3", "qwen2, sampled"],
)
def test_it_generates_what_the_slots_generate(
    architecture: str, sampling: Sampling, rng: np.random.Generator
) -> None:
    lm = wrap_model(tiny_model(architecture), byte_tokenizer(), name=architecture)
    requests = asked(rng, 9)
    stop = (b"\x11\x12", b"e")
    fast = run(lm, requests, "auto", prefix=PREFIX, sampling=sampling, stop=stop)
    slow = run(lm, requests, prefix=PREFIX, sampling=sampling, stop=stop)
    for i in fast:
        assert slow[i].generated.tolist() == fast[i].generated.tolist()
        assert slow[i].finish == fast[i].finish


@pytest.mark.parametrize("config", ["BloomConfig", "Qwen3_5TextConfig"])
def test_tokens_do_not_depend_on_batches(config: str, rng: np.random.Generator) -> None:
    lm, sampling = model(config), Sampling(1.1, 3)
    requests = asked(rng, 7)
    alone = run(lm, requests, slots=1, sampling=sampling)
    together = run(lm, list(reversed(requests)), slots=7, sampling=sampling)
    for i in alone:
        assert alone[i].generated.tolist() == together[i].generated.tolist()


def test_a_checkpoints_own_settings_are_not_inherited(rng: np.random.Generator) -> None:
    lm = model("BloomConfig")
    requests = asked(rng, 3)
    expected = run(lm, requests)
    settings = lm.model.generation_config
    settings.repetition_penalty, settings.eos_token_id, settings.num_beams = 5.0, [3, 4, 5], 3
    settings.do_sample, settings.min_new_tokens, settings.suppress_tokens = True, 12, list(range(5, 200))
    own = run(lm, requests)
    assert [own[i].generated.tolist() for i in range(3)] == [expected[i].generated.tolist() for i in range(3)]
    assert lm.model.generation_config is settings


@pytest.mark.parametrize("config", ["BloomConfig", "MambaConfig", "OpenAIGPTConfig"])
@pytest.mark.parametrize("name", ["replace", "add@1"])
def test_vectors_enter_where_they_should(config: str, name: str, rng: np.random.Generator) -> None:
    """Prompts of other lengths in the batch; truth: one sequence at a time, without a cache, with a hook of our own."""
    lm = model(config)
    vectors = [torch.tensor(rng.standard_normal((2, lm.d_model)), dtype=torch.float32) for _ in range(4)]
    prompts = [(4, 5, 6, 7), (9, 8), tuple(range(20, 40)), (3, 4, 5)]
    places = [(1, 3), (0, 1), (2, 19), (0, 2)]
    requests = [Request(i, prompts[i], 6, vectors[i], places[i]) for i in range(4)]
    injection = Injection.named(name)
    found = run(lm, requests, prefix=PREFIX, injection=injection, vectors=2)
    into = lm.embedding if injection.block is None else lm.blocks[injection.block]

    for i in range(4):
        at = [len(PREFIX) + place for place in places[i]]

        def change(_m: Any, _i: Any, output: Any, i: int = i, at: list[int] = at) -> None:
            states = output[0] if isinstance(output, tuple | list) else output
            states[0, at] = vectors[i] + (states[0, at] if injection.adds else 0)

        hook, ids = into.register_forward_hook(change), [*PREFIX, *prompts[i]]
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == EOS:
                    break
        hook.remove()
        assert found[i].generated.tolist() == ids[len(PREFIX) + len(prompts[i]) :]


def test_requests_leave_by_portions_and_may_be_held_back(rng: np.random.Generator) -> None:
    lm, requests = model("BloomConfig"), asked(rng, 6)
    held: list[int] = []

    def source() -> Iterator[Request | None]:
        yield from requests[:2]
        yield None  # not now: what was taken runs
        yield from requests[2:]

    how = {"max_new_tokens": 20, "stop": StopAutomaton([b""] * lm.vocab_size, ())}
    generator = open_generator(
        lm, slots=4, length=60, kernels=Kernels("library"), announce=held.append, how=how
    )
    with generator.runner:
        groups = [
            [each.request.id for each in group]
            for group in generator.groups(source(), portion=lambda ended: sorted(ended)[:1])
        ]
        assert groups == [[0], [1], [2], [3], [4], [5]] and not held
        with pytest.raises(EngineError, match="held back although nothing is running"):
            list(generator.groups(iter([None])))
        with pytest.raises(EngineError, match="request 0: .* do not fit the 60"):
            list(generator.groups(iter([Request(0, tuple(range(50)), 11)])))


def test_what_is_read_alone_is_read_in_one_pass(rng: np.random.Generator) -> None:
    lm = model("BloomConfig").truncated(2)
    prompts = [tuple(rng.integers(1, 250, size).tolist()) for size in (7, 1, 30, 12)]
    with open_runner(lm, slots=4, length=40, kernels=Kernels("library")) as runner:
        assert isinstance(runner, Library)
        states = runner.read(
            Batch([Request(i, p, 0) for i, p in enumerate(prompts)], range(4), (), lm.device)
        )
    for i, prompt in enumerate(prompts):
        own = lm.decoder(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(states[i], own, atol=1e-4, rtol=1e-4)


def test_it_is_chosen_where_the_engine_cannot_run_and_said_in_one_line() -> None:
    lm, said = model("XGLMConfig"), list[str]()
    with open_runner(lm, slots=2, length=40, announce=said.append) as runner:
        assert isinstance(runner, Library)
    (line,) = said
    assert line.startswith(
        "XGLMConfig: XGLMForCausalLM has no pluggable attention: it runs by transformers' own"
    )
    assert "slower" in line and "\n" not in line
    for kernels in ("reference", "fused"):
        with pytest.raises(UnsupportedModel, match="not supported here; --kernels library runs it, slower$"):
            open_runner(lm, slots=2, length=40, kernels=Kernels(kernels))
    with pytest.raises(RequestError, match="fp8 has no library kernels"):
        Kernels("library", "fp8")


def test_a_batch_that_does_not_fit_is_halved(rng: np.random.Generator) -> None:
    lm, most = model("BloomConfig"), 2
    requests = asked(rng, 7)
    expected = run(lm, requests)
    real, sizes = lm.blocks[2].forward, list[int]()

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(hidden))
        if len(hidden) > most and hidden.shape[1] == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(hidden, *args, **kwargs)

    generator = open_generator(
        lm,
        slots=7,
        length=60,
        kernels=Kernels("library"),
        how={"max_new_tokens": 20, "stop": StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), (EOS,))},
    )
    with generator.runner:
        lm.blocks[2].forward = forward
        found = {each.request.id: each for each in generator.run(requests)}
        assert max(sizes) > most
        assert {i: found[i].generated.tolist() for i in found} == {
            i: expected[i].generated.tolist() for i in expected
        }
        most = 0
        with pytest.raises(
            EngineError, match="BloomConfig: one sequence of .* tokens does not fit the free memory"
        ):
            list(generator.run(requests))


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["BloomConfig", "MambaConfig", "GptOssConfig", "Gemma2Config"])
def test_tokens_on_a_gpu_are_those_of_the_cpu(config: str, rng: np.random.Generator) -> None:
    """In float32; on a GPU transformers queues passes ahead of its look at what has ended."""
    lm, requests = model(config), asked(rng, 9)
    expected = run(lm, requests)
    lm.move(torch.device("cuda", 0))
    found = run(lm, requests)
    assert {i: found[i].generated.tolist() for i in found} == {
        i: expected[i].generated.tolist() for i in expected
    }


def test_a_cache_that_is_wrong_is_seen() -> None:
    """Of a layer's cached values one entry is changed: prompts are right, replies are not."""
    lm = model("BloomConfig")
    attention = lm.blocks[1].self_attention
    whole = type(attention).forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = whole(attention, hidden, *args, **kwargs)
        if hidden.shape[1] == 1:
            out[0].mul_(0.5)
        return out

    assert check_library(lm) == "sdpa" or check_library(lm) == "eager"
    attention.forward = forward
    with pytest.raises(
        UnsupportedModel, match="block 1 of BloomForCausalLM differs in a reply .* not supported"
    ):
        check_library(lm)


def test_the_model_is_left_as_it_was(rng: np.random.Generator) -> None:
    lm = model("BloomConfig")
    before = lm.model(input_ids=torch.tensor([[3, 4, 5]])).logits
    found = run(lm, asked(rng, 2))
    assert {each.finish for each in found.values()} <= {Finish.EOS, Finish.LENGTH, Finish.STOP}
    assert torch.equal(lm.model(input_ids=torch.tensor([[3, 4, 5]])).logits, before)
    assert not any(module._forward_hooks for module in lm.model.modules())
