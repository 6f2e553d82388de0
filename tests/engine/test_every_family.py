"""Small models of families of every kind of attention and cache; `make sweep` runs all families that there are."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from small_families import configurations, seeing
from sweep import PAGE, REFUSED, UNBUILT, UNSEEN, family_outcome, model_type, on_page, page

#: One of each kind: what runs it, and what is peculiar to it.
KINDS = {
    "GPT2Config": "fast",  # learned positions, blocks in .h
    "GPTJConfig": "fast",  # parallel blocks, part of a head rotates
    "OPTConfig": "fast",  # learned positions with an offset
    "Gemma2Config": "fast",  # sliding windows, soft caps
    "MixtralConfig": "fast",  # experts
    "BloomConfig": "fast",  # ALiBi
    "FalconConfig": "fast",  # one key/value head, parallel blocks
    "GPTNeoConfig": "fast",  # windows that only its attention knows
    "StableLmConfig": "fast",  # no attention backend, by its own account
    "GotOcr2Config": "fast",  # only what sees its images has attention that is not pluggable
    "XGLMConfig": "library",  # attention that is not pluggable
    "DeepseekV3Config": "fast",  # compressed keys (MLA), experts in groups
    "GptOssConfig": "fast",  # attention sinks, sliding windows, experts
    "MambaConfig": "library",  # a recurrent state alone
    "Qwen3_5TextConfig": "fast",  # a hybrid of gated DeltaNet and attention
    "OlmoHybridConfig": "fast",  # the same, which may flip its state
    "Lfm2Config": "fast",  # a hybrid of short convolutions and attention
    "Gemma4TextConfig": "fast",  # head sizes by block, borrowed keys, embeddings for each block
    "Llama4TextConfig": "fast",  # chunks, blocks without rotation, experts
    "Qwen2_5_VLConfig": "fast",  # sees images
    "RecurrentGemmaConfig": "library",  # a hybrid with windows
    "Inkling2LoopTextConfig": "not",  # some blocks run several times
    "XLMConfig": "not",
    "XmodConfig": "not",
}


def the(name: str) -> type:
    found = {config.__name__: config for config in (*configurations(), *seeing())}
    if name not in found:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_family_runs_as_plain_transformers_does(name: str, rng: np.random.Generator) -> None:
    way, _ = family_outcome(the(name), rng, both=False)
    assert way == KINDS[name]


def test_exceptions_name_families_that_there_are() -> None:
    names = {config.__name__ for config in (*configurations(), *seeing())}
    missing = (set(REFUSED) | set(UNBUILT) | UNSEEN) - names
    assert not missing or transformers.__version__ not in PAGE.read_text(encoding="utf-8")


def test_the_page_is_made_of_its_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," in text:
        assert page(on_page()) == text


def test_the_page_says_what_the_sweep_found() -> None:
    rows = {name: way for name, (way, _) in on_page().items()}
    assert {name: rows[model_type(the(name))] for name in KINDS} == KINDS
    if f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8"):
        assert set(rows) == {model_type(config) for config in (*configurations(), *seeing())}
