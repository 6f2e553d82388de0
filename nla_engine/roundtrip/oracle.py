"""A model that answers questions about vectors: an activation oracle or a LatentQA decoder.

Its directory says neither how vectors enter nor how a question is put. The user says both; the prompt of activation
oracles is the default (Karvonen et al. 2025, `nl_probes/utils/dataset_utils.py` in their repository).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch

from nla_engine.config import AskOptions
from nla_engine.errors import PromptError, RequestError
from nla_engine.fields import INJECT, QUESTION
from nla_engine.models.av_prompt import Wording, placeholder_prompt, renderer
from nla_engine.models.injection import Injection, Prompt, norm_named
from nla_engine.models.load import LanguageModel, load_model
from nla_engine.models.sidecar import SIDECAR
from nla_engine.models.source import find_source
from nla_engine.ops.backends import Kernels
from nla_engine.roundtrip.pair import announce_unfused, compute_with
from nla_engine.roundtrip.writer import Limits, Writer

#: Prompts that are kept; those of many different questions are made again when they are asked.
_KEPT_PROMPTS = 4096


class Oracle:
    """A loaded oracle, and the prompts that it is asked with."""

    def __init__(
        self,
        lm: LanguageModel,
        injection: Injection,
        message: str,
        placeholder: str,
        *,
        wording: Wording = Wording(),
        raw: bool = False,
        kernels: Kernels = Kernels(),
    ) -> None:
        """message: with INJECT and QUESTION; wording: all but the text; raw: without a chat template.

        CheckpointError or PromptError says what does not fit the model.
        """
        self.lm, self.injection, self.message, self.placeholder = lm, injection, message, placeholder
        self.prefill = wording.prefill
        self.writer = Writer(lm, injection, kernels)
        tokenizer = lm.tokenizer
        if not raw and not tokenizer.chat_template:
            raise PromptError(
                f"{lm.name}: has no chat template: give --raw, and a --prompt with all that it reads"
            )
        if not tokenizer.is_fast:
            raise PromptError(
                f"{lm.name}: its tokenizer does not say where its tokens stand in a text: add a tokenizer.json"
            )
        render = (lambda text: text + wording.prefill) if raw else renderer(tokenizer, wording)
        self._prompt = lru_cache(_KEPT_PROMPTS)(
            lambda question, vectors: placeholder_prompt(
                message.replace(QUESTION, question), placeholder, vectors, tokenizer, render
            )
        )

    @classmethod
    def load(cls, options: AskOptions, layer: int, announce: Callable[[str], None]) -> Oracle:
        """The oracle that the options name, for vectors of this layer. RequestError says what is wrong with it."""
        device, dtype, kernels = compute_with(options, announce)
        remote_code = options.trust_remote_code
        source = find_source(
            options.oracle, base=options.oracle_base, flag="--oracle-base", remote_code=remote_code
        )
        if (source.directory / SIDECAR).is_file():
            raise RequestError(
                f"--oracle {options.oracle}: has a {SIDECAR}, so it is an AV or AR: use explain --prompt to ask an AV"
            )
        lm = load_model(options.oracle, device=device, dtype=dtype, source=source, remote_code=remote_code)
        announce_unfused(lm, kernels, device, announce)
        assert options.injection is not None
        scale = None
        if options.injection_scale is not None:
            scale = norm_named(options.injection_scale, lm.d_model)
        return cls(
            lm,
            Injection.named(options.injection, scale, options.norm_match),
            f"Layer: {layer}\n{INJECT} \n{QUESTION}" if options.prompt is None else options.prompt,
            options.placeholder,
            wording=Wording(None, options.system, options.template_option or {}, options.prefill),
            raw=options.raw,
            kernels=kernels,
        )

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.lm.device

    def prompt(self, question: str, vectors: int) -> Prompt:
        """The prompt with this question and so many vectors. PromptError if it cannot be made."""
        return self._prompt(question, vectors)

    def survey(self, kinds: Iterable[tuple[str, int]]) -> tuple[Limits, str]:
        """The limits of the prompts of these questions and numbers of vectors, and a fingerprint of them all."""
        digest = hashlib.sha256()

        def prompts() -> Iterator[Prompt]:
            for question, vectors in kinds:
                prompt = self.prompt(question, vectors)
                digest.update(repr(prompt).encode())
                yield prompt

        return Limits.of(prompts()), digest.hexdigest()[:16]
