"""Requests through the engine's slots, and their rows and tokens against plain transformers, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_runs import LENGTH, LIMIT, alone, family_model

from nla_engine.capture.tap import RowRange, RowTap
from nla_engine.codec.rows import Codec
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import LanguageModel


def model(name: str) -> LanguageModel:
    """A small one with this configuration; the test is skipped where transformers has none."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return family_model(getattr(transformers, name))


def run(
    lm: LanguageModel,
    asked: list[Request],
    *,
    slots: int = 3,
    passed: int = 2048,
    look: Callable[[Runner], None] = lambda runner: None,
    **more: Any,
) -> tuple[list[Completion], int]:
    """Completions with rows of every block, and how many sequences stepped back. look: called with the open runner."""
    layers = tuple(range(len(lm.blocks)))
    tap = RowTap(
        layers,
        Codec.named("bf16", lm.d_model),
        RowRange.parse("generated"),
        rows_per_slot=LENGTH,
        sink_norm=dict.fromkeys(layers, float("inf")),
        device=lm.device,
    )
    with Runner(lm, slots=slots, length=LENGTH, tap=tap, **more) as runner:
        look(runner)
        generator = Generator(
            runner,
            max_new_tokens=12,
            stop=StopAutomaton([b""] * lm.vocab_size, ()),
            read_last=True,
            max_prefill_tokens=passed,
        )
        found = list(generator.run(iter(asked)))
        assert generator._queue is not None
        return found, generator._queue.tally().stepped_back


def check(lm: LanguageModel, found: list[Completion], prefix: tuple[int, ...] = ()) -> None:
    """AssertionError if a row is further off than bfloat16 explains, or a token is not the best."""
    for done in found:
        given = [*prefix, *done.request.token_ids]
        rows, logits = alone(lm, [*given, *done.generated.tolist()])
        assert len(done.generated) == done.request.max_new_tokens
        for k, own in enumerate(rows):
            kept = torch.from_numpy(done.rows[k].codes.view(np.int16)).view(torch.bfloat16).float()
            own = own[done.positions]
            assert ((kept - own).norm(dim=-1) / own.norm(dim=-1)).max() <= LIMIT
        for at, token in enumerate(done.generated.tolist(), len(given) - 1):
            best = logits[at]
            assert best[token] >= best.max() - 1e-3 * (1 + best.abs().max())


def drawn(rng: np.random.Generator, sizes: tuple[int, ...], new: tuple[int, ...]) -> list[Request]:
    """Requests of random prompts of these sizes, and so many new tokens."""
    return [
        Request(i, tuple(rng.integers(3, 250, size).tolist()), more)
        for i, (size, more) in enumerate(zip(sizes, new, strict=True))
    ]
