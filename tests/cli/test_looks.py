"""Decode steps as a GPU takes them, several between two looks of the host: played on a CPU, beside one step a look."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from nla_engine.capture.row_range import RowRange
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec, bf16_values
from nla_engine.engine import scheduler
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import wrap_model
from nla_engine.models.tokens import token_bytes


class Replays:
    """Stands for a `DecodeGraph` where there is no GPU: the same steps one by one, unused lanes among them."""

    def __init__(self, generator: Generator, size: int, runs: list[int]) -> None:
        self.generator, self.size, self.runs = generator, size, runs

    def run(self, slots: list[int], steps: int) -> None:
        self.runs.append(steps)
        cache = self.generator.runner.cache
        lanes = torch.tensor(slots + [cache.spare] * (self.size - len(slots)))
        for _ in range(steps):
            self.generator._step(lanes, cache.prefix_size + cache.size)


def tied(request: Request, one: list[int], other: list[int]) -> bool:
    """Whether two replies part at tokens that transformers finds equally likely, but for rounding."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if at is None:
        return False
    with torch.no_grad():
        logits = tiny_model("qwen2")(torch.tensor([[*request.token_ids, *one[:at]]])).logits[0, -1]
    top = float(logits.max()) - 1e-4
    return float(logits[one[at]]) >= top and float(logits[other[at]]) >= top


def test_the_host_looks_before_the_last_steps_of_eight_and_waits_for_certain_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, runs = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny"), []
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), ())
    with Runner(lm, slots=5, length=60) as runner:
        generator = Generator(runner, max_new_tokens=31, stop=stop)
        monkeypatch.setattr(Runner, "graphable", True)
        monkeypatch.setattr(generator, "_graph", lambda lanes, steps: Replays(generator, lanes, runs))
        list(generator.run(Request(i, (1, 2, 3), 31) for i in range(5)))
    assert runs == [4, 4, 4, 4, 4, 4, 6, 0]  # the first of the 31 tokens comes with the prompt


@pytest.mark.parametrize("refill", [0.01, 0.5])
@pytest.mark.parametrize("positions", ["generated", "all", "last"])
def test_looking_before_the_last_of_several_steps_loses_no_end_and_no_row(
    positions: str, refill: float, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """A third of the rows are kept exactly, by a norm that they exceed."""
    monkeypatch.setattr(scheduler, "REFILL_PART", refill)
    lm = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")
    keep = RowRange.parse(positions)
    prompts = [tuple(rng.integers(1, 250, rng.integers(1, 30)).tolist()) for _ in range(60)]
    requests = [Request(i, prompt, int(rng.integers(1, 31))) for i, prompt in enumerate(prompts)]
    sink, runs = {1: math.inf, 2: math.inf}, []

    def completions(eos: tuple[int, ...] = (), replayed: bool = False) -> dict[int, Completion]:
        tap = RowTap(
            tuple(sink), Codec.named("int8", lm.d_model), keep, rows_per_slot=60,
            sink_norm=sink, device=torch.device("cpu"),
        )  # fmt: skip
        stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), eos)
        with (
            Runner(lm, slots=5, length=60, tap=tap) as runner,
            monkeypatch.context() as patch,
        ):
            generator = Generator(
                runner, max_new_tokens=30, stop=stop, read_last=positions != "last", max_prefill_tokens=17
            )  # fmt: skip
            if replayed:
                patch.setattr(Runner, "graphable", True)
                patch.setattr(generator, "_graph", lambda lanes, steps: Replays(generator, lanes + 2, runs))
            return {ended.request.id: ended for ended in generator.run(iter(requests))}

    free = completions()
    eos = tuple({ended.generated[len(ended.generated) // 2] for ended in list(free.values())[:6]})
    for layer in sink:
        norms = np.unique(np.concatenate([ended.rows[layer].norm for ended in free.values()]))
        sink[layer] = float(norms[2 * len(norms) // 3 :][:2].mean())  # between two: no last bit decides
    plain, replayed = completions(eos), completions(eos, replayed=True)
    assert sorted(plain) == sorted(replayed) == list(range(60))
    assert {ended.finish for ended in plain.values()} == {Finish.EOS, Finish.LENGTH}
    assert (
        max(runs) > 1 or refill < 0.1
    )  # several steps a look; where each end is waited for, there may be none
    exact = 0
    for id_, ended in plain.items():
        other, prompt = replayed[id_], len(ended.request.token_ids)
        if other.generated.tolist() != ended.generated.tolist():  # batches of other sizes round differently
            assert tied(ended.request, ended.generated.tolist(), other.generated.tolist())
            continue
        assert other.finish == ended.finish
        for layer in sink:
            kept, again = ended.rows[layer], other.rows[layer]
            assert len(kept.norm) == keep.count(prompt, prompt + len(ended.generated))
            assert kept.exact_index.tolist() == again.exact_index.tolist()
            np.testing.assert_allclose(kept.norm, again.norm, rtol=1e-5)
            np.testing.assert_allclose(
                bf16_values(kept.exact), bf16_values(again.exact), rtol=2**-7, atol=1e-4
            )
            exact += len(kept.exact_index)
    assert exact > 30
