"""Prompt passes in CUDA graphs: the same tokens and rows as of passes outside of them, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model, write_prompts

from nla_engine.capture import tap
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.run import run_capture
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec, bf16_values
from nla_engine.config import CaptureOptions
from nla_engine.engine.generator import Generator
from nla_engine.engine.pass_graphs import SWITCH
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.store import CaptureStore

pytestmark = pytest.mark.gpu
PREFIX, LAYERS, SLOTS, NEW = (7, 8, 9), (0, 2), 24, 20


def language_model(architecture: str, dtype: torch.dtype) -> LanguageModel:
    return wrap_model(tiny_model(architecture).to("cuda", dtype), byte_tokenizer(), name=architecture)


@contextmanager
def opened(lm: LanguageModel, most: int, prefix: tuple[int, ...] = (), **how: Any) -> Iterator[Generator]:
    keeper = RowTap(
        LAYERS, Codec.named("bf16", lm.d_model), RowRange.parse("generated" if prefix else "all"), rows_per_slot=120,
        sink_norm=dict.fromkeys(LAYERS, math.inf), device=lm.device,
    )  # fmt: skip
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), tuple(range(0, 250, 50)))
    with Runner(lm, slots=SLOTS, length=120, prefix=prefix, tap=keeper, **how) as runner:
        yield Generator(runner, max_new_tokens=NEW, stop=stop, read_last=True, max_prefill_tokens=most)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("most", "prefix", "blocks"), [(2048, (), None), (64, PREFIX, None), (512, (), 30)])
def test_tokens_and_rows_are_those_of_passes_outside_graphs(
    architecture: str,
    dtype: torch.dtype,
    most: int,
    prefix: tuple[int, ...],
    blocks: int | None,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """Prompts longer than a pass, some that are only read, and too few blocks."""
    lm, found = language_model(architecture, dtype), []
    requests = [
        Request(i, tuple(rng.integers(1, 250, int(size)).tolist()), NEW * int(rng.random() < 0.9))
        for i, size in enumerate(rng.integers(1, 90, 150))
    ]
    for switch in ("0", "1"):
        monkeypatch.setenv(SWITCH, switch)
        with opened(lm, most, prefix, blocks=blocks) as generator:
            if switch == "1" and not blocks:  # else they are captured between two steps
                generator.prepare()
            done: dict[int, Completion] = {each.request.id: each for each in generator.run(iter(requests))}
            assert bool(generator._passes._graphs) == (switch == "1")
        found.append(done)
    assert sorted(found[0]) == sorted(found[1]) == list(range(150))
    same = [found[0][i].generated.tolist() == found[1][i].generated.tolist() for i in range(150)]
    assert np.mean(same) >= (
        1 if dtype == torch.float32 else 0.9
    )  # a pass of another size rounds differently
    limit = 2**-7 if dtype == torch.float32 else 0.05
    for id_ in np.flatnonzero(same).tolist():
        one, other = found[0][id_], found[1][id_]
        assert one.positions.tolist() == other.positions.tolist()
        for layer in LAYERS:
            a, b = (bf16_values(each.rows[layer].codes).astype(np.float64) for each in (one, other))
            assert (np.linalg.norm(a - b, axis=1) <= limit * np.linalg.norm(a, axis=1)).all(), (id_, layer)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_rows_of_prompts_keep_their_bits_however_late_the_tap(
    architecture: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """In the graph of a pass, too, the tap runs beside the next block: delayed by 0.1 ms a layer, it reads the same."""
    lm, found, encode = language_model(architecture, torch.bfloat16), [], tap.encode_rows
    requests = [
        Request(i, tuple(rng.integers(1, 250, int(size)).tolist()), NEW)
        for i, size in enumerate(rng.integers(1, 90, 3 * SLOTS))
    ]

    def late(*given: Any, **how: Any) -> None:
        torch.cuda._sleep(200_000)
        encode(*given, **how)

    for use in (encode, late):
        monkeypatch.setattr(tap, "encode_rows", use)
        with opened(lm, 1024) as generator:
            generator.prepare()
            found.append({each.request.id: each for each in generator.run(iter(requests))})
            assert len(generator._passes._graphs) == 7
    for id_, one in found[0].items():
        assert one.generated.tolist() == found[1][id_].generated.tolist()
        for layer in LAYERS:
            assert (one.rows[layer].codes == found[1][id_].rows[layer].codes).all(), (id_, layer)


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_a_pass_without_tokens_changes_nothing(prefix: tuple[int, ...]) -> None:
    """Of every size, over keys and values that are NaN, before and after one with tokens."""
    lm = language_model("qwen2", torch.bfloat16)
    with opened(lm, 2048, prefix) as generator, torch.inference_mode():
        generator.prepare()
        runner, staging = generator.runner, generator.runner.tap.staging
        runner.cache.release_all()
        runner.cache.blocks.grow(3, 64)
        runner.cache.update()
        for held in (*runner.cache.keys, *runner.cache.values):
            held.fill_(math.nan)
        ids = tuple(range(1, 41))
        runner.tap.open([3], [3], [len(prefix) + 40], [len(prefix) + 40 + NEW])
        generator.state.active[3], generator.state.limit[3] = True, NEW
        watched = [
            *vars(generator.state).values(), *staging.all.tensors, runner.cache.table,
            *(held[: runner.cache.blocks.count] for held in (*runner.cache.keys, *runner.cache.values)),
        ]  # fmt: skip

        def unchanged() -> None:
            before = [each.clone() for each in watched]
            for size in generator._passes.sizes:
                graph = generator._passes.fitting(size)
                assert graph is not None and graph.size == size
                runner.tap.reads([], size)
                graph.run([], [])
            for one, each in zip(before, watched, strict=True):
                assert torch.equal(one.contiguous().view(torch.uint8), each.contiguous().view(torch.uint8))

        unchanged()
        graph = generator._passes.fitting(40)
        assert graph is not None
        part = (3, len(prefix), ids)
        runner.tap.reads([(3, len(prefix), 40)], graph.size)
        graph.run([part], [(39, 3)])
        block = runner.cache.blocks.held(3)[0]
        for held in (*runner.cache.keys, *runner.cache.values):
            kept = held[: runner.cache.blocks.count].isfinite().flatten(2).all(2)
            assert kept[block, :40].all() and kept.sum() == 40  # its own keys, and no others
        assert generator.state.count.tolist() == [0, 0, 0, 1] + [0] * (SLOTS - 3)
        runner.tap.drain()
        unchanged()


def test_a_capture_with_log_probabilities_verifies_against_transformers(tmp_path: Path) -> None:
    """Layers and next tokens inside the graphs of passes; prompts have no log-probabilities of their own."""
    lm = language_model("qwen2", torch.float32)
    options = CaptureOptions(
        model="tiny", prompts=write_prompts(tmp_path / "p.jsonl", 40), layer=(0, 1, 3), out=tmp_path / "s.zarr",
        max_new_tokens=20, batch_size=8, next_token=3, chat=False, codec="bf16",
    )  # fmt: skip
    run_capture(options, lm=lm)
    store = CaptureStore.open(options.out)
    assert len(list(store.iter_sequences())) == 40
    lm.model.set_attn_implementation("eager")
    for sequence in store.iter_sequences():
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None].cuda()
        with torch.no_grad():
            out = lm.model(ids, output_hidden_states=True)
        position = store.column("position")[sequence.rows]
        want = out.hidden_states[2][0].float().cpu().numpy()[position]
        got = store.layer(1)[sequence.rows]
        assert (np.linalg.norm(got - want, axis=1) <= 2**-7 * np.linalg.norm(want, axis=1)).all()
        log = torch.log_softmax(out.logits[0].double(), -1).cpu().numpy()[position]
        following = store.column("next_token_id")[sequence.rows]
        known = following >= 0
        said = store.column("next_logprob")[sequence.rows][known]
        assert np.abs(said - log[known, following[known]]).max() < 5e-3
