"""Weights that are replaced in place under an open runner, which shares a prefix that was read with the old ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from family_runs import family_model

from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels

pytestmark = pytest.mark.filterwarnings("ignore")


def texts(runner: Runner, generator: Generator, prompts: list[list[int]]) -> list[list[int]]:
    asked = [Request(number, tuple(ids), 8) for number, ids in enumerate(prompts)]
    found = {each.request.id: each.generated.tolist() for each in generator.run(iter(asked))}
    return [found[number] for number in range(len(prompts))]


def opened(lm: LanguageModel, prefix: list[int], kernels: str) -> tuple[Runner, Generator]:
    runner = Runner(lm, slots=3, length=64, prefix=prefix, kernels=Kernels(kernels))
    return runner, Generator(runner, max_new_tokens=8, stop=StopAutomaton([b""] * lm.vocab_size, ()))


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("family", ["LlamaConfig", "Qwen3NextConfig", "DeepseekV3Config"])
def test_a_runner_goes_on_as_one_that_is_opened_with_the_new_weights(
    family: str, kernels: str, rng: np.random.Generator
) -> None:
    if not hasattr(transformers, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    lm = family_model(getattr(transformers, family))
    prefix = rng.integers(3, 250, 20).tolist()
    prompts = [rng.integers(3, 250, size).tolist() for size in (1, 4, 2, 6, 3)]
    runner, generator = opened(lm, prefix, kernels)
    before = texts(runner, generator, prompts)
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight.add_(torch.from_numpy(rng.standard_normal(weight.shape)).to(weight) * weight.std() * 0.5)
    stale = texts(runner, generator, prompts)  # the prefix has the old weights
    runner.weights_changed()
    after = texts(runner, generator, prompts)
    runner.close()
    fresh, generator = opened(lm, prefix, kernels)
    assert texts(fresh, generator, prompts) == after
    fresh.close()
    assert before != after != stale


def test_without_a_prefix_there_is_nothing_to_read_again(rng: np.random.Generator) -> None:
    lm = family_model(transformers.LlamaConfig)
    runner, generator = opened(lm, [], "reference")
    prompts = [rng.integers(3, 250, 5).tolist()]
    before = texts(runner, generator, prompts)
    runner.weights_changed()
    assert texts(runner, generator, prompts) == before
    runner.close()
