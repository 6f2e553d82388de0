"""Prompt passes filled up to the sizes of graphs, without a graph: what fills them up changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from played_graphs import Called, play_graphs
from tiny import byte_tokenizer, tiny_model

from nla_engine.capture.row_range import RowRange
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec, bf16_values
from nla_engine.engine import pass_graphs
from nla_engine.engine.generator import Generator
from nla_engine.engine.pass_graphs import SWITCH, PaddedPass
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.attention import tile_rows
from nla_engine.ops.backends import Kernels

PREFIX, LAYERS, SLOTS, NEW = (7, 8, 9), (0, 2), 5, 12


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    play_graphs(monkeypatch)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")


@contextmanager
def opened(lm: LanguageModel, most: int, prefix: tuple[int, ...] = PREFIX, **how: Any) -> Iterator[Generator]:
    tap = RowTap(
        LAYERS, Codec.named("bf16", lm.d_model), RowRange.parse("generated" if prefix else "all"), rows_per_slot=60,
        sink_norm=dict.fromkeys(LAYERS, math.inf), device=lm.device,
    )  # fmt: skip
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), tuple(range(0, 250, 50)))
    made = {"slots": SLOTS, "length": 60, "prefix": prefix, "tap": tap, "kernels": Kernels("fused"), **how}
    with Runner(lm, **made) as runner:
        yield Generator(runner, max_new_tokens=NEW, stop=stop, read_last=True, max_prefill_tokens=most)


@pytest.mark.parametrize("group", [1, 3, 7, 64, 100])
@pytest.mark.parametrize("size", [1, 6, 64, 333])
def test_every_token_is_in_one_tile_and_what_is_left_over_belongs_to_the_spare_slot(
    lm: LanguageModel, size: int, group: int, rng: np.random.Generator
) -> None:
    with Runner(lm, slots=SLOTS, length=60, prefix=PREFIX, kernels=Kernels("fused")) as runner:
        spare, begin = runner.cache.spare, len(PREFIX)
        given = PaddedPass(size, SLOTS, runner.cache)
        shape = len(given.tiles(group).token)
        assert shape != size
        for _ in range(20):
            parts, left = [], int(rng.integers(0, size + 1))
            for slot in rng.permutation(SLOTS).tolist():
                start, length = begin + int(rng.integers(0, 20)), int(rng.integers(0, min(left, 30) + 1))
                if length:
                    parts.append((slot, start, tuple(rng.integers(1, 250, length).tolist())))
                    left -= length
            used = sum(len(ids) for _, _, ids in parts)
            lanes = [(int(rng.integers(0, used)), slot) for slot, _, _ in parts]
            given.fill(parts, lanes)
            ids, slots, positions = given.tokens.numpy()
            at = 0
            for slot, start, part in parts:
                own = slice(at, at + len(part))
                assert ids[own].tolist() == list(part) and (slots[own] == slot).all()
                assert positions[own].tolist() == list(range(start, start + len(part)))
                at += len(part)
            assert (slots[used:] == spare).all() and (slots[:used] != spare).all()
            assert ((positions[used:] >= begin) & (positions[used:] < begin + runner.cache.size)).all()
            ends = list(zip(given.wanted.tolist(), given.lanes.tolist(), strict=True))
            assert ends[: len(lanes)] == lanes and {slot for _, slot in ends[len(lanes) :]} <= {spare}
            tiles, seen = given.tiles(group), np.zeros(size, np.int64)
            assert len(tiles.token) == shape and tiles.rows == tile_rows(size, group)
            columns = (tiles.token, tiles.count, tiles.slot, tiles.position)
            for token, count, slot, position in zip(*(column.tolist() for column in columns), strict=True):
                assert count * group <= max(tiles.rows, group)
                seen[token : token + count] += 1
                assert (slots[token : token + count] == slot).all() and (count or slot == spare)
                assert positions[token : token + count].tolist() == list(range(position, position + count))
            assert (seen == 1).all()


def tensors_of(generator: Generator) -> dict[str, torch.Tensor]:
    """Everything that a pass may write, but the block that nobody holds."""
    cache, state, staging = generator.runner.cache, generator.state, generator.runner.tap.staging
    blocks = {f"keys {i}": held[: cache.blocks.count] for i, held in enumerate(cache.keys)}
    blocks |= {f"values {i}": held[: cache.blocks.count] for i, held in enumerate(cache.values)}
    rows = dict(zip(("codes", "scales", "norm"), staging.all.tensors, strict=True))
    return {**vars(state), **blocks, **rows, "table": cache.table}


def elements(tensor: torch.Tensor) -> torch.Tensor:
    """Its bits, one row of bytes per element: NaN equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8).view(tensor.numel(), tensor.element_size())


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_a_pass_writes_what_it_writes_without_filling_and_nothing_else(
    lm: LanguageModel, prefix: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Over keys, values, rows and states that are poison everywhere."""
    slots, begin = rng.permutation(SLOTS)[:3].tolist(), len(prefix)
    prompts = [tuple(rng.integers(1, 250, int(rng.integers(1, 30))).tolist()) for _ in slots]
    ends = (np.cumsum([len(ids) for ids in prompts]) - 1).tolist()
    sizes = [begin + len(ids) for ids in prompts]
    parts = [(slot, begin, ids) for slot, ids in zip(slots, prompts, strict=True)]
    written: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    for switch in ("1", "0"):
        monkeypatch.setenv(SWITCH, switch)
        with opened(lm, 2048, prefix) as generator, torch.inference_mode():
            runner = generator.runner
            runner.cache.release_all()
            for slot, size in zip(slots, sizes, strict=True):
                runner.cache.blocks.grow(slot, size - begin + NEW)
            runner.cache.update()
            for name, tensor in tensors_of(generator).items():
                if name.startswith(("keys", "values")):
                    tensor.fill_(math.nan)
                elif name in ("codes", "scales", "norm"):
                    tensor.view(torch.uint8).fill_(0xA5)
            generator.state.token.fill_(-7)
            generator.state.limit.fill_(NEW)
            runner.tap.open(slots, slots, sizes, [size + NEW for size in sizes])
            generator.state.active[slots], generator.state.position[slots] = True, torch.tensor(sizes) - 1
            graph = generator._passes.fitting(sum(map(len, prompts)))
            assert (graph is not None) == (switch == "1")
            before = {name: tensor.clone() for name, tensor in tensors_of(generator).items()}
            if graph is not None:
                runner.tap.reads([], graph.size)
                graph.run([], [])
                for name, tensor in tensors_of(generator).items():
                    assert torch.equal(elements(tensor), elements(before[name])), name
            runner.tap.reads([(slot, begin, len(ids)) for slot, _, ids in parts], graph and graph.size)
            if graph is None:
                generator._advance(torch.tensor(slots), runner.prefill(parts, ends))
            else:
                graph.run(parts, list(zip(ends, slots, strict=True)))
            written.append(
                {
                    name: (tensor.clone(), (elements(tensor) != elements(before[name])).any(1))
                    for name, tensor in tensors_of(generator).items()
                }
            )
    for name, (tensor, changed) in written[0].items():
        other, should = written[1][name]
        if name.startswith(("keys", "values")) or name in ("token", "count", "generated"):
            assert changed.any(), name
        if name == "codes":  # rounded to bfloat16
            near = np.isclose(
                bf16_values(tensor.numpy()), bf16_values(other.numpy()), 0.02, 1e-3, equal_nan=True
            )
            assert near.all() and torch.equal(
                *(each.view(len(tensor), -1).any(1) for each in (changed, should))
            )
        else:
            assert torch.equal(changed, should), name
            torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def prompts_of(rng: np.random.Generator, count: int) -> list[Request]:
    """Some only read, some longer than a pass."""
    sizes = rng.integers(1, 45, count)
    return [
        Request(i, tuple(rng.integers(1, 250, int(size)).tolist()), NEW * int(rng.random() < 0.9))
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("most", [16, 40, 2048])
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_tokens_and_rows_are_those_of_passes_that_are_not_filled_up(
    lm: LanguageModel,
    most: int,
    prefix: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    requests, found = prompts_of(rng, 30), []
    for switch in ("0", "1"):
        monkeypatch.setenv(SWITCH, switch)
        with opened(lm, most, prefix) as generator:
            assert bool(generator._passes.sizes) == (switch == "1")
            done: dict[int, Completion] = {each.request.id: each for each in generator.run(iter(requests))}
        found.append(done)
        assert bool(Called.used) == (switch == "1")
    assert sorted(found[0]) == sorted(found[1]) == list(range(30))
    for id_, one in found[0].items():
        other = found[1][id_]
        assert one.generated.tolist() == other.generated.tolist() and one.finish == other.finish
        assert one.positions.tolist() == other.positions.tolist()
        for layer in LAYERS:
            a, b = (bf16_values(each.rows[layer].codes) for each in (one, other))
            assert np.abs(a - b).max(initial=0) <= 0.02 * np.abs(a).max(initial=0)


def test_twins_and_replies_share_a_filled_pass(lm: LanguageModel, rng: np.random.Generator) -> None:
    """Twins have no rows of their prompts; each is greedy, so it says what the first says."""
    tap = RowTap(
        LAYERS, Codec.named("bf16", lm.d_model), RowRange.parse("generated"), rows_per_slot=NEW,
        sink_norm=dict.fromkeys(LAYERS, math.inf), device=lm.device,
    )  # fmt: skip
    ids = [tuple(rng.integers(1, 250, int(size)).tolist()) for size in rng.integers(3, 30, 8)]
    requests = [Request(3 * i + k, one, NEW, again=k > 0) for i, one in enumerate(ids) for k in range(3)]
    with opened(lm, 64, tap=tap) as generator:
        done = {each.request.id: each for each in generator.run(iter(requests))}
    assert Called.used and sorted(done) == list(range(24))
    for i in range(8):
        assert len({tuple(done[3 * i + k].generated.tolist()) for k in range(3)}) == 1


def test_only_passes_that_take_longer_to_launch_than_to_run_have_graphs(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(lm, 8192) as generator:
        assert generator._passes.sizes == [1024, 1536, 2048, 3072, 4096, 6144, 8192]
        assert generator._passes.fitting(8193) is None
        runner = generator.runner
        blocks = sum(weight.numel() for weight in lm.blocks.parameters()) / len(lm.blocks)
        for weights, largest in (
            (3.54e6, 8192),
            (14.9e6, 1536),
            (233e6, 0),
        ):  # SmolLM2-135M, Qwen2.5 of 0.5 and 7 B
            monkeypatch.setattr(pass_graphs, "OPERATIONS", 4e14 * blocks / weights)
            assert max(pass_graphs._sizes(runner, 8192), default=0) == largest
    with opened(lm, 8192, kernels=Kernels("reference")) as generator:
        assert generator._passes.sizes == []
    pythia = wrap_model(tiny_model("gemma3_text"), byte_tokenizer(), name="tiny")
    with opened(pythia, 8192) as generator:
        monkeypatch.setattr(
            generator.runner, "_fused", generator.runner._fused[1:]
        )  # one block is the library's
        assert pass_graphs._sizes(generator.runner, 8192) == []
