"""One sequence by transformers alone, and with other roundings, compared with its own output of hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from nla_engine.models.alone import read_alone
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.models.places import find_places
from nla_engine.sites import Site


@pytest.fixture
def lm() -> LanguageModel:
    return wrap_model(tiny_model("qwen2").to(torch.bfloat16), byte_tokenizer(), name="qwen2")


def test_states_are_those_of_transformers(lm: LanguageModel, rng: np.random.Generator) -> None:
    ids = torch.from_numpy(rng.integers(0, 250, (1, 30)))
    sites = [Site(layer) for layer in range(len(lm.blocks))]
    found, final = read_alone(lm, find_places(lm, sites), ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    lm.model.set_attn_implementation("eager")
    with torch.inference_mode():
        true = lm.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert list(found) == sites
    for site in sites[:-1]:  # behind the last block transformers shows the final norm alone
        assert torch.equal(found[site], true[site.layer + 1])
    assert torch.equal(final, true[-1])


def test_rounding_is_redrawn_and_no_more(lm: LanguageModel, rng: np.random.Generator) -> None:
    ids = torch.from_numpy(rng.integers(0, 250, (1, 40)))
    places = find_places(lm, map(Site, range(len(lm.blocks))))
    plain, again, other, same, third = (read_alone(lm, places, ids, seed)[0] for seed in (0, 0, 1, 1, 2))
    for block, output in plain.items():
        assert torch.equal(output, again[block]) and torch.equal(other[block], same[block])
        assert not torch.equal(other[block], third[block])
        apart = (output.float() - other[block].float()).norm(dim=-1) / output.float().norm(dim=-1)
        assert 1e-3 < float(apart.median()) < 0.05
