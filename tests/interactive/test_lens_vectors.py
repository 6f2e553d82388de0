"""nla_engine.lens: any vectors through a model's final norm and head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import D, byte_tokenizer, tiny_model

import nla_engine
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel, wrap_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), byte_tokenizer(), name="tiny")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_it_is_norm_and_head(
    lm: LanguageModel, kind: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nla_engine.interactive.lens.LOGIT_BYTES", {"cpu": 4 * 259 * 2}
    )  # two vectors at once
    vectors = (5 * rng.standard_normal((5, D))).astype(np.float32)
    ids = np.array([3, -1, 258, 0, 7])
    found = nla_engine.lens(kind(vectors), lm, next_ids=ids, top_k=4)
    with torch.inference_mode():
        log = torch.log_softmax(lm.head(lm.decoder.norm(torch.from_numpy(vectors))).double(), -1).numpy()
    assert len(found) == 5 and found.top_id.shape == (5, 4)
    np.testing.assert_allclose(found.top_logprob, -np.sort(-log)[:, :4], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(log, found.top_id, 1), found.top_logprob, atol=1e-4)
    np.testing.assert_allclose(found.entropy, -(np.exp(log) * log).sum(1), atol=1e-4)
    known = ids >= 0
    np.testing.assert_allclose(found.next_logprob[known], log[known, ids[known]], atol=1e-4)
    assert np.isnan(found.next_logprob[1]) and found.next_rank[1] == 0
    own = log[known, ids[known]]
    assert found.next_rank[known].tolist() == ((log[known] > own[:, None]).sum(1) + 1).tolist()
    assert (
        found.top_token[0][0] == byte_tokenizer().decode([found.top_id[0, 0]]) or "�" in found.top_token[0][0]
    )
    assert repr(found).count("\n") == 5 and "<table" in found._repr_html_()
    pytest.importorskip("pandas")
    assert found.to_pandas()["next_rank"].tolist() == found.next_rank.tolist()
    one = nla_engine.lens(vectors[0], lm)
    assert one.next_logprob is None and one.top_id.shape == (1, 10) and "next_rank" not in one.to_pandas()


@pytest.mark.parametrize(
    ("vectors", "how", "message"),
    [
        (np.zeros((2, 9), np.float32), {}, "tiny has width 64, these vectors have width 9"),
        (np.zeros((2, D), int), {}, "give floating-point numbers"),
        (np.zeros((2, D)), {"top_k": 260}, "top_k is 260: it must be 1 to 259, the tokens of tiny"),
        (np.zeros((2, D)), {"top_k": 0}, "top_k is 0"),
        (np.zeros((2, D)), {"top_k": True}, "top_k is True"),
        (np.zeros((2, D)), {"next_ids": [1]}, "give a whole number for each of 2 vectors"),
        (np.zeros((2, D)), {"next_ids": [1.0, 2.0]}, "give a whole number for each"),
        (np.zeros((2, D)), {"next_ids": [1, 259]}, "next_ids holds 259: ids are 0 to 258, or -1"),
        (np.zeros((2, D)), {"device": "cpu"}, "device and dtype are for a model that is loaded here"),
    ],
)
def test_what_is_refused(lm: LanguageModel, vectors: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        nla_engine.lens(vectors, lm, **how)
