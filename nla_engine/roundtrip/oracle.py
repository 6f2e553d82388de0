"""A model that answers questions about vectors: an activation oracle or a LatentQA decoder, and how it is asked.

Its directory says neither how vectors enter nor how a question is put. The user says both; the prompt of activation
oracles is the default (Karvonen et al. 2025, `nl_probes/utils/dataset_utils.py` in their repository).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch

from nla_engine.config import AskOptions
from nla_engine.errors import PromptError, RequestError
from nla_engine.models.av_prompt import Wording, placeholder_prompt, renderer
from nla_engine.models.injection import Injection, Prompt, norm_named
from nla_engine.models.load import load_model
from nla_engine.models.sidecar import SIDECAR
from nla_engine.models.source import Source, find_source
from nla_engine.ops.backends import Kernels
from nla_engine.pair_fields import INJECT, QUESTION
from nla_engine.roundtrip.writer import Limits, Writer

#: Prompts that are kept; those of many different questions are made again when they are asked.
_KEPT_PROMPTS = 4096


class Prompts:
    """The prompts of a run, by question and number of vectors. message: with INJECT and QUESTION."""

    def __init__(self, options: AskOptions, layer: int, tokenizer: Any) -> None:
        """For vectors of this layer. PromptError says what does not fit the tokenizer."""
        if not options.raw and not tokenizer.chat_template:
            raise PromptError(
                f"{options.oracle}: has no chat template: give --raw, and a --prompt with all that it reads"
            )
        if not tokenizer.is_fast:
            raise PromptError(
                f"{options.oracle}: its tokenizer does not say where its tokens stand in a text: add a tokenizer.json"
            )
        message = f"Layer: {layer}\n{INJECT} \n{QUESTION}" if options.prompt is None else options.prompt
        render: Callable[[str], str] = lambda text: text + options.prefill  # noqa: E731
        if not options.raw:
            wording = Wording(None, options.system, options.template_option or {}, options.prefill)
            render = renderer(tokenizer, wording)
        self.message = message
        self._made = lru_cache(_KEPT_PROMPTS)(
            lambda question, vectors: placeholder_prompt(
                message.replace(QUESTION, question), options.placeholder, vectors, tokenizer, render
            )
        )

    def of(self, question: str, vectors: int) -> Prompt:
        """The prompt with this question and so many vectors. PromptError if it cannot be made."""
        return self._made(question, vectors)

    def survey(self, kinds: Iterable[tuple[str, int]]) -> tuple[Limits, str]:
        """The limits of the prompts of these questions and numbers of vectors, and a fingerprint of them all."""
        digest = hashlib.sha256()

        def prompts() -> Iterator[Prompt]:
            for question, vectors in kinds:
                prompt = self.of(question, vectors)
                digest.update(repr(prompt).encode())
                yield prompt

        return Limits.of(prompts()), digest.hexdigest()[:16]


def find_oracle(options: AskOptions) -> Source:
    """The directories of the oracle that the options name. RequestError if it is an AV or AR."""
    source = find_source(
        options.oracle,
        base=options.oracle_base,
        flag="--oracle-base",
        remote_code=options.trust_remote_code,
    )
    if (source.directory / SIDECAR).is_file():
        raise RequestError(
            f"--oracle {options.oracle}: has a {SIDECAR}, so it is an AV or AR: use explain --prompt to ask an AV"
        )
    return source


def load_writer(
    options: AskOptions, source: Source, device: torch.device, dtype: torch.dtype, kernels: Kernels
) -> Writer:
    """The oracle with the injection that the options give. RequestError says what does not fit it."""
    lm = load_model(
        options.oracle, device=device, dtype=dtype, source=source, remote_code=options.trust_remote_code
    )
    assert options.injection is not None, "checked by the options"
    scale = None if options.injection_scale is None else norm_named(options.injection_scale, lm.d_model)
    return Writer(lm, Injection.named(options.injection, scale, options.norm_match), kernels)
