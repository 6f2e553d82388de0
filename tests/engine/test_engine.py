"""The engine against transformers: tokens of generate(), with and without vectors, whatever the batching."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, byte_tokenizer, tiny_model

from nla_engine.engine import slots
from nla_engine.engine.fused import FusedBlock, FusedNorm
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.scheduler import STEPS_BETWEEN_POLLS
from nla_engine.engine.slots import BLOCK, Room, default_room, slot_size
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.tap import NoTap
from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.ops import gumbel
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling, choose
from nla_engine.ops.truncation import Truncation

PREFIX = (7, 8, 9, 10, 11)
EOS = 258 - 1


def language_model(architecture: str = "qwen2") -> LanguageModel:
    return wrap_model(tiny_model(architecture), byte_tokenizer(), name=architecture)


def ragged_requests(rng: np.random.Generator, count: int, longest: int = 30) -> list[Request]:
    return [
        Request(i, tuple(rng.integers(1, 250, rng.integers(1, longest)).tolist()), int(rng.integers(1, 20)))
        for i in range(count)
    ]


def run(
    lm: LanguageModel,
    requests: list[Request],
    *,
    slots: int = 4,
    prefix: tuple[int, ...] = (),
    chunk: int = 2048,
    sampling: Sampling = Sampling(),
    eos: tuple[int, ...] = (EOS,),
    stop: tuple[bytes, ...] = (),
    kernels: str = "auto",
) -> dict[int, Completion]:
    runner = Runner(lm, slots=slots, length=len(prefix) + 60, prefix=prefix, kernels=Kernels(kernels))
    automaton = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), eos, stop)
    generator = Generator(
        runner, max_new_tokens=20, stop=automaton, sampling=sampling, max_prefill_tokens=chunk
    )
    completions = {completion.request.id: completion for completion in generator.run(requests)}
    runner.close()
    return completions


def reference_tokens(model, ids: list[int], new: int, **kwargs: object) -> list[int]:
    """What transformers.generate generates, greedily, with no inherited settings."""
    model.set_attn_implementation("eager")
    start = torch.tensor([ids])
    out = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("prefix", "chunk"), [((), 2048), (PREFIX, 17)])
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_greedy_tokens_equal_transformers(
    architecture: str, prefix: tuple[int, ...], chunk: int, kernels: str, rng
) -> None:
    lm = language_model(architecture)
    requests = ragged_requests(rng, 13)
    completions = run(lm, requests, prefix=prefix, chunk=chunk, kernels=kernels)
    assert sorted(completions) == list(range(13))
    for request in requests:
        expected = reference_tokens(
            lm.model, [*prefix, *request.token_ids], request.max_new_tokens, eos_token_id=EOS
        )
        assert completions[request.id].generated.tolist() == expected
        ended = expected[-1] == EOS
        assert completions[request.id].finish == (Finish.EOS if ended else Finish.LENGTH)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_injected_vectors_equal_inputs_embeds(architecture: str, rng) -> None:
    lm = language_model(architecture)
    vectors = rng.standard_normal((9, lm.d_model)).astype(np.float32)
    tail = (30, 20, 21, 22)
    requests = [Request(i, tail, 12, torch.from_numpy(vectors[i : i + 1]), (0,)) for i in range(9)]
    completions = run(lm, requests, prefix=PREFIX, slots=4)
    lm.model.set_attn_implementation("eager")
    for i, vector in enumerate(vectors):
        embeds = lm.embedding(torch.tensor([[*PREFIX, 0, *tail[1:]]]))
        embeds[0, len(PREFIX)] = torch.from_numpy(
            vector
        )  # after the module: Gemma's sqrt(d) must not scale it
        out = lm.model.generate(
            inputs_embeds=embeds, max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
        assert completions[i].generated.tolist() == out[0].tolist()


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(top_p=0.7, top_k=90, min_p=0.1)])
def test_sampling_does_not_depend_on_batching(rng, truncation: Truncation) -> None:
    lm = language_model()
    requests = ragged_requests(rng, 11)
    sampling = Sampling(1.3, 5, truncation)
    alone = run(lm, requests, slots=1, sampling=sampling)
    together = run(lm, list(reversed(requests)), slots=7, sampling=sampling, chunk=23)
    other_seed = run(lm, requests, slots=7, sampling=Sampling(1.3, 6, truncation))
    for i in alone:
        assert alone[i].generated.tolist() == together[i].generated.tolist()
    assert any(alone[i].generated.tolist() != other_seed[i].generated.tolist() for i in alone)


def test_sampling_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    draws = 20_000
    chosen = choose(
        logits.expand(draws, -1),
        torch.arange(draws) % 100,
        torch.arange(draws) // 100,
        Sampling(temperature=0.7, seed=11),
    )
    share = torch.bincount(chosen, minlength=5).double() / draws
    expected = torch.softmax(logits.double() / 0.7, 0)
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize(("seed", "positions"), [(0, (241, 243, 290, 438)), (1 << 40, (1, 93, 166, 214))])
def test_sampling_never_draws_what_cannot_be(seed: int, positions: tuple[int, ...]) -> None:
    """Where a random number of 24 bits would round to 1, which beats any logit: in large vocabularies, now and then."""
    logits = torch.full((len(positions), 260_000), -1000.0)
    sequence, position = torch.zeros(len(positions), dtype=torch.int64), torch.tensor(positions)
    key = torch.full_like(sequence, gumbel.seed_key(seed))
    for part in (sequence, sequence, position):
        key = gumbel.hash_bits(key ^ part)
    bits = gumbel.hash_bits(key[:, None] ^ gumbel.hash_bits(torch.arange(logits.shape[1])))
    assert (bits.amax(1) >> 8 == 2**24 - 1).all()
    logits[:, 7] = 1000.0
    assert (choose(logits, sequence, position, Sampling(1.0, seed)) == 7).all()


def test_a_sequence_of_nan_does_not_reach_the_next_one_in_its_slot() -> None:
    lm = language_model()
    bad = 77
    with torch.no_grad():
        lm.embedding.weight[bad] = float("nan")
    clean = [Request(i, tuple(range(20, 20 + 2 * i)), 10) for i in range(1, 4)]
    alone = run(lm, clean, slots=3)
    after = run(lm, [Request(0, (bad,) * 40, 3), *clean], slots=2)
    assert all(after[r.id].generated.tolist() == alone[r.id].generated.tolist() for r in clean)


def test_a_closed_runner_gives_the_model_back() -> None:
    lm = language_model()
    run(lm, [Request(0, (5, 6), 2)], kernels="fused")
    assert torch.isfinite(lm.model(torch.tensor([[5, 6, 7]])).logits).all()


def test_an_end_without_an_embedding_ends_nothing() -> None:
    """As if an EOS was added to the tokenizer but the embedding not resized; -1 does not mean the last token."""
    table = StopAutomaton([b"a", b"b", b"c"], eos_ids=[-1, 1, 3, 7]).table
    assert (table[0] != 0).tolist() == [False, True, False]


def test_stop_automaton_finds_what_a_search_finds(rng) -> None:
    stops = (b"</e>", b"e>x", b"<<")
    tokens = [bytes(rng.choice(list(b"</e>x"), size).tolist()) for size in rng.integers(0, 4, 60)]
    automaton = StopAutomaton(tokens, eos_ids=[0], stop=stops)
    table = automaton.table.numpy()
    found = 0
    for _ in range(500):
        state, text = 0, b""
        for token in rng.integers(1, 60, 12):
            state, text = int(table[state, token]), text + tokens[token]
            hit = any(stop in text for stop in stops)
            assert (state == automaton.stopped) == hit
            if hit:
                found += 1
                break
        else:
            assert table[state, 0] == automaton.ended
    assert found > 50


def test_stop_string_ends_a_sequence_across_token_borders() -> None:
    lm = language_model()
    request = Request(0, (5, 6, 7), 20)
    free = run(lm, [request])[0].generated.tolist()
    names = token_bytes(lm.tokenizer, lm.vocab_size)
    stop = b"".join(names[i] for i in free[3:6])
    stopped = run(lm, [request], stop=(stop,))[0]
    assert stopped.finish == Finish.STOP
    assert stopped.generated.tolist() == free[: len(stopped.generated)]
    assert b"".join(names[i] for i in stopped.generated).endswith(stop)
    assert len(stopped.generated) <= 6


def test_self_check_refuses_an_attention_the_engine_gets_wrong(monkeypatch) -> None:
    from nla_engine.engine import attention

    lm = language_model()
    right = attention.attend_cpu
    monkeypatch.setattr(
        attention,
        "attend_cpu",
        lambda q, kv, tiles, shape: right(q, kv, tiles, replace(shape, scale=1.5)),
    )
    with pytest.raises(EngineError, match="differs from transformers"):
        Runner(lm, slots=2, length=20)


@pytest.mark.parametrize("precision", ["full", "fp8"])
@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wanted_states_are_those_of_their_tokens(
    architecture: str, tapped: bool, precision: str, rng
) -> None:
    """The last block computes the wanted tokens only, unless its rows are tapped: then all."""
    lm, seen = language_model(architecture), []
    last = len(lm.blocks) - 1

    class Seen(NoTap):
        """Notes the sizes of what it is called with."""

        def __init__(self, layers: tuple[int, ...]) -> None:
            self.layers = layers

        def __call__(
            self, layer: int, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor
        ) -> None:
            seen.append((len(hidden), len(slot), len(position)))

    parts = [(slot, 6, rng.integers(1, 250, size).tolist()) for slot, size in enumerate((1, 23, 9, 1, 40, 2))]
    total, prefix = sum(len(ids) for _, _, ids in parts), rng.integers(1, 250, 6).tolist()
    layers = (last,) if tapped else ()
    with Runner(
        lm,
        slots=6,
        length=60,
        prefix=prefix,
        tap=Seen(layers),
        kernels=Kernels("fused", precision),
    ) as runner:
        every = runner.prefill(parts)
        for wanted in ([total - 1], list(range(total)), rng.permutation(total)[:17].tolist(), [5, 5, 0]):
            got = runner.prefill(parts, wanted)
            assert got.shape == (len(wanted), lm.d_model)
            if (
                precision == "fp8"
            ):  # the last bit of an input may send a factor to another number of fp8, 2^-3 apart
                apart = (got - every[wanted]).norm(dim=-1) / every[wanted].norm(dim=-1)
                assert apart.max() < 0.3  # unrelated states are 1.4 apart
            else:
                torch.testing.assert_close(got, every[wanted], atol=2e-5, rtol=1e-4)
        keys = torch.stack(runner.cache.keys)
        runner.prefill(parts)
        torch.testing.assert_close(keys, torch.stack(runner.cache.keys), atol=0, rtol=0)
    assert seen == [(total, total, total)] * (6 if tapped else 0)


def test_requests_that_cannot_run_are_refused() -> None:
    lm = language_model()
    with pytest.raises(EngineError, match="do not fit a slot"):
        run(lm, [Request(0, tuple(range(1, 50)), 20)])
    with pytest.raises(EngineError, match="longer than its 512 positions"):
        Runner(lm, slots=1, length=600)
    with pytest.raises(EngineError, match="held back"):
        run(lm, [None])  # type: ignore[list-item]


def test_a_pass_over_strided_places_is_refused() -> None:
    with Runner(language_model(), slots=2, length=8) as runner:
        ids = torch.ones(2, dtype=torch.int64)
        places = torch.zeros(2, 2, dtype=torch.int64)
        with pytest.raises(EngineError, match="contiguous"):
            runner.decode(ids, places[:, 0], ids, 2)


def test_no_requests_is_nothing_to_do() -> None:
    assert run(language_model(), []) == {}


def test_refills_wait_until_they_are_worth_a_pass_and_none_is_lost(monkeypatch, rng) -> None:
    from nla_engine.engine import scheduler

    monkeypatch.setattr(scheduler, "REFILL_PART", 0.5)
    lm = language_model()
    requests = ragged_requests(rng, 23)
    patient, eager = run(lm, requests, slots=6), run(lm, requests, slots=1)
    assert {i: c.generated.tolist() for i, c in patient.items()} == {
        i: c.generated.tolist() for i, c in eager.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_gets_its_own_norm_and_blocks_back(architecture: str, rng: np.random.Generator) -> None:
    lm = language_model(architecture)
    parts = [(0, 0, tuple(rng.integers(1, 250, 20).tolist()))]
    with Runner(lm, slots=1, length=60, kernels=Kernels("reference")) as runner:
        assert "forward" not in vars(lm.decoder.norm)
        expected = runner.prefill(parts)
    with Runner(lm, slots=1, length=60, kernels=Kernels("fused")) as runner:
        assert isinstance(lm.decoder.norm.forward, FusedNorm)
        assert all(isinstance(block.forward, FusedBlock) for block in lm.blocks)
        torch.testing.assert_close(runner.prefill(parts), expected, atol=2e-5, rtol=1e-4)
    assert not any("forward" in vars(module) for module in (lm.decoder.norm, *lm.blocks))


def test_a_slot_has_room_for_the_shared_prefix() -> None:
    prefix = tuple(range(1, 31))
    lm = language_model()
    runner = Runner(lm, slots=2, length=len(prefix) + 3, prefix=prefix)
    assert runner.cache.size == slot_size(len(prefix) + 3, len(prefix)) == len(prefix) + 1
    assert runner.cache.prefix_size == len(prefix)
    runner.close()
    assert slot_size(100, 30) == 71


def test_a_tap_is_prepared_after_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers come before any graph, whose launches hold their addresses; pinned memory comes last."""
    told: list[str] = []

    class Told(NoTap):
        def allocate(self, slots: int, *, steps: int, given: int, step_by_step: bool = False) -> int:
            told.append(f"allocate {slots} {steps} {given}")
            return given - 2

        def prepare(self) -> None:
            told.append("prepare")

    monkeypatch.setattr(Runner, "tune", lambda self, rows: told.append("tune"))
    with Runner(language_model(), slots=2, length=4, tap=Told()) as runner:
        generator = Generator(runner, max_new_tokens=0, max_prefill_tokens=7)
        generator.prepare()
    assert told == [f"allocate 2 {STEPS_BETWEEN_POLLS} 7", "tune", "prepare"]
    assert generator.max_prefill_tokens == 5, "a tap may have room for less"


@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_slots_take_a_part_of_what_is_free(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model()
    weights = sum(
        p.numel() for name, p in lm.blocks.named_parameters() if "norm" not in name and "bias" not in name
    )
    with Runner(lm, slots=1, length=100, block=BLOCK) as runner:
        block_bytes = 2 * sum(held[0].nbytes for held in runner.cache.keys)
    free = weights + 100 * block_bytes
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    left = free - weights if precision == "fp8" else free
    fit = int(0.7 * left) // block_bytes
    assert fit > 40
    # Two blocks hold 100 tokens, so no sequence ever lacks one.
    assert default_room(lm, 100, precision=precision) == Room(fit // 2, fit // 2 * 2)
    assert default_room(lm, 100, most=7, precision=precision) == Room(7, 14)
    assert default_room(lm, 100, slots=600, precision=precision) == Room(600, fit)
    # Eight blocks are enough to run one of 12 blocks, which may step back.
    assert default_room(lm, 760, precision=precision) == Room(fit // 8, fit)
    assert default_room(lm, 760, precision=precision, held=block_bytes) == Room(fit // 9, fit - fit // 9)
    free = 0
    assert default_room(lm, 100, precision=precision) == Room(1, 2)


def test_on_a_cpu_they_have_room_for_their_longest_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pool is zero in every dtype, as what masks leave out is multiplied with it."""
    lm = language_model()
    with Runner(lm, slots=5, length=300) as runner:
        pool = [*runner.cache.keys, *runner.cache.values]
        each = sum(held[0].nbytes for held in pool)  # of a slot, or of the spare ones
        assert not any(held[1:].any() for held in pool)
    monkeypatch.setattr(slots, "physical_bytes", lambda: 2 * 12 * each)
    assert default_room(lm, 300) == Room(11)
    assert default_room(lm, 300, most=7) == Room(7)
    assert default_room(lm, 300, held=each) == Room(5)
    assert default_room(lm, 300, slots=90) == Room(90)
    monkeypatch.setattr(slots, "physical_bytes", lambda: 1)
    assert default_room(lm, 300) == Room(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = slots.lazy_zeros((3, 0, 5), dtype, lm.device), slots.lazy_zeros((3, 7, 5), dtype, lm.device)
        assert [(m.dtype, tuple(m.shape)) for m in made] == [(dtype, (3, 0, 5)), (dtype, (3, 7, 5))]
        assert not made[1].any()
