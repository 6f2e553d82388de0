"""What a capture starts from: its prompts, which are read before the weights are loaded, and the base model."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import torch

from nla_engine.capture.partial import partial_name
from nla_engine.capture.reply_limits import longest_prompt
from nla_engine.config import CaptureOptions
from nla_engine.engine.leader import first_device, group_devices, open_ranks
from nla_engine.engine.split_load import check_split, load_split
from nla_engine.errors import RequestError, StoreError, already_there
from nla_engine.models.chat import Reading
from nla_engine.models.documents import Longest
from nla_engine.models.hub.fetch import say
from nla_engine.models.load import (
    NO_LENGTH,
    LanguageModel,
    load_model,
    pick_device,
    pick_dtype,
    tokenizer_of,
)
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.prompt_sources import PromptSources
from nla_engine.models.prompts import Limits, read_prompts
from nla_engine.models.source import Source, find_source
from nla_engine.models.tokens import excerpt
from nla_engine.sites import Site, crossed
from nla_engine.store import CaptureStore
from nla_engine.store.directory import check_place
from nla_engine.store.objects import place
from nla_engine.store.swap import exists
from nla_engine.workers.devices import grouped, worker_devices

#: Key of provenance: the time that the chat template was given, if it asked for one.
CLOCK = "chat_template_clock"


def load_inputs(
    options: CaptureOptions,
    lm: LanguageModel | None = None,
    opened: ExitStack | None = None,
    clock: datetime | None = None,
) -> tuple[LanguageModel, PromptSet]:
    """Read the prompts, load the model, unless it is given, and check the layers.

    Prompts are read before the weights: a tokenizer and a configuration are enough for that, and what is wrong with a
    prompt is said at once. If the loaded model has other limits than its configuration said, they are read again.
    clock: the time that a chat template is given; None: as a resumed run needs it.
    Raises what `PromptSources.find`, `find_source`, `read_prompts`, `load_model`, `check_layer` raise, in this order,
    and RequestError if the model cannot say what --next-token asks for.
    opened: what ends the processes of --tensor-parallel
    """
    clock = clock or _first_clock(options)
    sources = PromptSources.find(options.prompts, options.prompt_format)
    limits, prompts = None, None
    if lm is None:  # cheap checks come before a possible download
        device = pick_device(first_device(options.device, options.tensor_parallel))
        dtype = pick_dtype(options.dtype, device)
        source = find_source(
            options.model, options.revision, base=options.base, remote_code=options.trust_remote_code
        )
        if told := _told(options, source):
            tokenizer, limits = told
            prompts = _read(options, sources, tokenizer, limits, clock)
        if options.tensor_parallel > 1:
            assert opened is not None
            lm = _load_split(options, source, device, dtype, opened)
        else:
            lm = load_model(
                options.model,
                device=device,
                dtype=dtype,
                source=source,
                remote_code=options.trust_remote_code,
            )
    elif options.tensor_parallel != (1 if lm.ranks is None else lm.ranks.size):
        raise RequestError(
            f"--tensor-parallel {options.tensor_parallel}: the given model was loaded otherwise"
        )
    chosen_layers(options, lm)
    _check_next_token(options, lm)
    loaded = Limits(longest_prompt(options, lm), lm.vocab_size)
    if prompts is None or limits != loaded:
        prompts = _read(options, sources, lm.tokenizer, loaded, clock)
    return lm, prompts


def _load_split(
    options: CaptureOptions, source: Source, device: torch.device, dtype: torch.dtype, opened: ExitStack
) -> LanguageModel:
    """The model over several ranks. What is wrong with the request is said before they start."""
    devices = group_devices(device, options.tensor_parallel, options.device)
    how: dict[str, Any] = {"dtype": dtype, "remote_code": options.trust_remote_code}
    check_split(source, len(devices), **how)
    ranks = opened.enter_context(open_ranks(devices))
    assert ranks is not None
    return load_split(ranks, source, announce=say, **how)


def devices_of(options: CaptureOptions, lm: LanguageModel | None) -> tuple[str, ...]:
    """The devices of --gpus or --workers, a group of them for each worker with --tensor-parallel; empty: that of
    --device. RequestError if they cannot be had."""
    devices = worker_devices(options.gpus, options.workers, options.device, loaded=lm is not None)
    return grouped(devices, options.tensor_parallel)


def check_out(options: CaptureOptions) -> None:
    """StoreError if `out` holds something that may be neither resumed nor replaced."""
    out = place(options.target)
    there = exists(out)
    if there and not (options.continues or options.overwrite):
        raise StoreError(already_there(options.target))
    if not (there and options.continues):
        check_place(out, options.overwrite)
    if options.keep_partial:
        partial = place(partial_name(options.target))
        if exists(partial) and not (options.continues or options.overwrite):
            raise StoreError(already_there(str(partial)))
        check_place(partial, overwrite=True)


def prompts_without_model(options: CaptureOptions) -> PromptSet | None:
    """The prompts, as the tokenizer and the configuration alone give them; None if these cannot be loaded."""
    source = find_source(
        options.model, options.revision, base=options.base, remote_code=options.trust_remote_code
    )
    if not (told := _told(options, source)):
        return None
    sources = PromptSources.find(options.prompts, options.prompt_format)
    return _read(options, sources, *told, _first_clock(options))


def first_prompt(prompts: PromptSet, vocabulary: Sequence[bytes]) -> str:
    """What the model reads first, for people: the text of its tokens, special ones included."""
    ids = prompts.token_ids(0)
    text = b"".join(vocabulary[id_] for id_ in ids).decode(errors="replace")
    return f"the first prompt, {len(ids):,} tokens:\n{textwrap.indent(excerpt(text), '    ', lambda _: True)}"


def chosen_layers(options: CaptureOptions, lm: LanguageModel) -> tuple[int, ...]:
    """The blocks that --layer names, ascending. RequestError if the model lacks one."""
    if isinstance(options.layer, str):
        return tuple(range(len(lm.blocks)))
    for layer in options.layer:
        lm.check_layer(layer)
    return options.layer


def chosen_numbers(options: CaptureOptions, prompts: PromptSet) -> np.ndarray:
    """int64, ascending: the numbers of the prompts that this job does. Replies to a prompt, and windows of a document,
    stay together."""
    if options.part is None:
        return np.arange(len(prompts))
    return np.flatnonzero(options.part.takes(prompts.owners() // options.replies))


def chosen_sites(options: CaptureOptions, lm: LanguageModel) -> tuple[Site, ...]:
    """What --layer and --sites name together."""
    return crossed(chosen_layers(options, lm), options.sites)


def prompts_rendering(options: CaptureOptions, lm: LanguageModel) -> str:
    """How prompts became text: "raw", or the sha256 of the chat template they were rendered with."""
    template = lm.tokenizer.chat_template
    if options.chat is False or not template:
        return "raw"
    return hashlib.sha256(str(template).encode()).hexdigest()[:16]


def _check_next_token(options: CaptureOptions, lm: LanguageModel) -> None:
    """RequestError if the model has no head, or fewer tokens than are asked for beside each row."""
    if options.next_token is None:
        return
    if lm.head is None:
        raise RequestError(f"--next-token: {lm.name} has no head: leave it out")
    if options.next_token > lm.vocab_size:
        raise RequestError(
            f"--next-token is {options.next_token}: {lm.name} has {lm.vocab_size:,} tokens: lower it"
        )


def _read(
    options: CaptureOptions,
    sources: PromptSources,
    tokenizer: Any,
    limits: Limits,
    clock: datetime | None,
) -> PromptSet:
    return read_prompts(
        sources,
        tokenizer,
        chat=options.chat,
        replies=options.replies if options.max_new_tokens else 0,
        limits=limits,
        reading=Reading(options.text_column, options.system, options.template_option or {}, options.prefill),
        longest=Longest(options.max_tokens, options.long),
        skip_bad=options.skip_bad,
        clock=clock,
    )


def _first_clock(options: CaptureOptions) -> datetime | None:
    """If a store is resumed, the time that its first run gave the chat template: prompts must render the same.

    Of a new part of a run, the time of the first part, if that is there.
    """
    if not options.continues:
        return None
    for name in (
        options.target,
        *([replace(options.part, part=1).name(options.out)] if options.part else []),
    ):
        if exists(place(name)):
            told = CaptureStore.open(name).provenance.get(CLOCK)
            return datetime.fromisoformat(told) if told else None
    return None


def _told(options: CaptureOptions, source: Source) -> tuple[Any, Limits] | None:
    """The tokenizer, and the limits that the configuration states; None if one of them cannot be loaded: loading the
    model then says why."""
    from transformers import AutoConfig

    try:
        tokenizer = tokenizer_of(source, remote_code=options.trust_remote_code)
        config = AutoConfig.from_pretrained(source.weights, trust_remote_code=options.trust_remote_code)
        text = config.get_text_config(decoder=True)
        longest = int(getattr(text, "max_position_embeddings", 0) or 0)
        longest = longest if longest > 0 else NO_LENGTH
        new = 1 if isinstance(options.max_new_tokens, str) else options.max_new_tokens
        return tokenizer, Limits(longest - new, int(text.vocab_size))
    except Exception:  # the library raises many types
        return None
