"""Sequences over too few blocks: whoever steps back, every token and row is that of plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from played_graphs import play_graphs
from tiny import byte_tokenizer, tiny_model

from nla_engine.capture.tap import RowRange, RowTap
from nla_engine.codec.rows import Codec, bf16_values
from nla_engine.engine.forecast import Tally
from nla_engine.engine.generator import Generator
from nla_engine.engine.injection import at_scale
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.scheduler import Admitted
from nla_engine.engine.slots import BLOCK
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.tap import NoTap, Tap
from nla_engine.errors import EngineError
from nla_engine.models.injection import Injection
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.ops import gumbel
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling

EOS = 257
PREFIX = (7, 8, 9, 10, 11)
#: Tapped; the states after the last block are normed in what transformers returns.
LAYERS = (0, 2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def language_model(architecture: str, device: str) -> LanguageModel:
    return wrap_model(tiny_model(architecture).to(device), byte_tokenizer(), name=architecture)


@pytest.fixture
def as_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps between two looks, on a CPU as well, once the model has been checked."""
    if not torch.cuda.is_available():
        play_graphs(monkeypatch)


def run(
    lm: LanguageModel,
    requests: Sequence[Request],
    *,
    length: int,
    blocks: int,
    block: int,
    slots: int = 5,
    prefix: tuple[int, ...] = (),
    chunk: int = 2048,
    sampling: Sampling = Sampling(),
    stop: tuple[bytes, ...] = (),
    eos: tuple[int, ...] = (),
    kernels: str = "auto",
    positions: str = "all",
    injection: Injection = Injection(),
) -> tuple[dict[int, Completion], Tally]:
    """The completions by id, and what was done. Checks that every block is free in the end."""
    tap: Tap = NoTap()
    if positions:
        rows, tap_length = RowRange.parse(positions), length + len(prefix)
        tap = RowTap(
            LAYERS, Codec.named("bf16", lm.d_model), rows, rows_per_slot=tap_length,
            sink_norm=dict.fromkeys(LAYERS, 1.0), device=lm.device,
        )  # fmt: skip
    done: dict[int, Completion] = {}
    tally = Tally()

    def watch(told: Any) -> None:
        nonlocal tally
        tally = told()

    with Runner(
        lm, slots=slots, length=length, prefix=prefix, tap=tap, kernels=Kernels(kernels), injection=injection,
        vectors=2, blocks=blocks, block=block,
    ) as runner:  # fmt: skip
        generator = Generator(
            runner,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            stop=StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), eos, stop),
            sampling=sampling,
            read_last=bool(positions),
            max_prefill_tokens=chunk,
        )
        for group in generator.groups(iter(requests), watch=watch):
            for completion in group:
                assert completion.request.id not in done
                done[completion.request.id] = completion
        assert runner.cache.blocks.free == blocks
        runner.cache.update()
        assert (runner.cache.table == blocks).all()
    assert sorted(done) == sorted(request.id for request in requests)
    return done, tally


@contextmanager
def hooked(lm: LanguageModel, how: Injection, request: Request, prefix: int) -> Iterator[None]:
    """transformers' own model, with the request's vectors at their places."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden, at = hidden.clone(), torch.tensor(request.places) + prefix
        vectors = request.vectors.to(hidden)
        hidden[0, at] = hidden[0, at] + vectors if how.adds else vectors
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    part = lm.embedding if how.block is None else lm.blocks[how.block]
    handle = part.register_forward_hook(hook) if request.places else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def check(
    lm: LanguageModel,
    done: dict[int, Completion],
    *,
    prefix: tuple[int, ...] = (),
    sampling: Sampling = Sampling(),
    stop: tuple[bytes, ...] = (),
    eos: tuple[int, ...] = (),
    positions: str = "all",
    injection: Injection = Injection(),
    **_: Any,
) -> None:
    """Each token is the one that plain transformers prefers, given those before it; each row is its hidden state."""
    lm.model.set_attn_implementation("eager")
    names = token_bytes(lm.tokenizer, lm.vocab_size)
    for completion in done.values():
        request, generated = completion.request, completion.generated.tolist()
        prompt = [*prefix, *request.token_ids]
        ids = torch.tensor([prompt + generated], device=lm.device)
        with hooked(lm, injection, request, len(prefix)), torch.no_grad():
            out = lm.model(ids, output_hidden_states=True)
        start = len(prompt) - 1
        logits = out.logits[0, start : start + len(generated)].float()
        if sampling.temperature:
            at = torch.arange(start + 1, start + 1 + len(generated), device=lm.device)
            sequence = torch.full_like(at, request.id)
            logits = gumbel.scores(logits, sequence, at, sampling.temperature, sampling.seed)
        own = logits[torch.arange(len(generated)), ids[0, start + 1 :]]
        assert (own >= logits.amax(-1) - 1e-3).all(), f"request {request.id}"
        texts = [b"".join(names[i] for i in generated[:n]) for n in range(1, len(generated) + 1)]
        over = [bool(generated[n] in eos or any(s in text for s in stop)) for n, text in enumerate(texts)]
        assert not any(over[:-1])
        if request.max_new_tokens:
            assert over[-1] or len(generated) == request.max_new_tokens
            assert (completion.finish == Finish.LENGTH) == (not over[-1])
        if not positions:
            continue
        first = 0 if positions == "all" else len(prompt)
        assert completion.positions.tolist() == list(range(first, len(prompt) + len(generated)))
        for layer in LAYERS:
            want = out.hidden_states[layer + 1][0, first:].float().cpu().numpy()
            got = bf16_values(completion.rows[layer].codes.reshape(len(want), -1))
            error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
            assert error.max(initial=0.0) <= 2**-7, f"request {request.id}, layer {layer}"


def ragged(
    rng: np.random.Generator, count: int, unit: int, *, vectors: int = 0, twins: int = 1, read: bool = False
) -> list[Request]:
    """The first five alone are more than any pool here; then lengths at random. `unit` is a block's places."""
    made: list[Request] = []
    limit = (10 if unit < BLOCK else 5) * unit
    for i in range(count):
        most = limit if i < 5 else int(rng.integers(1, limit + 1))
        size = 2 * unit if i < 5 else int(rng.integers(2, 2 * unit + 1))
        ids = tuple(rng.integers(1, 250, size).tolist())
        if read and i >= 5 and i % 3 == 0:
            most = 0
        given, places = None, ()
        if n := min(vectors, size):
            places = tuple(sorted(rng.choice(size, n, replace=False).tolist()))
            given = torch.from_numpy(rng.standard_normal((n, 64)).astype(np.float32)) * 3
        again = bool(made) and i % twins > 0
        if again:
            ids, given, places = made[-1].token_ids, made[-1].vectors, made[-1].places
        made.append(Request(i, ids, most, given, places, again))
    return made


CASES: dict[str, dict[str, Any]] = {
    "plain": {"kernels": "reference"},
    "fused": {"kernels": "fused", "chunk": 23},
    "prefix": {"kernels": "fused", "prefix": PREFIX, "positions": "generated"},
    "sampled": {"kernels": "fused", "sampling": Sampling(1.3, 5)},
    "stopped": {
        "kernels": "fused",
        "stop": (b"a", b"xy"),
        "eos": (EOS, 17, 18),
        "sampling": Sampling(2.0, 1),
    },
    "replies": {"kernels": "fused", "positions": "generated", "twins": 3, "prefix": PREFIX, "chunk": 31},
    "untapped": {"kernels": "reference", "positions": "", "twins": 4},
    "embeddings": {"kernels": "fused", "vectors": 2, "chunk": 11, "prefix": PREFIX, "positions": "generated"},
    "at a block": {"kernels": "fused", "vectors": 2, "injection": Injection(1, adds=True), "positions": ""},
    "read only": {"kernels": "fused", "read": True},
    "one long": {"kernels": "fused", "slots": 2},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("architecture", "case"),
    [("qwen2", case) for case in CASES] + [("gemma3_text", case) for case in ("fused", "prefix")],
)
@pytest.mark.usefixtures("as_in_graphs")
def test_whoever_steps_back_nothing_changes(device: str, architecture: str, case: str, rng) -> None:
    options = {**CASES[case]}
    made = {name: options.pop(name) for name in ("vectors", "twins", "read") if name in options}
    lm = language_model(architecture, device)
    unit = 4 if device == "cpu" else BLOCK
    requests = ragged(rng, 11, unit, **made)
    if made.get("vectors"):
        how = options.get("injection", Injection())
        requests = [
            Request(r.id, r.token_ids, r.max_new_tokens, at_scale(r.vectors, how), r.places, r.again)
            for r in requests
        ]
    prefix = len(options.get("prefix", ()))
    longest = max(len(r.token_ids) + r.max_new_tokens for r in requests)
    least = -(-(longest + 1) // unit)  # one sequence fits, and no more
    done, tally = run(
        lm, requests, length=prefix + longest, blocks=least + int(rng.integers(0, 8)), block=unit, **options
    )
    if case not in ("stopped", "one long"):  # these end when they will, and two slots may never lack room
        assert tally.stepped_back > 0
    assert tally.generated == sum(len(c.generated) for c in done.values())
    assert tally.read >= sum(len(r.token_ids) for r in requests if not r.again)
    check(lm, done, **options)


@pytest.mark.usefixtures("as_in_graphs")
def test_a_stop_string_is_found_across_a_step_back(rng) -> None:
    """Each would write 20 tokens from its ninth on that are a stop string, and steps back in the middle."""
    lm, options = language_model("qwen2", "cpu"), {"kernels": "fused"}
    requests, names = ragged(rng, 5, 4), token_bytes(byte_tokenizer(), 259)
    how = {"length": 48, "block": 4, **options}
    free, _ = run(lm, requests, blocks=60, **how)
    stop = tuple(b"".join(names[i] for i in free[n].generated[8:28]) for n in range(5))
    done, tally = run(lm, requests, blocks=13, stop=stop, **how)
    assert tally.stepped_back > 0
    assert all(
        done[n].generated.tolist() == free[n].generated[: len(done[n].generated)].tolist() for n in done
    )
    check(lm, done, stop=stop)


def test_what_is_kept_of_a_sequence_is_what_it_had(rng) -> None:
    lm, slots, most = language_model("qwen2", "cpu"), 9, 30
    automaton = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), (EOS,), (b"abcdefgh",))
    with Runner(lm, slots=slots, length=60, prefix=PREFIX) as runner:
        generator = Generator(runner, max_new_tokens=most, stop=automaton)
        state = generator.state
        counts = rng.integers(1, most, slots + 1)
        state.count[:] = torch.from_numpy(counts)
        state.generated[:] = torch.from_numpy(rng.integers(0, 250, (slots + 1, most)))
        state.stop_state[:] = torch.from_numpy(rng.integers(0, 7, slots + 1).astype(np.uint8))
        state.closing[:] = torch.from_numpy(rng.random(slots + 1) < 0.5)
        state.active[:] = torch.from_numpy(np.arange(slots + 1) % 3 > 0)
        before = {name: held.clone() for name, held in vars(state).items()}
        asked = [Request(100 + i, tuple(range(1, 3 + i)), most) for i in range(slots)]
        found = generator._step_back([Admitted(request, i, i) for i, request in enumerate(asked)])
        assert [kept is None for _, kept in found] == [i % 3 == 0 for i in range(slots)]
        for held in vars(state).values():
            held.zero_()
        again = [
            Admitted(a.request, a.age, slots - 1 - a.slot, kept=kept) for a, kept in found if kept is not None
        ]
        generator._open(again)
        for each in again:
            old, new, n = each.age, each.slot, int(counts[each.age])
            for name in ("count", "stop_state", "closing"):
                assert getattr(state, name)[new] == before[name][old], name
            assert state.generated[new, :n].tolist() == before["generated"][old, :n].tolist()
            assert state.sequence[new] == 100 + old and state.limit[new] == most and state.active[new]
            assert state.position[new] == len(PREFIX) + len(asked[old].token_ids) + n - 1
            assert each.ids == asked[old].token_ids + tuple(before["generated"][old, :n].tolist())


@pytest.mark.parametrize("case", ["plain", "fused", "sampled"])
def test_with_room_for_all_nobody_steps_back(case: str, rng) -> None:
    lm, options = language_model("qwen2", "cpu"), CASES[case]
    requests = ragged(rng, 9, 4)
    longest = max(len(r.token_ids) + r.max_new_tokens for r in requests)
    done, tally = run(lm, requests, length=longest, blocks=5 * -(-longest // 4), block=4, **options)
    assert tally.stepped_back == tally.again == 0
    check(lm, done, **options)


def test_a_pool_that_does_not_hold_one_sequence_is_refused() -> None:
    lm = language_model("qwen2", "cpu")
    with pytest.raises(EngineError, match="9 blocks of 4 tokens do not hold one sequence of 40 tokens"):
        Runner(lm, slots=2, length=40, blocks=9, block=4)
    with Runner(lm, slots=2, length=39, blocks=10, block=4) as runner:
        assert runner.cache.blocks.free == 10


def test_a_run_that_was_left_holds_no_blocks() -> None:
    lm = language_model("qwen2", "cpu")
    automaton = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), (), ())
    asked = [Request(i, tuple(range(1, 9)), 12) for i in range(8)]
    with Runner(lm, slots=4, length=20, blocks=9, block=4) as runner:
        generator = Generator(runner, max_new_tokens=12, stop=automaton)
        whole = {done.request.id: done.generated.tolist() for done in generator.run(iter(asked))}
        left = generator.run(iter(asked))
        next(left)
        left.close()
        assert runner.cache.blocks.free < 9
        again = {done.request.id: done.generated.tolist() for done in generator.run(iter(asked))}
    assert again == whole and sorted(whole) == list(range(8))
