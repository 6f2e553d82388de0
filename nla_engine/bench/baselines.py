"""The same work done by plain Hugging Face code, with the same weights.

Every call first sets the library's own attention, since the engine has plugged in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import seconds
from nla_engine.models.load import LanguageModel

CORPUS_BATCH = 16
CORPUS_BATCHES = 4
AV_BATCH = 256
AR_BATCH = 64
GENERATE_BATCH = 256


def _plain(lm: LanguageModel) -> None:
    has_sdpa = getattr(lm.model, "_supports_sdpa", False)
    lm.model.set_attn_implementation("sdpa" if has_sdpa else "eager")


def _ids(lm: LanguageModel, batch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, lm.vocab_size, (batch, size), generator=generator).to(lm.device)


def _generate(lm: LanguageModel, new: int, **inputs: Any) -> Any:
    return lm.model.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states that a block returned."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def _hook(lm: LanguageModel, layer: int, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    handle = lm.blocks[layer].register_forward_hook(lambda _m, _i, output: take(_hidden(output)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def generate_hidden_states(session: Session, batch: int, prompt: int, new: int) -> Iterator[Prepared]:
    """`generate(output_hidden_states=True)`, then the layer's rows to the host. New tokens per second."""
    lm, layer = session.lm, session.layer
    _plain(lm)
    ids = _ids(lm, batch, prompt)

    def run(new: int) -> None:
        out = _generate(
            lm, new, input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
        )
        expect("tokens generated", (out.sequences.shape[1] - prompt) * batch, new * batch)
        torch.stack([step[layer + 1][:, -1] for step in out.hidden_states]).cpu()

    with torch.inference_mode():
        run(min(new, 8))
        yield Prepared(lambda: batch * new / seconds(lambda: run(new), lm.device))


@contextmanager
def generate_hook(session: Session, batch: int, prompt: int, new: int) -> Iterator[Prepared]:
    """`generate` with a hook that copies each step's rows to the host as float32. New tokens per second."""
    lm = session.lm
    _plain(lm)
    ids = _ids(lm, batch, prompt)

    def run(new: int) -> None:
        rows: list[torch.Tensor] = []
        with _hook(lm, session.layer, lambda hidden: rows.append(hidden[:, -1].float().cpu())):
            out = _generate(lm, new, input_ids=ids, attention_mask=torch.ones_like(ids))
        expect("tokens generated", (out.sequences.shape[1] - prompt) * batch, new * batch)

    with torch.inference_mode():
        run(min(new, 8))
        yield Prepared(lambda: batch * new / seconds(lambda: run(new), lm.device))


@contextmanager
def generate_static(session: Session, batch: int, prompt: int, new: int) -> Iterator[Prepared]:
    """`generate` with a static cache, compiled on a GPU. Nothing is captured. New tokens per second."""
    lm = session.lm
    _plain(lm)
    ids = _ids(lm, batch, prompt)

    def run() -> None:
        out = _generate(
            lm, new, input_ids=ids, attention_mask=torch.ones_like(ids), cache_implementation="static"
        )
        expect("tokens generated", (out.sequences.shape[1] - prompt) * batch, new * batch)

    try:
        with torch.inference_mode():
            run()  # compiles for this length
            yield Prepared(lambda: batch * new / seconds(run, lm.device))
    finally:  # compiled code holds memory
        vars(lm.model).pop("_compiled_call", None)
        torch.compiler.reset()


@contextmanager
def padded_extractor(session: Session, lengths: Sequence[int]) -> Iterator[Prepared]:
    """The usual extractor: padded batches through the whole model with its head, rows to the host as float32.

    Only the first batches. Tokens per second, padding not counted.
    """
    lm, device = session.lm, session.device
    _plain(lm)
    lengths = lengths[: CORPUS_BATCH * CORPUS_BATCHES]
    batches = []
    for start in range(0, len(lengths), CORPUS_BATCH):
        sizes = torch.tensor(lengths[start : start + CORPUS_BATCH], device=device)
        ids = _ids(lm, len(sizes), int(sizes.max()))
        batches.append((ids, (torch.arange(ids.shape[1], device=device) < sizes[:, None]).long()))

    def run(part: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        rows: list[torch.Tensor] = []
        with _hook(lm, session.layer, lambda hidden: rows.append(hidden.float().cpu())):
            for ids, mask in part:
                lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
        expect("batches", len(rows), len(part))

    with torch.inference_mode():
        run(batches[:1])
        yield Prepared(lambda: sum(lengths) / seconds(lambda: run(batches), device))


@contextmanager
def verbalizer(session: Session, batch: int, prompt: int, marker: int, new: int) -> Iterator[Prepared]:
    """`generate(inputs_embeds)` with the vector in its place, one batch. Explanations per second."""
    lm = session.lm
    _plain(lm)

    def run(new: int) -> None:
        embeds = lm.embedding(_ids(lm, batch, prompt)).clone()
        embeds[:, marker] = torch.randn(batch, lm.d_model, device=lm.device, dtype=lm.dtype)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=lm.device)
        out = _generate(lm, new, inputs_embeds=embeds, attention_mask=mask)
        expect("tokens generated", out.sequences.shape[1] * batch, new * batch)

    with torch.inference_mode():
        run(min(new, 4))
        yield Prepared(lambda: batch / seconds(lambda: run(new), lm.device))


@contextmanager
def reconstructor(session: Session, batch: int, prompt: int, weight: torch.Tensor) -> Iterator[Prepared]:
    """Dense batches of equal prompts through blocks 0..K, then the head. Reconstructions per second."""
    lm = session.lm.truncated(session.layer)
    _plain(lm)
    weight, ids = weight.to(lm.device), _ids(lm, batch, prompt)

    def run() -> None:
        last = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        torch.nn.functional.linear(last.float(), weight).cpu()

    with torch.inference_mode():
        yield Prepared(lambda: batch / seconds(run, lm.device))
