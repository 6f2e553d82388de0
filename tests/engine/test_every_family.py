"""Small models of families of every kind of attention and cache; `make sweep` runs all families that there are."""

from __future__ import annotations

import re

import numpy as np
import pytest
import transformers
from small_families import configurations
from sweep import PAGE, REFUSED, UNBUILT, family_outcome, model_type

#: One of each kind: what runs it, and what is peculiar to it.
KINDS = {
    "GPT2Config": "fast",  # learned positions, blocks in .h
    "GPTJConfig": "fast",  # parallel blocks, part of a head rotates
    "OPTConfig": "fast",  # learned positions with an offset
    "Gemma2Config": "fast",  # sliding windows, soft caps
    "MixtralConfig": "fast",  # experts
    "BloomConfig": "library",  # ALiBi
    "FalconConfig": "library",  # one key/value head
    "DeepseekV3Config": "fast",  # compressed keys (MLA), experts in groups
    "GptOssConfig": "fast",  # attention sinks, sliding windows, experts
    "MambaConfig": "library",  # a recurrent state alone
    "Qwen3_5TextConfig": "fast",  # a hybrid of gated DeltaNet and attention
    "Gemma4TextConfig": "library",  # head sizes by block
    "RecurrentGemmaConfig": "library",  # a hybrid with windows
    "Inkling2LoopTextConfig": "not",  # some blocks run several times
    "XLMConfig": "not",
    "XmodConfig": "not",
}


def the(name: str) -> type:
    found = {config.__name__: config for config in configurations()}
    if name not in found:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_family_runs_as_plain_transformers_does(name: str, rng: np.random.Generator) -> None:
    way, _ = family_outcome(the(name), rng, both=False)
    assert way == KINDS[name]


def test_exceptions_name_families_that_there_are() -> None:
    names = {config.__name__ for config in configurations()}
    missing = (set(REFUSED) | set(UNBUILT)) - names
    assert not missing or transformers.__version__ not in PAGE.read_text(encoding="utf-8")


def test_the_page_says_what_the_sweep_found() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name: rows[model_type(the(name))] for name in KINDS} == KINDS
    if f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8"):
        assert set(rows) == {model_type(config) for config in configurations()}
