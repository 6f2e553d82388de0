"""What a capture starts from: the base model and its prompts, which are read while the weights load."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from nla_engine.config import CaptureOptions
from nla_engine.models.chat import Reading
from nla_engine.models.documents import Longest
from nla_engine.models.load import (
    LanguageModel,
    load_model,
    pick_device,
    pick_dtype,
    tokenizer_of,
)
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.prompts import Limits, read_prompts
from nla_engine.models.source import Source, find_source
from nla_engine.store import CaptureStore
from nla_engine.store.objects import place
from nla_engine.store.swap import exists

#: Key of provenance: the time that the chat template was given, if it asked for one.
CLOCK = "chat_template_clock"


def load_inputs(options: CaptureOptions, lm: LanguageModel | None = None) -> tuple[LanguageModel, PromptSet]:
    """Load the model, unless it is given, check the layers, and read the prompts.

    Raises what `find_source`, `load_model`, `check_layer` and `read_prompts` raise, in this order.
    """
    clock, ahead = _first_clock(options), None
    if lm is None:  # cheap checks come before a possible download
        device = pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
        source = find_source(
            options.model, options.revision, base=options.base, remote_code=options.trust_remote_code
        )
        ahead = _Ahead.start(options, source, clock)
    try:
        lm = lm or load_model(
            options.model,
            device=device,
            dtype=dtype,
            source=source,
            remote_code=options.trust_remote_code,
        )
        chosen_layers(options, lm)
    except BaseException:
        if ahead:
            ahead.stop()
        raise
    limits = Limits(lm.max_length - options.max_new_tokens, lm.vocab_size)
    if ahead and ahead.limits == limits:
        return lm, ahead.result()
    if ahead:  # the model differs from what its configuration said
        ahead.stop()
    return lm, _read(options, lm.tokenizer, limits, clock)


def chosen_layers(options: CaptureOptions, lm: LanguageModel) -> tuple[int, ...]:
    """The blocks that --layer names, ascending. RequestError if the model lacks one."""
    if isinstance(options.layer, str):
        return tuple(range(len(lm.blocks)))
    for layer in options.layer:
        lm.check_layer(layer)
    return options.layer


def prompts_rendering(options: CaptureOptions, lm: LanguageModel) -> str:
    """How prompts became text: "raw", or the sha256 of the chat template they were rendered with."""
    template = lm.tokenizer.chat_template
    if options.chat is False or not template:
        return "raw"
    return hashlib.sha256(str(template).encode()).hexdigest()[:16]


def _read(
    options: CaptureOptions,
    tokenizer: Any,
    limits: Limits,
    clock: datetime | None,
    go_on: Callable[[], bool] = lambda: True,
) -> PromptSet:
    return read_prompts(
        options.prompts,
        tokenizer,
        chat=options.chat,
        replies=options.max_new_tokens > 0,
        limits=limits,
        reading=Reading(options.text_column, options.system, options.template_option or {}),
        longest=Longest(options.max_tokens, options.long),
        skip_bad=options.skip_bad,
        clock=clock,
        go_on=go_on,
    )


def _first_clock(options: CaptureOptions) -> datetime | None:
    """If a store is resumed, the time that its first run gave the chat template: prompts must render the same."""
    if not (options.resume and exists(place(options.out))):
        return None
    told = CaptureStore.open(options.out).provenance.get(CLOCK)
    return datetime.fromisoformat(told) if told else None


class _Ahead:
    """Reads the prompts in a thread of its own, with the limits that the model's configuration states."""

    def __init__(
        self, options: CaptureOptions, tokenizer: Any, limits: Limits, clock: datetime | None
    ) -> None:
        self.limits = limits
        self._found: PromptSet | BaseException | None = None
        self._stopped = threading.Event()

        def read() -> None:
            try:
                self._found = _read(options, tokenizer, limits, clock, lambda: not self._stopped.is_set())
            except BaseException as error:  # raised by `result`
                self._found = error

        # A daemon, in case the program ends without `stop`.
        self._thread = threading.Thread(target=read, name="prompts", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, options: CaptureOptions, source: Source, clock: datetime | None) -> _Ahead | None:
        """None if tokenizer or configuration cannot be loaded: loading the model then says why."""
        from transformers import AutoConfig

        try:
            tokenizer = tokenizer_of(source, remote_code=options.trust_remote_code)
            config = AutoConfig.from_pretrained(source.weights, trust_remote_code=options.trust_remote_code)
            text = config.get_text_config(decoder=True)
            longest = int(getattr(text, "max_position_embeddings", 0) or 1 << 30)
            limits = Limits(longest - options.max_new_tokens, int(text.vocab_size))
        except Exception:  # the library raises many types
            return None
        return cls(options, tokenizer, limits, clock)

    def stop(self) -> None:
        """Drop the result: the thread ends after its current batch."""
        self._stopped.set()
        self._thread.join()

    def result(self) -> PromptSet:
        """What was read. Raises what `read_prompts` raised."""
        self._thread.join()
        if isinstance(self._found, BaseException):
            raise self._found
        assert self._found is not None
        return self._found
