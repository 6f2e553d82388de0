"""Supervised steps: the AV learns to write a row's text given its vector, the AR to give the vector given the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from nla_engine.roundtrip.verbalize import CLOSE_TAG, OPEN_TAG
from nla_engine.train.data import Rows
from nla_engine.train.pair import TrainedAR, TrainedAV, mse_nrm


def target_ids(tokenizer: Any, texts: Sequence[str], most: int) -> list[list[int]]:
    """What the AV is to write for each text: in its tags, with the ending token, cut to `most` tokens."""
    tagged = [f"{OPEN_TAG}{text}{CLOSE_TAG}" for text in texts]
    ids: list[list[int]] = tokenizer(tagged, add_special_tokens=False)["input_ids"]
    ending = tokenizer.eos_token_id
    return [(each if ending is None else [*each, ending])[:most] for each in ids]


def parts(sizes: Sequence[int], most: int) -> Iterator[np.ndarray]:
    """Places of texts, int64, in groups that padded to their longest have at most `most` tokens (one text may have
    more). Those of like sizes are together."""
    group: list[int] = []
    for place in np.argsort(np.asarray(sizes), kind="stable").tolist():
        if group and (len(group) + 1) * sizes[place] > most:
            yield np.array(group)
            group = []
        group.append(place)
    if group:
        yield np.array(group)


def av_step(
    av: TrainedAV, rows: Rows, chosen: np.ndarray, *, new_tokens: int, tokens_at_once: int
) -> torch.Tensor:
    """Gradients of the mean loss per token over these rows; the loss, float32 [], on the device."""
    ids = target_ids(av.lm.tokenizer, [rows.texts[place] for place in chosen.tolist()], new_tokens)
    total, start = sum(map(len, ids)), len(av.prompt.token_ids)
    loss = torch.zeros((), device=av.lm.device)
    for part in parts([start + len(each) for each in ids], tokens_at_once):
        vectors = rows.vectors[torch.from_numpy(chosen[part])]
        summed = -av.log_probs(vectors, [ids[place] for place in part.tolist()]).sum() / total
        summed.backward()
        loss += summed.detach()
    return loss


def ar_step(
    ar: TrainedAR, vectors: torch.Tensor, texts: Sequence[str], *, tokens_at_once: int
) -> torch.Tensor:
    """Gradients of the mean mse_nrm over these texts; mse_nrm of each, float32 [n]. vectors: float32 [n, d]"""
    sizes = [len(ids) for ids in ar.lm.tokenizer(list(texts))["input_ids"]]
    found = torch.zeros(len(texts), device=ar.lm.device)
    for part in parts([size + _TEMPLATE for size in sizes], tokens_at_once):
        mse = mse_nrm(
            vectors[torch.from_numpy(part)], ar.reconstruct([texts[place] for place in part.tolist()])
        )
        (mse.sum() / len(texts)).backward()
        found[torch.from_numpy(part).to(found.device)] = mse.detach()
    return found


#: About how many tokens the AR's template has.
_TEMPLATE = 20
