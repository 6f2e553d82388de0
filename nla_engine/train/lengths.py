"""Whether texts fit the models, and what share of them the AV could not write to their end."""

from __future__ import annotations

from collections.abc import Callable

from nla_engine.errors import RequestError
from nla_engine.models.sidecar import reconstructor_prompts
from nla_engine.roundtrip.rows import spread
from nla_engine.train.data import Data
from nla_engine.train.pair import TrainedAR, TrainedAV
from nla_engine.train.supervised import target_ids

#: Texts whose length is looked at, to tell how many are cut.
_LOOKED_AT = 2000


def check_lengths(
    av: TrainedAV, ar: TrainedAR, data: Data, new_tokens: int, announce: Callable[[str], None]
) -> None:
    """RequestError if the AV's prompt and a text, or a text in the AR's prompt, have more tokens than the models'
    positions. Announces how many texts are cut to `new_tokens`."""
    longest = av.lm.max_length
    if (needed := len(av.prompt.token_ids) + new_tokens) > longest:
        raise RequestError(
            f"--max-new-tokens {new_tokens}: with the AV's prompt these are {needed} tokens, {av.lm.name} has "
            f"{longest} positions: lower it"
        )
    texts = [*data.trained.texts, *data.held_out.texts]
    suspects = [text for text in texts if len(text.encode()) > longest // 2]
    prompts = reconstructor_prompts(ar.sidecar, ar.lm.tokenizer, suspects)
    if (most := max(map(len, prompts), default=0)) > longest:
        raise RequestError(
            f"a text has {most} tokens in the AR's prompt, {ar.lm.name} has {longest} positions: shorten it"
        )
    some = [texts[place] for place in spread(len(texts), min(_LOOKED_AT, len(texts))).tolist()]
    cut = sum(len(ids) > new_tokens for ids in target_ids(av.lm.tokenizer, some, new_tokens + 1))
    if cut:
        announce(
            f"{cut / len(some):.0%} of the texts are longer than --max-new-tokens {new_tokens} with their tags: the AV "
            "learns their beginning"
        )
