"""What capture measures before it writes: the norm above which a row is a sink, and the codec's error on other rows.

Rows are those of transformers' own forward, stopped after the deepest layer: the engine need not be set up for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.codec.rows import SINK_FACTOR, Codec, bf16_values, describe_errors, relative_errors
from nla_engine.errors import EngineError
from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import find_places
from nla_engine.models.prompt_set import PromptSet
from nla_engine.sites import Site

#: Most prompts, and most tokens of each, on which the median norm and the codec's error are measured.
CALIBRATION = (64, 512)
#: Fewer tokens if these are more than this part of the tokens of the job, but not fewer than so many.
PART, LEAST = 1 / 20, 256
#: New tokens of a prompt that count for that: a reply may end long before its limit.
_NEW = 64


@dataclass(frozen=True)
class LayerCalibration:
    """Of one site. sink_norm: rows with a larger norm are sinks. error: the codec's, by `describe_errors`."""

    sink_norm: float
    error: dict[str, float | int]


def quiet(done: int, total: int) -> None:
    """Tell nobody."""


def calibrate(
    lm: LanguageModel,
    prompts: PromptSet,
    layers: Sequence[Site | int],
    codec: Codec,
    max_new_tokens: int = 0,
    progress: Callable[[int, int], None] = quiet,
    every: int = 1,
) -> dict[Site, LayerCalibration]:
    """Measure each site on the first prompts. Deterministic: a resumed run need not repeat it.

    max_new_tokens: of each prompt in the job; progress(tokens read, tokens to read); every: how often each prompt comes
    in turn. No Runner may be open.
    """
    sample = list(_sample(prompts, max_new_tokens, every))
    sites = tuple(map(Site.at, layers))
    if lm.ranks is None:
        rows = _read(lm, sample, sites, progress)
    else:
        rows = lm.ranks.together(_read, lm, sample, sites, progress=progress, there={"progress": quiet})
    out = {}
    for layer, x in rows.items():
        norm = np.linalg.norm(x.astype(np.float64), axis=1)
        finite = np.isfinite(norm) & (norm > 0)
        if not finite.any():
            raise EngineError(
                f"{layer.label}: every row of the first {len(sample)} prompts is zero or not finite"
            )
        sink_norm = float(np.float32(SINK_FACTOR * np.median(norm[finite])))
        ordinary = finite & (norm <= sink_norm)
        out[layer] = LayerCalibration(sink_norm, describe_errors(relative_errors(codec, x[ordinary])))
    return out


def _sample(prompts: PromptSet, max_new_tokens: int, every: int) -> Iterator[np.ndarray]:
    """The token ids that are read, int32 [t] of each prompt."""
    count, size = CALIBRATION
    job = int(prompts.sizes.sum()) + len(prompts) * min(max_new_tokens, _NEW)
    left = max(int(job * PART), LEAST)
    for number in range(0, min(count * every, len(prompts)), every):
        ids = prompts.token_ids(number)[: min(size, left)]
        left -= len(ids)
        if not len(ids):
            return
        yield ids


@torch.inference_mode()
def _read(
    lm: LanguageModel,
    sample: Sequence[np.ndarray],
    layers: Sequence[Site],
    progress: Callable[[int, int], None],
) -> dict[Site, np.ndarray]:
    """The rows of every token at each site, as bfloat16 holds them: float32 [n, d]."""
    rows: dict[Site, list[np.ndarray]] = {layer: [] for layer in layers}
    places = find_places(lm, layers)
    cut = lm.truncated(max(site.layer for site in layers))
    attend_by(lm.model, "eager")
    done, total = 0, sum(map(len, sample))

    def keep(layer: Site) -> Callable[[torch.Tensor], None]:
        def take(hidden: torch.Tensor) -> None:
            bits = hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16).view(torch.uint16)
            rows[layer].append(bf16_values(bits.cpu().numpy()))

        return take

    with ExitStack() as hooks:
        for layer, place in places.items():
            hooks.callback(place.watch(keep(layer)).remove)
        for ids in sample:
            given = torch.from_numpy(ids.astype(np.int64))[None].to(lm.device)
            cut.decoder(input_ids=given, **cut.uncached)
            done += len(ids)
            progress(done, total)
    return {layer: np.concatenate(parts) for layer, parts in rows.items()}
